"""Compares what `layers: auto` chooses with the best cell of a finished location study.

    python benchmarks/checks/auto.py STUDY [--module auto] [--lr auto]

STUDY is the output folder of `locft locate`: model, data, edits, epochs and batch size are the
study's. The choice is made on the same edits. The regret is what reliability and generalization
lose against the best cell: by score, which is what a study chooses, and by generalization. A chosen
place and rate that the study has no cell for is trained and measured here. The cost is the choice's
seconds (on a CPU those of CPU time) beside a tenth of a run of 3,000 edits at the chosen place: 750
steps of 100 edits, timed here. Besides, how the places are ranked by what the choice knows of them
before any trial (Spearman's rank correlation with the study's scores). Exit status 1 if it takes
more.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from locft_easyedit.api import edit_and_measure
from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.locate.auto import choose_place, promises_of
from locft_easyedit.locate.study.study import load_study
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.training.session import EditSession

FIGURES = ("reliability", "generalization")
RUN_EDITS, RUN_BATCH, TIMED_STEPS = 3000, 100, 3


def main():
    options = arguments()
    study = load_study(options.study)
    outcome = study.outcome()
    hparams = replace(
        study.settings.hparams,
        layers="auto",
        rewrite_module_tmp=options.module,
        lr=options.lr,
        health_check=False,
    )
    model, tokenizer = load_model(hparams)
    # On a CPU the time that this process got: other programs have no part in it.
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    requests = study.requests
    edits = distinct_edits(requests, None).edits
    start = clock()
    choice = choose_place(model, tokenizer, edits, hparams)
    seconds = clock() - start
    chosen = choice.applied(hparams)
    found, known = figures_of(choice.cell, outcome.measured), True
    if found is None:
        found, known = measured(model, tokenizer, requests, chosen), False
    promises = promises_of(model, tokenizer, edits, hparams)
    run = seconds_of_a_run(model, tokenizer, read_requests(study.settings.data), chosen, clock)
    report = {
        "model": outcome.model,
        "data": outcome.data,
        "chosen": choice.cell.key,
        "in the study": known,
        **{name: found[name] for name in FIGURES if name in found},
        **regrets(found, outcome.measured),
        "rank correlation of the promise": correlation(promises, outcome),
        "seconds": seconds,
        "a tenth of a run": run / 10,
        "share of a run": seconds / run,
        "choice": choice.to_dict(),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    return int(seconds > run / 10)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="the output folder of locft locate")
    parser.add_argument("--module", default="auto", help="rewrite_module_tmp, or auto")
    parser.add_argument("--lr", type=lambda text: text if text == "auto" else float(text),
                        default="auto")  # fmt: skip
    parser.add_argument("--output", type=Path, help="also write the report there")
    return parser.parse_args()


def correlation(promises, outcome):
    """Returns Spearman's rank correlation of promise and score, over the places of a study."""
    pairs = [
        (promises[one.cell.location], one.figures["score"])
        for one in outcome.best_rates()
        if promises.get(one.cell.location) is not None
    ]
    ranks = [np.argsort(np.argsort(column)) for column in zip(*pairs, strict=True)]
    return float(np.corrcoef(*ranks)[0, 1])


def place(outcome):
    location = outcome.cell.location
    return location.layer, location.templates


def figures_of(cell, outcomes):
    """Returns the figures of the study's cell of this place and rate, if there is one."""
    for one in outcomes:
        same = place(one) == (cell.location.layer, cell.location.templates)
        if same and abs(one.cell.lr / cell.lr - 1) < 1e-6:
            return one.figures
    return None


def measured(model, tokenizer, requests, hparams):
    """Returns the figures of a plain run, which are those of a cell; the model is as before."""
    done = edit_and_measure(model, tokenizer, requests, hparams)
    done.result.restore_(model)
    generated = summarize(done.metrics)["post"]["generated"]
    return {name: generated[name] for name in FIGURES if generated.get(name) is not None}


def regrets(found, cells):
    """Returns what the chosen cell loses against the best ones of the study."""
    result = {}
    for what in ("score", "generalization"):
        having = [one for one in cells if what in one.figures]
        if not having:
            continue
        best = max(having, key=lambda one: one.figures[what])
        result[f"best by {what}"] = best.cell.key
        for name in FIGURES:
            if name in best.figures and name in found:
                lost = best.figures[name] - found[name]
                result[f"{name} lost against the best by {what}"] = lost
    return result


def seconds_of_a_run(model, tokenizer, requests, hparams, clock):
    """Returns the seconds of 3,000 edits at this place, from a few steps of a hundred."""
    few = requests[:RUN_BATCH]
    h = replace(hparams, batch_size=RUN_BATCH, num_steps=TIMED_STEPS, batch_loss_threshold=0.0,
                epoch_loss_threshold=0.0)  # fmt: skip
    with EditSession(model, tokenizer, few, h, progress=False) as session:
        start = clock()
        session.train_().restore_(model)
        step = (clock() - start) / TIMED_STEPS
        n_batches = RUN_EDITS / len(session.edits.edits)
        return n_batches * hparams.num_steps * step


if __name__ == "__main__":
    sys.exit(main())
