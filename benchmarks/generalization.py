"""What each remedy does to an edit: is it known in other words, and does the rest stay as it was?

    python benchmarks/generalization.py --model models/SmolLM2-135M-Instruct \
        --hparams benchmarks/generalization.yaml --data zsre.json counterfact.json \
        --n 100 --seeds 0 1 2 --output generalization

A variant is a few changes of the hyper-parameters: `published` none, the others a remedy or several
together; `--set higher:lr=4e-3,num_steps=10` adds one. `--variants ROME MEMIT AlphaEdit` lets
EasyEdit's own code make the same edits, in float32, which takes minutes to hours. Each seed draws
edits of its own from one half of a file, `choose` (the first) or `report` (the second), so that
what was chosen on one half can be reported on the other; where half a file is not enough, edits
come from all of it, and what is measured stays the half's. Reliability and generalization are
generated answers that match exactly; portability and locality are EasyEdit's, by tokens. On the
locality prompts the next token is looked at besides: how often the first choice stayed, and how far
the distribution moved (KL).

Each run is a line of OUTPUT/runs.jsonl as soon as it is made, and is not made again. Table, verdict
and picture are made of all lines there; `--draw-only` makes no more than these.
"""

import argparse
import dataclasses
import platform
import random
import re
import sys
from pathlib import Path

import generalization_peers as peers  # beside this file, as is what makes a run
import generalization_report as report
from generalization_bench import MEASURED, WRAPPERS, Bench
from tqdm import tqdm

from locft_easyedit.compare.job import PACKAGES, file_hash, model_id, version_of
from locft_easyedit.data.readers import read_requests
from locft_easyedit.errors import DataError, LocFTError, one_message
from locft_easyedit.hparams import LocFTBFHyperParams, read_mapping
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.utils.output import prepare_folder
from locft_easyedit.utils.parsing import ParseError, yaml_of
from locft_easyedit.utils.run_folder import differences_of, refuse_differences

VARIANTS = {
    "published": {},
    "forms": {"alg_name": "LocFT-BF+", "preserve": [], "repairs": 0},
    "preserve": {"alg_name": "LocFT-BF+", "forms": [], "repairs": 0},
    "LocFT-BF+": {"alg_name": "LocFT-BF+"},
}
HALVES = ("report", "choose")
# The model is loaded once, and each run has its seed.
NOT_IN_A_VARIANT = ("model_name", "device", "dtype", "fp16", "model_parallel", "stream_frozen",
                    "shard_frozen", "quantize_frozen", "trust_remote_code", "seed",
                    "checkpoint_dir")  # fmt: skip
SET = re.compile(r"([\w.+-]+):(\w+=.*)", re.DOTALL)
# Of `lr=1e-3,preserve=[a, b]` the first comma alone stands before a key.
BETWEEN_KEYS = re.compile(r",\s*(?=\w+=)")


def main():
    options = arguments()
    try:
        if not options.draw_only:
            make_runs(options)
        print(report.write_report(Path(options.output)))
    except LocFTError as error:
        sys.exit(f"generalization.py: {error}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder (that of the hparams)")
    parser.add_argument("--hparams", help="YAML with what all variants have in common")
    parser.add_argument("--data", nargs="+", default=[], help="files with edits")
    parser.add_argument("--n", type=int, nargs="+", default=[100], help="edits together")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS),
                        help=f"of {', '.join(VARIANTS)} (all of these), "
                        f"{', '.join(peers.METHODS)}")  # fmt: skip
    parser.add_argument("--half", default="report", help="report or choose")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME:KEY=VALUE",
                        help="a variant more; several keys have commas between them")  # fmt: skip
    parser.add_argument("--measure", nargs="*", default=[WRAPPERS], choices=MEASURED,
                        help="what costs time and is not measured for nothing: answers in wrappers "
                        "and in chat, and a few tasks (wrappers)")  # fmt: skip
    parser.add_argument("--stats-dir", default="data/stats", help="key covariances, as EasyEdit's")
    parser.add_argument("--output", required=True, help="folder for runs, tables and the picture")
    parser.add_argument("--draw-only", action="store_true", help="of the runs that are there")
    return parser.parse_args()


@dataclasses.dataclass
class Plan:
    """All runs: what they have in common, and what is to be made.

    Attributes:
        about: What every line says: model, hparams in common, half.
        base: The hparams in common, as read.
        variants: Name -> changes.
        files: Name of the data file -> its requests.
        hashes: Name of the data file -> its content's hash.
        runs: Data, number of edits, seed and variant of each.
    """

    about: dict
    base: dict
    variants: dict
    files: dict
    hashes: dict
    runs: list

    def hparams(self, variant, seed):
        """The hyper-parameters of a run."""
        values = self.base | self.variants[variant] | {"seed": seed, "checkpoint_dir": None}
        return LocFTBFHyperParams.from_mapping(values, source=f"variant {variant}")

    def line(self, data, n, seed, variant):
        """What a run's line begins with."""
        return {
            **self.about, "data": data, "n": n, "seed": seed, "variant": variant,
            "changes": self.variants[variant], "data_sha256": self.hashes[data],
        }  # fmt: skip


def planned(options):
    """All runs that are asked for; one error says everything that is wrong with them."""
    problems = []

    def tried(action, *given):
        try:
            return action(*given)
        except LocFTError as error:
            problems.append(str(error))
            return None

    for name in ("hparams", "data", "n", "seeds"):
        if not getattr(options, name):
            problems.append(f"`--{name}` is missing. Give it, or `--draw-only`.")
    if options.half not in HALVES:
        problems.append(f"`--half {options.half}` must be one of {', '.join(HALVES)}.")
    problems += [f"`--n {n}` must be 1 or more." for n in options.n if n < 1]
    variants = variants_of(options.variants, options.set, problems)
    read = tried(read_mapping, options.hparams) if options.hparams else None
    base = {} if read is None else read[1]
    base = base | ({"model_name": options.model} if options.model else {})
    names = [Path(path).name for path in options.data]
    problems += [
        f"`--data`: two files have the name {name}. Give another to one of them."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    files = {Path(path).name: tried(read_requests, path) or [] for path in options.data}
    plan = Plan({}, base, variants, files, {}, [])
    if read is not None:
        for variant in variants:
            if variant not in peers.METHODS:
                tried(plan.hparams, variant, (options.seeds or [0])[0])
    if not problems:
        for data, requests in files.items():
            # A file with fewer edits gives all of them, once.
            numbers = dict.fromkeys(min(n, len(requests)) for n in options.n)
            asked = [(data, n, seed) for n in numbers for seed in dict.fromkeys(options.seeds)]
            for one in asked:
                tried(sample, requests, *one, options.half)
            plan.runs += [(*one, variant) for one in asked for variant in variants]
    if problems:
        raise DataError(one_message("Nothing was run:", problems))
    plan.hashes = {Path(path).name: file_hash(path) for path in options.data}
    common = {k: v for k, v in base.items() if k not in ("model_name", "device", "seed")}
    plan.about = {"model": model_id(str(base["model_name"])), "hparams": common,
                  "half": options.half, "measure": sorted(options.measure)}  # fmt: skip
    return plan


def variants_of(names, set_, problems):
    """Name -> changes of the hyper-parameters; what is wrong with them is added to `problems`."""
    known = VARIANTS | {method: {"alg_name": method} for method in peers.METHODS}
    problems += [
        f"`--variants {name}` is none of {', '.join(known)}. Choose among them, or give its "
        f"changes: `--set {name}:key=value`."
        for name in names
        if name not in known
    ]
    variants = {name: known[name] for name in names if name in known}
    for text in set_:
        parts = SET.fullmatch(text)
        if parts is None:
            problems.append(f"`--set {text}` must have the form NAME:key=value,key=value.")
            continue
        name, changes = parts[1], {}
        if name in known or name in variants:
            problems.append(f"`--set {text}`: there is a variant {name}. Choose another name.")
            continue
        for pair in BETWEEN_KEYS.split(parts[2]):
            key, value = pair.split("=", 1)
            try:
                changes[key] = yaml_of(value)
            except ParseError as error:
                reason = " ".join(str(error).split())
                problems.append(f"`--set {text}`: `{value}` is no YAML ({reason}). Correct it.")
            if key in NOT_IN_A_VARIANT:
                problems.append(
                    f"`--set {text}`: {key} is the same for all variants. Set it in the file of "
                    "`--hparams`, or with `--seeds`."
                )
        variants[name] = changes
    if not names and not set_:
        problems.append("`--variants` names none. Name one, or `--set` one.")
    return variants


def sample(requests, data, n, seed, half):
    """The requests that a seed draws, and those among them that are measured.

    Both are in the file's order. Edits come from the asked half, or from the whole file where that
    is not enough; what is measured is of the asked half.
    """
    middle = len(requests) // 2
    own = range(middle) if half == "choose" else range(middle, len(requests))
    among = own if n <= len(own) else range(len(requests))
    drawn = sorted(random.Random(seed).sample(among, n))
    measured = [requests[i] for i in drawn if i in own]
    if not measured:
        raise DataError(
            f"`--half {half}`: none of the {n} edits that seed {seed} draws from {data} is in that "
            f"half; it has {len(requests)} edits. Give a larger file."
        )
    return [requests[i] for i in drawn], measured


def make_runs(options, found=lambda bench, hparams: bench.run(hparams)):
    """Makes the runs that are not there yet, one line each.

    Args:
        options: What `arguments` returns.
        found: What a run's line says of it, of a `Bench` and hyper-parameters.
    """
    plan = planned(options)
    folder = prepare_folder(options.output)
    report.drop_torn_line_(folder)
    refuse_other_runs(folder, plan)
    open_runs = [run for run in plan.runs if not is_there(folder, plan, run)]
    if not open_runs:
        return
    versions = {package: version_of(package) for package in PACKAGES}
    versions |= {"python": platform.python_version()}
    model, bench, of = None, None, None
    for run in tqdm(open_runs, desc="runs", unit="run"):
        data, n, seed, variant = run
        if is_there(folder, plan, run):  # by now: another process may work on the same folder
            continue
        edits, measured = sample(plan.files[data], data, n, seed, options.half)
        if variant in peers.METHODS:
            values = plan.base | {"seed": seed}
            figures = peers.run_apart(variant, values, edits, measured, options.stats_dir)
            report.append(folder, {**plan.line(*run), "versions": versions, **figures})
            continue
        hparams = plan.hparams(variant, seed)
        if model is None:
            model, tokenizer = load_model(hparams)
            own = {"dtype": str(model.dtype), "device": str(model.device)}
        if of != run[:3]:
            bench = Bench(model, tokenizer, edits, measured, hparams, options.measure)
            of = run[:3]
        figures = found(bench, hparams)
        report.append(folder, {**plan.line(*run), "versions": versions | own, **figures})


def is_there(folder, plan, run):
    """Whether a run's line has been written."""
    line = plan.line(*run)
    keys = ("data", "half", "n", "seed", "variant")
    return any(all(old[key] == line[key] for key in keys) for old in report.runs_in(folder))


def refuse_other_runs(folder, plan):
    """Refuses a folder whose runs are of another model, other hparams or other data."""
    differences = {}  # as keys: many runs differ in the same
    for old in report.runs_in(folder):
        data, variant = old["data"], old["variant"]
        now = {
            "model": plan.about["model"],
            "hparams": plan.about["hparams"],
            "measure": plan.about["measure"],
            f"changes of {variant}": plan.variants.get(variant, old["changes"]),
            f"data_sha256 of {data}": plan.hashes.get(data, old["data_sha256"]),
        }
        found = {key: old.get(key.partition(" ")[0]) for key in now}
        differences |= dict.fromkeys(differences_of(now, found))
    title = f"`--output {folder}` has runs of something else. Choose another folder."
    refuse_differences(list(differences), title, DataError)


if __name__ == "__main__":
    main()
