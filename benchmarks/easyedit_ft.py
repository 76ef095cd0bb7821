"""LocFT-BF against EasyEdit's own FT: seconds an edit, and what each teaches, in one run.

    EASYEDIT_HOME=path/to/EasyEdit python benchmarks/easyedit_ft.py \
        --model models/SmolLM2-135M-Instruct --data zsre.json --n 20

Both edit the same model with the same edits from the same weights: FT one edit after the other, as
EasyEdit's editor calls it, LocFT-BF all of them together. EasyEdit is the clone that EASYEDIT_HOME
leads to, or else the release. FT has EasyEdit's published values, adapted to the model by the rules
of `locft compare`, and targets that end; `--ft KEY=VALUE` sets others, and with `--same-place` it
trains the layer that LocFT-BF trains. Seconds are of editing alone; checks, tokens and the frozen
prefix count as editing. They take turns, each `--rounds` times. `answered` is the share of edits
whose greedy answer is the target, `contains` of those that contain it, and `tokens` is EasyEdit's
teacher-forced `rewrite_acc`. Times are of one run on one machine: read the ratio.
"""

import json
import statistics

import torch
from shared import parser_of, timed, write_figures

from locft_easyedit import read_requests
from locft_easyedit.api import edit_model
from locft_easyedit.compare.edits import method_editor
from locft_easyedit.compare.job import Job
from locft_easyedit.easyedit.importing import load_easyedit
from locft_easyedit.easyedit.peers.peer_editor import describe
from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.hparams import LocFTBFHyperParams, hparams_folder
from locft_easyedit.modeling.loading import load_causal_lm


def main():
    options = arguments()
    easyedit = load_easyedit()
    model, tokenizer = load_causal_lm(options.model, device=options.device)
    requests = read_requests(options.data, options.n)
    hparams = LocFTBFHyperParams.from_hparams(options.hparams or default_hparams())
    for key, value in pairs(options.set):
        setattr(hparams, key, value)
    hparams.check()
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Before EasyEdit makes pad = EOS of the tokenizer; what is measured does not depend on it.
    own = [{k: r[k] for k in ("prompt", "target_new", "rephrase_prompt") if k in r}
           for r in requests]  # fmt: skip
    evaluation = Evaluation(model, tokenizer, own)
    ft = ft_editor(options, model, tokenizer, hparams, easyedit)

    def all_by_ft():
        for start in range(0, len(requests), ft.chunk):
            ft.editor.edit_([ft.ended(one) for one in requests[start : start + ft.chunk]])

    def all_by_us():
        edit_model(model, tokenizer, requests, hparams, progress=False)

    methods = {"EasyEdit's FT": all_by_ft, "LocFT-BF": all_by_us}
    seconds, summaries = {name: [] for name in methods}, {}
    for _ in range(options.rounds):
        for name, make_edits in methods.items():
            restore(model, originals)
            taken, _ = timed(make_edits, model.device)
            seconds[name].append(taken)
            if name not in summaries:
                measured = evaluation.measure(f"after {name}")
                summaries[name] = summarize([{"post": record} for record in measured])["post"]
    restore(model, originals)
    report(options, easyedit, ft, model, hparams, seconds, summaries)


def arguments():
    parser = parser_of(__doc__, "model", "data", "device")
    parser.add_argument("--n", type=int, default=20, help="edits")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hparams", help="a YAML of LocFT-BF; the demo's if not given")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of LocFT-BF")
    parser.add_argument("--ft", nargs="*", default=[], metavar="KEY=VALUE", help="of FT")
    parser.add_argument("--same-place", action="store_true", help="FT trains LocFT-BF's layers")
    return parser.parse_args()


def default_hparams():
    return hparams_folder() / "smollm2-135m.yaml"


def pairs(settings):
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            yield key, json.loads(value)
        except json.JSONDecodeError:
            yield key, value


def ft_editor(options, model, tokenizer, hparams, easyedit):
    """FT as `locft compare` sets it up."""
    overrides = dict(pairs(options.ft))
    if options.same_place:
        overrides.setdefault("layers", hparams.layers)
    job = Job(
        name="FT", model=options.model, data=options.data, n=options.n, device=options.device,
        dtype="float32", overrides=overrides, stats_dir="stats",
    )  # fmt: skip
    return method_editor(job, model, tokenizer, options.n, easyedit)


def restore(model, originals):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(originals[name])


def report(options, easyedit, ft, model, hparams, seconds, summaries):
    n = options.n
    median = {name: statistics.median(values) for name, values in seconds.items()}
    slower, faster = median.values()
    print(f"\n{describe(easyedit)}, {options.model}, {n} edits, {model.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print(f"FT: layers {ft.values.get('layers')}, lr {ft.values.get('lr')}, at most "
          f"{ft.values.get('num_steps')} steps an edit; LocFT-BF: layers {hparams.layers}, lr "
          f"{hparams.lr}, at most {hparams.num_steps} epochs")  # fmt: skip
    print(
        f"{'':14} {'s an edit':>10} {'answered':>9} {'contains':>9} {'tokens':>7} {'reworded':>9}"
    )
    rows = []
    for name, value in median.items():
        means = summaries[name]
        generated = means["generated"]
        row = {
            "method": name, "seconds": seconds[name], "seconds_per_edit": value / n,
            "answered": generated["reliability"], "contains": generated["contains_target"],
            "tokens": means["rewrite_acc"], "reworded": generated.get("generalization"),
        }  # fmt: skip
        rows.append(row)
        reworded = "-" if row["reworded"] is None else f"{row['reworded']:.2f}"
        print(f"{name:14} {value / n:10.3f} {row['answered']:9.2f} {row['contains']:9.2f} "
              f"{row['tokens']:7.2f} {reworded:>9}")  # fmt: skip
    print(f"LocFT-BF takes {slower / faster:.1f} times less time an edit.")
    write_figures(options, rows, easyedit=describe(easyedit), ratio=slower / faster, ft=ft.values,
                  ft_notes=ft.notes)  # fmt: skip


if __name__ == "__main__":
    main()
