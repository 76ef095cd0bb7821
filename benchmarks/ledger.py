"""Facts that come in commits, beside the same facts at once: what is kept, and what can be undone.

    python benchmarks/ledger.py --data zsre_1k.json --n 200 --commits 10 --json out.json
    python benchmarks/ledger.py --data zsre_1k.json --n 1000 --commits 20 --take-out 50

The facts of --data come into a ledger in --commits commits of as many. After each, every fact so
far is asked for by a plain greedy answer, by the age of its commit. Then some are superseded by
other targets, and others taken out again: whether the base model's own answer is back is asked in
plain form, on rephrases, and in chat where there is a template, word for word; the same of prompts
that were never edited is what can be asked for. Beside it: the same facts trained at once, and
commit after commit without replay and check (unless --no-naive: with LocFT-BF+ each of these
prepares anew, which takes most of the time). Seconds are of one run on one machine.
"""

import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from shared import parser_of, write_figures

from locft_easyedit.api import edit_model
from locft_easyedit.compare.commits import commits_of
from locft_easyedit.data.forms import Forms, ways_of
from locft_easyedit.data.readers import read_requests
from locft_easyedit.evaluation.answers import normalize_answer
from locft_easyedit.evaluation.divergence import BeforeEdit, Divergence
from locft_easyedit.evaluation.generated import MAX_NEW_TOKENS, Generated
from locft_easyedit.evaluation.greedy_decoder import GreedyDecoder
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.hparams_rules import ALG_NAME, ALG_NAMES, CHAT, PLAIN
from locft_easyedit.ledger.ledger import Ledger
from locft_easyedit.modeling.loading import load_causal_lm
from locft_easyedit.utils.output import show, write_picture
from locft_easyedit.utils.plotting import legend_below, look, new_figure, open_axes
from locft_easyedit.utils.tables import Row, number_text, terminal_table

HOW = EvalConfig(packed=True)
OTHERS = 50  # prompts that are never edited, at most, for comparison


def main():
    parser = parser_of(__doc__, "model", "template", "data", "device")
    parser.add_argument("--alg-name", default=ALG_NAME, choices=ALG_NAMES)
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--n", type=int, default=200, help="facts")
    parser.add_argument("--skip", type=int, default=0, help="first records, which come last")
    parser.add_argument("--commits", type=int, default=10)
    parser.add_argument("--take-out", type=int, default=10, help="facts to take out afterwards")
    parser.add_argument("--supersede", type=int, default=20, help="facts with other targets")
    parser.add_argument("--no-naive", dest="naive", action="store_false",
                        help="leave out the commits without replay and check")  # fmt: skip
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--picture", metavar="FILE", help="also draw accuracy by age, as PNG")
    options = parser.parse_args()
    found = measured(options)
    show(summary_table(found), commits_table(found), undone_table(found))
    write_figures(options, found)
    if options.picture:
        write_picture(options.picture, picture(found, Path(options.model).name))
    return 0


def measured(options):
    """All figures."""
    model, tokenizer = load_causal_lm(options.model, device=options.device, dtype=options.dtype)
    hparams = LocFTBFHyperParams(
        alg_name=options.alg_name, layers=[options.layer], rewrite_module_tmp=options.template,
        lr=options.lr, batch_size=options.batch_size, num_steps=options.epochs, seed=options.seed,
        health_check=False,
    )  # fmt: skip
    unrepaired = replace(hparams, repairs=0)  # as the epochs leave it: a ledger alone repairs
    records = read_requests(options.data)
    records = records[options.skip :] + records[: options.skip]
    asked = Facts(model, tokenizer, records[: options.n])
    asked.remember_base_()
    never = Facts(model, tokenizer, records[options.n : options.n + OTHERS])
    in_base = {"never": never.in_chat(), "facts": asked.in_chat()}
    never_plain = never.words("base")
    commits = commits_of(options.n, options.commits)
    base = asked.answers("base")
    found = {"base": asked.figures(base)}
    if options.naive:
        found["naive"] = naive(asked, unrepaired, commits)
    with asked.undone():
        start = time.perf_counter()
        result = edit_model(model, tokenizer, asked.requests, unrepaired, progress=False)
        seconds = time.perf_counter() - start
        forms = [form for form in (result.augmented or {}).get("forms", []) if form != PLAIN]
        each = min(hparams.forms_per_epoch, len(ways_of(forms)) - 1)
        found["at once"] = asked.figures(asked.answers("at once")) | {
            "epochs": len(result.losses),
            "texts": round(len(result.losses) * options.n * (1 + each)),
            "seconds": seconds,
        }
    with TemporaryDirectory(prefix="locft-ledger-") as folder, asked.undone():
        ledger = Ledger.init(folder, hparams, model, tokenizer, progress=False)
        found["commits"] = [commit(ledger, asked, commits, i) for i in range(len(commits))]
        found["ledger"] = asked.figures(asked.answers("ledger")) | {
            key: sum(one[key] for one in found["commits"]) for key in ("texts", "seconds")
        }
        found["superseded"] = superseded(ledger, asked, options.supersede)
        found["taken out"] = taken_out(ledger, asked, options, base, in_base["facts"])
        if never.requests:
            found["never edited"] = {
                "prompts": len(never.requests),
                "as in the base, plain": mean(map(same, never.words("ledger"), never_plain)),
                "as in the base, chat": in_base["never"]
                and mean(map(same, never.in_chat(), in_base["never"])),
            }
    return found


class Facts:
    """Facts, and a model that is asked for them."""

    divergence = None

    def __init__(self, model, tokenizer, requests):
        self.model, self.tokenizer, self.requests = model, tokenizer, requests

    def remember_base_(self):
        """Keeps what the model, which is the base, says on locality prompts."""
        requests = self.requests
        self.before = BeforeEdit(requests)
        prompts = [
            prompt
            for request in requests
            for part in (request.get("locality") or {}).values()
            for prompt in ([part["prompt"]] if isinstance(part["prompt"], str) else part["prompt"])
        ]
        plain = Forms(self.tokenizer, [])
        first = [plain.ask(0, prompt, "") for prompt in prompts[:512]]
        if first:
            self.divergence = Divergence(self.model, self.tokenizer, first, HOW, self.before)
            self.divergence.keep("base")

    @contextmanager
    def undone(self):
        """Within it the model may be edited; then it is as it was."""
        held = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        yield
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(held[name])

    def answers(self, label, which=None, *, rephrases=True):
        """Generated metrics of some facts, all of them by default."""
        which = range(len(self.requests)) if which is None else which
        keys = ["prompt", "target_new", "target_aliases"] + ["rephrase_prompt"] * rephrases
        records = [{k: self.requests[i][k] for k in keys if k in self.requests[i]} for i in which]
        return Generated(self.model, self.tokenizer, records, HOW).measure(label)

    def words(self, label):
        """Greedy answers to all prompts and rephrases, plainly."""
        found = self.answers(label) if self.requests else []
        return [text for one in found for text in (one["answer"], *one.get("rephrase_answers", []))]

    def in_chat(self, which=None):
        """Greedy answers of some facts in chat; `None` without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        which = range(len(self.requests)) if which is None else which
        forms = Forms(self.tokenizer, [CHAT])
        asked = [
            forms.ask(1, self.requests[i]["prompt"], self.requests[i]["target_new"], 0)
            for i in which
        ]
        decoder = GreedyDecoder(
            self.model, self.tokenizer, asked, None, HOW, max_new_tokens=MAX_NEW_TOKENS
        )
        return decoder.answers("chat")

    def figures(self, answers):
        """Reliability, generalization, and KL on locality prompts."""
        found = {key: mean_of(key, answers) for key in ("reliability", "generalization")}
        if self.divergence is not None:
            found["kl"] = float(np.nanmean(self.divergence.measure("kl")))
        return found


def naive(asked, hparams, commits):
    """Commit after commit with nothing kept: accuracy by age at the end."""
    with asked.undone():
        for part in commits:
            requests = [asked.requests[i] for i in part]
            edit_model(asked.model, asked.tokenizer, requests, hparams, progress=False)
        answers = asked.answers("naive")
        return asked.figures(answers) | {"by commit": by_commit(answers, commits)}


def commit(ledger, asked, commits, i):
    """One commit, and what of all facts so far is known after it."""
    added = ledger.add([asked.requests[j] for j in commits[i]], source=f"commit {i}")
    trained = added.event.said["trained"]
    answers = asked.answers(f"commit {i + 1}", range(commits[i].stop), rephrases=False)
    return {
        "facts": len(added.facts),
        "texts": trained["texts"],
        "repairs": trained["repairs"],
        "seconds": added.event.said["seconds"],
        "lost": len(added.lost),
        "by commit": by_commit(answers, commits[: i + 1]),
    }


def superseded(ledger, asked, n):
    """Other targets for the last n facts; each gets its neighbour's."""
    which = range(len(asked.requests) - n, len(asked.requests))
    targets = [asked.requests[i]["target_new"] for i in which]
    changed = [
        {**asked.requests[i], "target_new": target}
        for i, target in zip(which, [*targets[1:], *targets[:1]], strict=True)
        if target != asked.requests[i]["target_new"]
    ]
    if not changed:
        return {}
    added = ledger.add(changed, source="correction")
    answers = Facts(asked.model, asked.tokenizer, changed).answers("superseded")
    return {
        "facts": len(changed),
        "new answers": mean(one["reliability"] for one in answers),
        "texts": added.event.said["trained"]["texts"],
    }


def taken_out(ledger, asked, options, base, base_chat):
    """Some of the first facts taken out: is the base's answer back, and are the others there?"""
    n_left = options.n - options.supersede
    gone = np.linspace(0, n_left - 1, options.take_out).astype(int).tolist()
    numbers = {fact.prompt: fact.number for fact in ledger.book.active}
    rest = [i for i in range(n_left) if i not in set(gone)]
    before = asked.answers("before", rest)
    removed = ledger.retract([numbers[asked.requests[i]["prompt"]] for i in gone])
    after, others = asked.answers("taken out", gone), asked.answers("others", rest)
    chat = asked.in_chat(gone)
    rephrased = [
        same(now, then)
        for k, i in enumerate(gone)
        for now, then in zip(
            after[k].get("rephrase_answers", []), base[i].get("rephrase_answers", []), strict=True
        )
    ]
    return {
        "facts": len(gone),
        "back, plain": mean(same(after[k]["answer"], base[i]["answer"])
                            for k, i in enumerate(gone)),
        "back, rephrases": mean(rephrased),
        "back, chat": chat and mean(same(chat[k], base_chat[i]) for k, i in enumerate(gone)),
        "target still": mean(one["reliability"] for one in after),
        "target still, chat": chat and mean(
            normalize_answer(asked.requests[i]["target_new"]) in normalize_answer(chat[k])
            for k, i in enumerate(gone)
        ),
        "target in the base's, chat": chat and mean(
            normalize_answer(asked.requests[i]["target_new"]) in normalize_answer(base_chat[i])
            for i in gone
        ),
        **{
            f"{name} {when}": mean_of(key, answers)
            for name, key in (("others", "reliability"), ("others' rephrases", "generalization"))
            for when, answers in (("before", before), ("after", others))
        },
        "not out by the ledger's check": len(removed.not_out),
        "texts": removed.event.said["trained"]["texts"],
        "seconds": removed.event.said["seconds"],
    }  # fmt: skip


def same(one, other):
    """Whether two answers say the same."""
    return float(normalize_answer(one) == normalize_answer(other))


def by_commit(answers, commits):
    """Reliability of the facts of each commit."""
    return [mean(answers[i]["reliability"] for i in part) for part in commits]


def mean_of(key, answers):
    """The mean of a figure over the answers that have it."""
    return mean(one[key] for one in answers if key in one)


def mean(values):
    """The mean; `None` of nothing."""
    values = list(values)
    return float(np.mean(values)) if values else None


def summary_table(found):
    """What the ways come to, one beside the other."""
    columns = ["", "reliability", "generalization", "KL", "texts", "seconds", "oldest commit"]
    oldest = {"ledger": found["commits"][-1]["by commit"][0]}
    if "naive" in found:
        oldest["naive"] = found["naive"]["by commit"][0]
    rows = []
    for name in ("base", "at once", "ledger", "naive"):
        one = found.get(name)
        if one is None:
            continue
        rows.append(Row([
            name, number_text(one["reliability"]), number_text(one["generalization"]),
            number_text(one.get("kl")), number_text(one.get("texts"), ","),
            number_text(one.get("seconds"), ".0f"), number_text(oldest.get(name)),
        ]))  # fmt: skip
    return terminal_table(columns, rows, title="Facts in commits", whole_first=True)


def undone_table(found):
    """What came of facts that were superseded and taken out."""
    rows = [
        Row([name, key, number_text(value, "g" if value == int(value) else ".3f")])
        for name in ("superseded", "taken out", "never edited")
        for key, value in found.get(name, {}).items()
        if value is not None
    ]
    return terminal_table(["", "what", "figure"], rows, title="Afterwards", text_columns=2)


def commits_table(found):
    """What each commit took."""
    columns = ["commit", "facts", "texts a fact", "repairs", "seconds", "lost", "all", "oldest"]
    rows = [
        Row([
            str(i + 1), str(one["facts"]), f"{one['texts'] / max(one['facts'], 1):.1f}",
            str(one["repairs"]), f"{one['seconds']:.1f}", str(one["lost"]),
            number_text(mean(one["by commit"])), number_text(one["by commit"][0]),
        ])
        for i, one in enumerate(found["commits"])
    ]  # fmt: skip
    return terminal_table(columns, rows, title="Commits")


def picture(found, model):
    """The figure: how much of each commit is known after every later one."""
    figure = new_figure(10, 4.6, [f"{model}: facts by the age of their commit"])
    axes = figure.subplots()
    open_axes(axes)
    axes.set(xlabel="commits so far", ylabel="reliability, %")
    n = len(found["commits"])
    shown = sorted({0, n // 3, 2 * n // 3, n - 1})
    for k, i in enumerate(shown):
        colour, marker = look(k)
        values = [100 * one["by commit"][i] for one in found["commits"][i:]]
        axes.plot(range(i + 1, n + 1), values, color=colour, marker=marker, markersize=5,
                  label=f"ledger, commit {i + 1}")  # fmt: skip
    if "naive" in found:
        colour, marker = look(len(shown))
        axes.plot(range(1, n + 1), [100 * value for value in found["naive"]["by commit"]],
                  color=colour, marker=marker, linestyle=":", markersize=5,
                  label="without, at the end")  # fmt: skip
    axes.set(ylim=(0, 103), xticks=range(1, n + 1, -(-n // 20)))
    handles, _ = axes.get_legend_handles_labels()
    legend_below(figure, handles)
    return figure


if __name__ == "__main__":
    sys.exit(main())
