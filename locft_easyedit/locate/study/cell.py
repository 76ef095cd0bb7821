"""One cell of a study after the other, on one model: edit, measure, put the weights back."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.requests import distinct_edits
from ...distributed.world import SINGLE_PROCESS
from ...errors import LocFTError, ModelError, NonFiniteLossError
from ...evaluation.evaluation import PLAIN_METRICS, Evaluation, PairedMetrics
from ...evaluation.predictions import ArgmaxPredictor, EvalConfig
from ...evaluation.prompts import Metrics
from ...evaluation.summary import summarize
from ...hparams import LocFTBFHyperParams
from ...modeling.locations import Location
from ...prefix.shared_states import SharedStates
from ...prefix.shortcuts import can_pack
from ...prefix.store import Budget
from ...training.choice import Cell
from ...training.health import health_texts
from ...training.session import EditSession
from ...utils.memory import is_out_of_memory
from ..held_out import HeldOut
from ..score import Drift, score
from .study_outcome import DIVERGED, FAILED, OUT_OF_MEMORY, CellOutcome

logger = logging.getLogger(__name__)

# Figures of a study that a summary has: of generated answers, and EasyEdit's.
_GENERATED = ("reliability", "generalization", "locality", "portability")
_TEACHER_FORCED = ("rewrite_acc", "rephrase_acc")


@dataclass
class Bench:
    """A model on which cells are tried; its weights are the same after each.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        requests: EasyEdit's request dictionaries.
        hparams: What all cells have in common; place and rate are replaced.
        before: Each record's metrics before an edit (see `measure_before`).
        layers: The layers of all places: what enters them is recorded once.
        passages: The unrelated text; the fixed one of the health check if `None`.
        capability: Measures what else the model can do, 0 to 1; `None` leaves it out.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    requests: Sequence[Mapping[str, Any]]
    hparams: LocFTBFHyperParams
    before: Sequence[Metrics]
    layers: Collection[int] = ()
    passages: Sequence[str] | None = None
    capability: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        h = self.hparams
        edits = distinct_edits(self.requests, h.on_conflict).edits
        self._held_out = HeldOut(self.model, self.tokenizer, edits, append_eos=h.append_eos)
        texts, why_not = health_texts(self.model, self.tokenizer, self.passages)
        if why_not:
            raise ModelError(
                f"The drift on unrelated text cannot be measured: {why_not}. Give another text."
            )
        packed = h.packing and can_pack(self.model, texts)
        self._drift = Drift(self.model, texts, packed=packed, row_tokens=h.row_tokens)
        tiers = h.prefix_gpu_gib, h.prefix_host_gib, h.prefix_disk_gib, h.prefix_dir
        self._states = SharedStates(self.model, self.layers, Budget(*tiers))

    def cells(
        self, location: Location, rates: Sequence[float], begin: Callable[[Cell], None]
    ) -> Iterator[CellOutcome]:
        """Tries one place with each rate; yields what each found, whatever goes wrong.

        The prefix is computed once for all rates. `begin` is told of each cell before anything is
        computed for it.
        """
        left = list(rates)
        begin(first := Cell(location, left[0]))
        h = replace(
            first.applied(self.hparams),
            checkpoint_dir=None,
            health_check=False,
            compile_layers=False,  # each place would compile anew
            repairs=0,  # a place is told by what its epochs learn
        )
        try:
            with EditSession(
                self.model,
                self.tokenizer,
                self.requests,
                h,
                progress=False,
                states=self._states,
                world=SINGLE_PROCESS,
            ) as one:
                how = EvalConfig.from_session(one, progress=False)
                evaluation = Evaluation(
                    self.model,
                    self.tokenizer,
                    self.requests,
                    how,
                    metrics=PLAIN_METRICS,
                    before=self.before,
                )
                asked = self._held_out.predictor(how)
                while left:
                    one.hparams = replace(h, lr=left[0])
                    outcome = self._guarded(Cell(location, left[0]), one, evaluation, asked)
                    left.pop(0)
                    yield outcome
                    if left:
                        begin(Cell(location, left[0]))
        except Exception as error:  # of the session itself: it stands for all its cells
            for rate in left:
                yield _failed(Cell(location, rate), error)

    def _guarded(
        self, cell: Cell, session: EditSession, evaluation: Evaluation, asked: ArgmaxPredictor
    ) -> CellOutcome:
        """Returns what a cell found; an error of any kind is the cell's, never the study's."""
        try:
            return self._cell(cell, session, evaluation, asked)
        except Exception as error:
            outcome = _failed(cell, error)
        # Outside the handler: the exception's frames hold the tensors that have to go.
        gc.collect()
        torch.cuda.empty_cache()
        return outcome

    def _cell(
        self, cell: Cell, session: EditSession, evaluation: Evaluation, asked: ArgmaxPredictor
    ) -> CellOutcome:
        start = time.perf_counter()
        result = session.train_()
        trained = time.perf_counter()
        try:
            figures = self._figures(evaluation, asked)
        finally:
            result.restore_(self.model)
        seconds = {"training": trained - start, "metrics": time.perf_counter() - trained}
        outcome = CellOutcome(
            cell,
            figures=figures,
            epochs=len(result.losses),
            converged=result.converged,
            seconds=seconds,
            parameters=sum(new.numel() for new in result.new.values()),
        )
        # NaN is no figure: a model whose logits are no numbers was trained to pieces.
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            reason = f"{', '.join(bad)} of the edited model: not finite"
            return replace(outcome, state=DIVERGED, reason=reason, figures={})
        return outcome

    def _figures(self, evaluation: Evaluation, asked: ArgmaxPredictor) -> dict[str, float]:
        after = evaluation.measure("after")
        found = summarize(PairedMetrics(self.requests, self.before, after))["post"]
        figures = figures_of(found)
        figures["reworded"] = self._held_out.measure(asked)
        figures["drift"] = self._drift.measure()
        figures["score"] = score(figures["reliability"], figures["reworded"], figures["drift"])
        if self.capability is not None:
            figures["capability"] = self.capability()
        return figures


def measure_before(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = False,
) -> list[Metrics]:
    """Returns each record's metrics before any edit, once for all cells."""
    how = EvalConfig(hparams.eval_batch_size, hparams.row_tokens, progress=progress)
    evaluation = Evaluation(model, tokenizer, requests, how, metrics=PLAIN_METRICS)
    return evaluation.measure("before")


def figures_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a study that a summary of metrics has (see `summarize`)."""
    figures: dict[str, float] = {}
    for means, names in ((summary.get("generated", {}), _GENERATED), (summary, _TEACHER_FORCED)):
        figures |= {name: float(means[name]) for name in names if means.get(name) is not None}
    locality = [
        float(value) for key, value in summary.get("locality", {}).items() if key.endswith("acc")
    ]
    if locality:
        figures["locality_acc"] = sum(locality) / len(locality)
    return figures


def _failed(cell: Cell, error: Exception) -> CellOutcome:
    """Returns the outcome of a cell that an error has ended."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, NonFiniteLossError):
        return CellOutcome(cell, DIVERGED, reason)
    if is_out_of_memory(error):
        return CellOutcome(cell, OUT_OF_MEMORY, reason[:300])
    if not isinstance(error, LocFTError):
        logger.exception("%s failed", cell.key)
        reason = f"{type(error).__name__}: {reason}"
    return CellOutcome(cell, FAILED, reason[:1000])
