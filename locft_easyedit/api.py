"""Editing a model, and a whole run: measure, edit, measure again, write what there is to see."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data.requests import distinct_edits
from .data.tokenization import tokenize_edits
from .delta.delta import Delta
from .delta.weights_folder import read_checkpoint
from .distributed.world import SINGLE_PROCESS, get_world
from .errors import ModelError, OutputError
from .evaluation.evaluation import (
    PairedMetrics,
    SharedMeasurement,
    shared_evaluation,
)
from .evaluation.metric_names import DEFAULT_METRICS, check_metrics
from .evaluation.predictions import EvalConfig
from .evaluation.records import CompactRecords
from .evaluation.report import write_loss_curve
from .evaluation.summary import summarize
from .hparams import LocFTBFHyperParams
from .hparams_rules import DEPTH_FIRST
from .locate.auto import choose_once
from .modeling.devices import context_length
from .modeling.fsdp import sharded_layers
from .training.choice import Choice
from .training.preserve.sources import read_sources
from .training.result import EditResult
from .training.session import EditSession
from .utils.files import new_folder, output_errors
from .utils.hashing import json_sha256
from .utils.output import prepare_folder, write_json
from .utils.timing import Stopwatch, timed

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


def edit_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = True,
) -> EditResult:
    """Edits a causal language model in place, with LocFT-BF.

    All requests are trained together. The model keeps its vocabulary, its training mode and its
    `requires_grad` flags. If anything fails, or Ctrl-C interrupts, its weights are as before.

    Args:
        model: A causal language model of transformers, loaded.
        tokenizer: Its tokenizer.
        requests: Dictionaries with `prompt` and `target_new` (see `make_requests`).
        hparams: The hyper-parameters; `model_name`, `device` and `dtype` play no part here.
        progress: Show progress bars.

    Raises:
        LocFTError: The requests, the place or the model cannot be used; nothing was changed.
        NonFiniteLossError: Training diverged; the weights are restored.
    """
    with open_session(model, tokenizer, requests, hparams, progress=progress) as session:
        return session.train_()


def open_session(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = True,
    alone: bool = False,
) -> EditSession:
    """Returns a session for these edits, at the place that `layers: auto` chooses where it is set.

    Args:
        model: A causal language model of transformers, loaded.
        tokenizer: Its tokenizer.
        requests: EasyEdit's request dictionaries.
        hparams: The hyper-parameters.
        progress: Show progress bars.
        alone: Requests will be trained one at a time (see `EditSession`).

    Raises:
        LocFTError: As for `choose_place_for`, where a place is to be chosen.
    """
    choice, timings = None, dict[str, float]()
    if hparams.chooses:
        with timed(timings, "place", model):
            choice = choose_place_for(
                model, tokenizer, requests, hparams, progress=progress, alone=alone
            )
        hparams = choice.applied(hparams)
    session = EditSession(
        model, tokenizer, requests, hparams, progress=progress, alone=alone, choice=choice
    )
    session.timings.update(timings)
    return session


def choose_place_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = True,
    alone: bool = False,
) -> Choice:
    """Returns the place that `layers: auto` means for these edits; the model is as before.

    Rank 0 chooses for all; a run that was interrupted finds its choice in `checkpoint_dir`.
    Arguments are those of `open_session`.

    Raises:
        LocFTError: The hyper-parameters or the requests cannot be used, or no place can be chosen
            (see `choose_place`).
    """
    world = SINGLE_PROCESS if alone else get_world()
    with world.sharing_errors():
        hparams.check()
        read_sources(hparams.preserved)
        edits = distinct_edits(requests, None if alone else hparams.on_conflict).edits
        texts = tokenize_edits(
            tokenizer,
            edits,
            append_eos=hparams.append_eos,
            max_positions=context_length(model),
        )
    return choose_once(
        model,
        tokenizer,
        edits,
        texts,
        hparams,
        None if alone else hparams.checkpoint_folder,
        world=world,
        progress=progress and world.is_main_process,
    )


def edit_and_measure(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    progress: bool = True,
) -> Run:
    """Edits `model` in place with all `requests`; measures before, and after all are in.

    Several processes of a launcher share the work; each returns the whole run.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        requests: EasyEdit's request dictionaries.
        hparams: The hyper-parameters.
        metrics: What is measured, as for `Evaluation`. `wrapped` (chat and other wrappers) takes
            several times as long as the other default metrics together.
        progress: Show progress bars.

    Raises:
        LocFTError: The requests, the metrics, the place or the model cannot be used; nothing was
            changed.
    """
    check_metrics(metrics)
    watch = Stopwatch()

    with open_session(model, tokenizer, requests, hparams, progress=progress) as session:
        watch.lap("checks and frozen prefix")
        how = EvalConfig.from_session(session, progress=session.progress)
        evaluation = shared_evaluation(
            session.world, model, tokenizer, requests, how, metrics=metrics
        )
        before = _before(evaluation, requests, session, metrics)
        watch.lap("metrics before")
        result = session.train_()
        watch.lap("training")
        after = CompactRecords(evaluation.stream("after"))
        watch.lap("metrics after")
    return Run(PairedMetrics(requests, before, after), result, watch.seconds)


def _before(
    evaluation: SharedMeasurement,
    requests: Sequence[Mapping[str, Any]],
    session: EditSession,
    metrics: Sequence[str],
) -> CompactRecords:
    """Returns the metrics before the edit; an interrupted run does not measure them twice."""
    if session.checkpoints is None:
        return CompactRecords(evaluation.stream("before"))
    path = session.checkpoints.path.with_name("before.jsonl")
    identity = session.checkpoints.identity.to_dict() | {
        "records": json_sha256(list(requests)),
        "metrics": list(metrics),
    }
    records = session.world.broadcast_from_main(lambda: CompactRecords.read(path, identity))
    if records is not None:
        logger.info("%s has the metrics before the edit; they are not measured again.", path)
        evaluation.keep()  # distributions are too large for the file
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
    threshold = 0.0 if hparams.pipeline == DEPTH_FIRST else hparams.epoch_loss_threshold
    write_loss_curve(written["loss curve"], run.result.losses, threshold)
    if save == "matrices":
        written["edit"] = path / "edit.safetensors"
        Delta.from_result(run.result, model, hparams, metrics=summary).save(written["edit"])
    elif save == "model":
        written["edited model"] = path / "model"
        with output_errors(written["edited model"]):
            if written["edited model"].exists():
                shutil.rmtree(written["edited model"])  # of a run that was killed before its end
            if sharded_layers(model) is not None:
                # No process has all of it; what is frozen is in the folder that it came from.
                edit = Delta.from_result(run.result, model, hparams, metrics=summary)
                edit.apply_to_folder(
                    hparams.model_name,
                    written["edited model"],
                    trust_remote_code=hparams.trust_remote_code,
                )
            else:
                with new_folder(written["edited model"]) as folder_of_model:
                    model.save_pretrained(folder_of_model)
                    tokenizer.save_pretrained(folder_of_model)
    return written
