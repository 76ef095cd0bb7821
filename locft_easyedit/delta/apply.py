"""Putting edits into a model in memory, and taking them out again: bit for bit, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..modeling.parameter_slices import parameters_named
from ..training.trained_weights import copies_of, write_
from .edited_matrices import EditedMatrices
from .verify import values_after
from .weights import ModelWeights


def apply_deltas_(model: nn.Module, deltas: Sequence[EditedMatrices]) -> None:
    """Puts edits that were trained one on top of the other into a model, in that order, in place.

    Raises:
        DeltaError: There is no edit, or one does not fit (see `Delta.apply_`); nothing was changed.
    """
    _write_all_(model, values_after(deltas, ModelWeights(model)))


def revert_deltas_(model: nn.Module, deltas: Sequence[EditedMatrices]) -> None:
    """Takes edits out of a model, in place; the one that was applied last comes first.

    Raises:
        DeltaError: There is no edit, or one does not come out (see `Delta.revert_`); nothing was
            changed.
    """
    _write_all_(model, values_after(deltas, ModelWeights(model), reverted=True))


def check_fits(delta: EditedMatrices, model: nn.Module) -> None:
    """Checks that an edit can be put into a model; nothing is changed.

    Raises:
        DeltaError: It cannot (see `Delta.apply_`).
    """
    values_after([delta], ModelWeights(model))


def _write_all_(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Writes all values; if anything fails, or Ctrl-C interrupts, the model is as it was."""
    parameters = parameters_named(model, values)
    held = copies_of(parameters)
    try:
        write_(parameters, values)
    except BaseException:
        write_(parameters, held)
        raise
