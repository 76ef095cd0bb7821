"""The smallest rank that keeps what an edit taught: measured, not guessed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..devices import context_length
from ..errors import HyperParamsError
from ..evaluate.choices import HowToRun
from ..evaluate.generated import Generated
from ..modes import evaluation_mode
from ..place import Place, find_layers, first_layer_of
from ..requests import distinct_edits
from ..shortcuts import find_shortcuts
from ..tokens import tokenize_edits
from ..weights import exchanged
from .apply import check_fits
from .delta import Delta, requests_hash
from .low_rank import LowRankChange

logger = logging.getLogger(__name__)

_ROUNDING = 1e-9  # 0.04 - 0.03 is a little more than 0.01
_QUESTION = ("prompt", "target_new", "target_aliases")


@dataclass(frozen=True)
class RankFigure:
    """What one rank keeps.

    Attributes:
        rank: The rank.
        reliability: Share of the edits whose generated answer is the target.
        error: ||change - B A|| / ||change||.
        n_bytes: What the factors take on the disk.
    """

    rank: int
    reliability: float
    error: float
    n_bytes: int


@dataclass
class RankSearch:
    """What was measured on the way to the smallest rank.

    Attributes:
        full: Reliability of the whole edit.
        margin: How far below that a rank may stay.
        n_edits: How many edits were asked for.
        figures: The ranks that were measured, in order.
        chosen: The smallest rank within the margin.
    """

    full: float
    margin: float
    n_edits: int
    figures: list[RankFigure] = field(default_factory=list)
    chosen: int = 0

    @property
    def needed(self) -> float:
        """The reliability that a rank must reach."""
        return self.full - self.margin - _ROUNDING


class RankMeter:
    """Measures the generated reliability of an edit at any rank, in place, on its base model.

    Args:
        model: The model without the edit; it is so again after every measurement.
        tokenizer: Its tokenizer.
        delta: The edit, with the values that it replaced.
        requests: The requests that were trained, or some of them.
        transposed: Names of matrices that are stored as [in, out].
        batch_size: Prompts together.
        progress: Show progress bars.

    Raises:
        DeltaError: The edit does not fit the model, or has no low rank.
        RequestError: The requests cannot be evaluated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        delta: Delta,
        requests: Sequence[Mapping[str, Any]],
        *,
        transposed: Collection[str] = (),
        batch_size: int = 64,
        progress: bool = True,
    ) -> None:
        check_fits(delta, model)
        self.model = model
        self.delta = delta
        self.progress = progress
        # Only what was trained is asked: no rewordings, no neighbours.
        self.questions = [{k: r[k] for k in _QUESTION if k in r} for r in requests]
        _warn_of_others(delta, requests)
        self.change = LowRankChange(delta, transposed, next(model.parameters()).device)
        with torch.no_grad(), evaluation_mode(model):
            how = _how_to_run(model, tokenizer, delta, self.questions, batch_size)
            self._generated = Generated(model, tokenizer, self.questions, how)

    def reliability(self, values: Mapping[str, torch.Tensor]) -> float:
        """Returns the share of right answers while the model's matrices hold `values`."""
        with exchanged(self.model, values):
            measured = self._generated.measure("")
        return float(np.mean([entry["reliability"] for entry in measured]))

    def full(self) -> float:
        """Returns the share of right answers with the whole edit."""
        return self.reliability(self.delta.new)

    def at(self, rank: int) -> RankFigure:
        """Returns what one rank keeps."""
        factors = self.change.factors(rank)
        n_bytes = sum(4 * (a.numel() + b.numel()) for a, b in factors.values())
        reliability = self.reliability(self.change.values(rank))
        return RankFigure(rank, reliability, self.change.error(rank), n_bytes)


def smallest_rank(meter: RankMeter, margin: float = 0.01) -> RankSearch:
    """Returns the smallest rank whose reliability is within `margin` of the whole edit's.

    Ranks are doubled until one is, and then halved between: reliability is taken to rise with the
    rank, which it does but for a few answers. What was measured is in the result.

    Raises:
        HyperParamsError: `margin` is no share.
    """
    if not 0 <= margin < 1:
        raise HyperParamsError(f"`margin={margin}` must be 0 or more, and below 1.")
    search = RankSearch(meter.full(), margin, len(meter.questions))
    found: dict[int, RankFigure] = {}
    with tqdm(desc="ranks", unit=" rank", disable=not meter.progress) as bar:

        def enough(rank: int) -> bool:
            found[rank] = meter.at(rank)
            bar.update()
            bar.set_postfix(rank=rank, reliability=f"{found[rank].reliability:.3f}")
            return found[rank].reliability >= search.needed

        most = meter.change.full_rank
        below, rank = 0, 1
        while not enough(rank) and rank < most:
            below, rank = rank, min(2 * rank, most)
        while rank - below > 1:
            middle = (below + rank) // 2
            if enough(middle):
                rank = middle
            else:
                below = middle
    search.figures = [found[key] for key in sorted(found)]
    search.chosen = rank
    if found[rank].reliability < search.needed:
        logger.warning(
            "No rank reaches a reliability of %.3f; %d, the largest there is, has %.3f.",
            search.needed,
            rank,
            found[rank].reliability,
        )
    return search


def _how_to_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    delta: Delta,
    questions: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> HowToRun:
    """Returns the fastest way that leaves answers as they are: the frozen layers run only once."""
    stack = find_layers(model)
    parameters = dict(model.named_parameters())
    place = Place({n: parameters[n] for n in delta.new}, first_layer_of(delta.new, stack), stack)
    edits = distinct_edits(questions, None).edits
    texts = tokenize_edits(tokenizer, edits, append_eos=False, max_positions=context_length(model))
    found = find_shortcuts(model, texts, place)
    cut = min(found.cuts, key=lambda cut: cut.width, default=None)
    return HowToRun(batch_size, packed=found.packed, frozen=cut, tail=found.tail)


def _warn_of_others(delta: Delta, requests: Sequence[Mapping[str, Any]]) -> None:
    edits = distinct_edits(requests, None).edits
    if requests_hash([(e.prompt, e.target) for e in edits]) != delta.about["requests"]:
        logger.warning(
            "These %d requests are not all and only those that edit %s was trained on (%d).",
            len(edits),
            delta.short_id,
            delta.about["requests"]["count"],
        )
