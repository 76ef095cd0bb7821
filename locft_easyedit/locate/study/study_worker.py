"""One process of a study: `python -m locft_easyedit.locate.study.study_worker FOLDER DEVICE`.

It takes the places that no other process is at, one after the other, until none is left. Any number
of such processes work on one folder, on this machine or on others that see it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...data.requests import distinct_edits
from ...errors import LocFTError
from ...evaluation.prompts import Metrics
from ...evaluation.records import CompactRecords
from ...hparams import LocFTBFHyperParams
from ...hparams_rules import AUTO
from ...modeling.loading import load_causal_lm, resolve_device
from ...modeling.locations import EXPERT
from ...utils.memory import is_out_of_memory
from ..auto import promises_of
from .cell import Bench, measure_before
from .study import Study, load_study
from .study_settings import ANY_DEVICE

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Works on the study whose folder is named; returns the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    folder, device = arguments
    try:
        work(load_study(Path(folder)), None if device == ANY_DEVICE else device)
    except LocFTError as error:
        # The last line of the log is what the user is told.
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 2
    return 0


def work(study: Study, device: int | str | None = None) -> None:
    """Tries all places that no other process is at, on this device or else the study's own.

    Raises:
        LocFTError: The model cannot be loaded or measured, or a result cannot be written.
    """
    bench: Bench | None = None
    while True:
        worked = False
        if bench is None and study.experts.missing:
            bench = _bench(study, device)
        for location in study.locations:
            if not study.open_rates(location):
                continue
            with study.held(f"layer-{location.layer:02d}-{location.module}", wait=False) as mine:
                rates = study.open_rates(location) if mine else []
                if not rates:
                    continue
                if bench is None:
                    bench = _bench(study, device)
                for outcome in bench.cells(location, rates, study.begin):
                    study.write(outcome)
                    logger.info("%s: %s", outcome.cell.key, outcome.reason or outcome.figures)
                    worked = True
        if not worked:
            return


def _bench(study: Study, device: int | str | None) -> Bench:
    """Returns the loaded model with all that its cells share."""
    h = study.settings.hparams
    h = h if device is None else replace(h, device=device)
    model, tokenizer = load_causal_lm(
        h.model_name,
        device=h.device,
        dtype=h.dtype_on(resolve_device(h.device)),
        model_parallel=h.model_parallel,
        trust_remote_code=h.trust_remote_code,
    )
    _find_experts(study, model, tokenizer, h)
    before = _before(study, model, tokenizer)

    def capability() -> float:
        from ...evaluation.capability.harness import measure_capability  # an extra

        asked = study.settings
        found = measure_capability(
            model,
            tokenizer,
            list(asked.capability),
            tasks_dir=asked.tasks_dir,
            limit=asked.capability_limit,
            progress=False,
        )
        return float("nan") if found["mean"] is None else float(found["mean"])

    measured = capability if study.settings.capability else None
    return Bench(
        model, tokenizer, study.requests, h, before, study.layers, study.passages, measured
    )


def _find_experts(study: Study, model: Any, tokenizer: Any, hparams: LocFTBFHyperParams) -> None:
    """Finds the most promising expert of each layer; other processes wait for the first one."""
    with study.held("experts"):
        if not study.experts.missing:
            return
        edits = distinct_edits(study.requests, hparams.on_conflict).edits
        h = replace(hparams, layers=AUTO, rewrite_module_tmp=AUTO)
        try:
            promises = promises_of(model, tokenizer, edits, h)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Single experts are left out: ranking them ran out of memory.")
            promises = {}
        study.experts.keep([one for one in promises if one.module in EXPERT.values()])


def _before(study: Study, model: Any, tokenizer: Any) -> list[Metrics]:
    """Returns the metrics before an edit: the first process measures, the others wait for it."""
    with study.held("before"):
        there = CompactRecords.read(study.before, study.identity)
        if there is None or len(there) != len(study.requests):
            records = measure_before(
                model, tokenizer, study.requests, study.settings.hparams, progress=True
            )
            there = CompactRecords(records)
            there.write(study.before, study.identity)
    return list(there)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
