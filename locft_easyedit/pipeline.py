"""A whole run without EasyEdit: measure, edit, measure again, and write what there is to see."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .delta.checkpoint import read_checkpoint
from .delta.delta import Delta
from .delta.file import save_delta
from .delta.folder import apply_to_folder
from .editing import EditSession
from .errors import ModelError, OutputError
from .evaluate.choices import HowToRun
from .evaluate.compact import CompactRecords
from .evaluate.evaluation import PairedMetrics, shared_evaluation
from .evaluate.shared import SharedMeasurement
from .evaluate.summary import summarize
from .files import new_folder, output_errors
from .hparams import LocFTBFHyperParams
from .identity import digest
from .report import prepare_folder, write_json, write_loss_curve
from .result import EditResult
from .sharding import sharded_layers

logger = logging.getLogger(__name__)

SAVE = ("matrices", "model", "none")


@dataclass
class Run:
    """The outcome of a run.

    Attributes:
        metrics: A dictionary for each request, with `pre` and `post`; made anew at every look.
        result: What the edit did.
        seconds: Seconds by phase.
    """

    metrics: Sequence[Mapping[str, Any]]
    result: EditResult
    seconds: dict[str, float]


class Stopwatch:
    """Collects the seconds of named phases; a phase ends where the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Counts the time since the last lap to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def edit_and_measure(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = True,
) -> Run:
    """Edits `model` in place with all `requests`; measures before, and after all are in.

    Several processes of a launcher share the work; each returns the whole run.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        requests: EasyEdit's request dictionaries.
        hparams: The hyper-parameters.
        progress: Show progress bars.

    Raises:
        LocFTError: The requests, the place or the model cannot be used; nothing was changed.
    """
    watch = Stopwatch()

    with EditSession(model, tokenizer, requests, hparams, progress=progress) as session:
        watch.lap("checks and frozen prefix")
        how = HowToRun.of_session(session, progress=session.progress)
        evaluation = shared_evaluation(session.world, model, tokenizer, requests, how)
        before = _before(evaluation, requests, session)
        watch.lap("metrics before")
        result = session.train_()
        watch.lap("training")
        after = CompactRecords(evaluation.stream("after"))
        watch.lap("metrics after")
    return Run(PairedMetrics(requests, before, after), result, watch.seconds)


def _before(
    evaluation: SharedMeasurement, requests: Sequence[Mapping[str, Any]], session: EditSession
) -> CompactRecords:
    """Returns the metrics before the edit; an interrupted run does not measure them twice."""
    if session.checkpoints is None:
        return CompactRecords(evaluation.stream("before"))
    path = session.checkpoints.path.with_name("before.jsonl")
    identity = session.checkpoints.identity.to_dict() | {"records": digest(requests)}
    records = session.world.broadcast_from_main(lambda: CompactRecords.read(path, identity))
    if records is not None:
        logger.info("%s has the metrics before the edit; they are not measured again.", path)
        return records
    records = CompactRecords(evaluation.stream("before"))
    try:
        if session.world.is_main_process:
            records.write(path, identity)
    except OutputError as error:
        logger.warning("The metrics before the edit are kept in memory alone: %s", error)
    return records


def check_save(save: str, model: Any, hparams: LocFTBFHyperParams) -> None:
    """Checks, before anything runs, that `write_run` can save as it is asked to.

    Args:
        save: `matrices`, `model` or `none`.
        model: The model, loaded.
        hparams: What it was loaded with.

    Raises:
        ModelError: The whole model cannot be saved.
    """
    if save != "model" or sharded_layers(model) is None:
        return
    try:
        read_checkpoint(hparams.model_name)
    except ModelError as error:
        raise ModelError(
            "`save=model`: no process holds the whole model (`shard_frozen`), so that it is "
            f"written from the folder that it came from: {error} Or use `save=matrices`."
        ) from error


def write_run(
    folder: str | Path,
    run: Run,
    hparams: LocFTBFHyperParams,
    *,
    save: str = "matrices",
    model: Any = None,
    tokenizer: Any = None,
) -> dict[str, Path]:
    """Writes a run's files into `folder`; returns what is where.

    `metrics.json` (summary, training and every record), `hparams.json` (the resolved
    hyper-parameters), `loss.png`, and as `save` asks `edit.safetensors` (see `Delta`) or the
    whole model in `model/`.

    Args:
        folder: Made if need be.
        run: The outcome.
        hparams: The hyper-parameters it was made with; a place and a rate that were chosen are put
            in.
        save: `matrices`, `model` or `none`.
        model: The edited model; needed unless `save="none"`.
        tokenizer: For `save="model"`.

    Raises:
        OutputError: The folder or a file in it cannot be written to.
    """
    if run.result.choice is not None:
        hparams = run.result.choice.applied(hparams)
    path = prepare_folder(folder)
    written = {"metrics": path / "metrics.json", "hyper-parameters": path / "hparams.json"}
    summary = summarize(run.metrics)
    write_json(
        written["metrics"],
        {
            "summary": summary,
            "training": run.result.summary(),
            "seconds": run.seconds,
            "records": run.metrics,
        },
    )
    write_json(written["hyper-parameters"], hparams.to_dict())
    written["loss curve"] = path / "loss.png"
    write_loss_curve(written["loss curve"], run.result.losses, hparams.epoch_loss_threshold)
    if save == "matrices":
        written["edit"] = path / "edit.safetensors"
        save_delta(written["edit"], Delta.of(run.result, model, hparams, metrics=summary))
    elif save == "model":
        written["edited model"] = path / "model"
        with output_errors(written["edited model"]):
            if written["edited model"].exists():
                shutil.rmtree(written["edited model"])  # of a run that was killed before its end
            if sharded_layers(model) is not None:
                # No process has all of it; what is frozen is in the folder that it came from.
                edit = Delta.of(run.result, model, hparams, metrics=summary)
                apply_to_folder(
                    [edit],
                    hparams.model_name,
                    written["edited model"],
                    trust_remote_code=hparams.trust_remote_code,
                )
            else:
                with new_folder(written["edited model"]) as folder_of_model:
                    model.save_pretrained(folder_of_model)
                    tokenizer.save_pretrained(folder_of_model)
    return written
