"""`locft demo`: 100 facts into SmolLM2-135M through EasyEdit, with all there is to see."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data import read_requests
from ..evaluate.choices import HowToRun
from ..evaluate.generated import Generated, finish_generated_
from ..evaluate.summary import summarize
from ..hparams import LocFTBFHyperParams
from ..hparams_files import hparams_folder
from ..pipeline import Run, Stopwatch, write_run
from ..report import answers_table, health_table, metrics_table, prepare_folder, seconds_table, show
from .model import prepare_smollm2

FACTS = Path(__file__).resolve().parent / "demo_counterfact.json"
_N_SHOWN = 6


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    watch = Stopwatch()

    hparams = LocFTBFHyperParams.from_hparams(hparams_folder() / "smollm2-135m.yaml")
    hparams.model_name = str(prepare_smollm2(options.model or hparams.model_name))
    requests = read_requests(FACTS, options.n)
    output = prepare_folder(options.output)
    watch.lap("demo model")

    from ..easyedit import register  # EasyEdit takes seconds to import

    easyedit = register()
    kind = "the PyPI release" if easyedit.is_release else "the current source"
    sys.stdout.write(f"EasyEdit: {kind}, from {easyedit.home}\n")
    watch.lap("importing EasyEdit")

    editor = easyedit.BaseEditor.from_hparams(hparams)
    watch.lap("loading the model")

    how = HowToRun(hparams.eval_batch_size, hparams.row_tokens, progress=True)
    generated = Generated(editor.model, editor.tok, requests, how)
    before = generated.measure("answers before")
    watch.lap("generated metrics")
    metrics, model, _ = editor.edit_requests(requests, sequential_edit=True)
    watch.lap("editing and EasyEdit's metrics")
    after = generated.measure("answers after")
    watch.lap("generated metrics")
    for entry, pre, post in zip(metrics, before, after, strict=True):
        finish_generated_(pre, post)
        entry["pre"]["generated"], entry["post"]["generated"] = pre, post

    run = Run(metrics, editor.last_result, watch.seconds)
    written = write_run(output, run, hparams, save=options.save, model=model, tokenizer=editor.tok)
    watch.lap("writing results")
    rows = [
        (r["prompt"], r["target_new"], str(pre["answer"]), str(post["answer"]))
        for r, pre, post in zip(requests[:_N_SHOWN], before, after, strict=False)
    ]
    health = editor.last_result.health
    show(
        answers_table(rows),
        metrics_table(summarize(metrics)),
        *([] if health is None else [health_table(health)]),
        seconds_table(watch.seconds, within=editor.last_result.timings),
    )
    for what, path in written.items():
        sys.stdout.write(f"{what}: {path}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locft demo",
        description="Edits counterfactual facts into SmolLM2-135M-Instruct through EasyEdit.",
    )
    parser.add_argument("--n", type=int, default=100, help="facts to edit (default: 100)")
    parser.add_argument("--output", default="outputs/demo", help="where results go")
    parser.add_argument("--model", help="the model's folder (default: as in the YAML)")
    parser.add_argument(
        "--save", default="matrices", choices=("matrices", "model", "none"), help="what is saved"
    )
    return parser
