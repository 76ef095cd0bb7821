"""Putting edits into a model in memory, and taking them out again: bit for bit, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..weights import copies_of, exchanged, write_
from .delta import Delta
from .order import values_to_apply, values_to_revert
from .verify import ModelWeights


def apply_delta(model: nn.Module, delta: Delta) -> None:
    """Puts an edit into a model, in place.

    Args:
        model: The model that was edited, without the edit: same weights, same precision.
        delta: The edit.

    Raises:
        DeltaError: The model is another one, of another precision, has the edit already, or carries
            other edits than when this one was trained; nothing was changed.
    """
    apply_deltas(model, [delta])


def apply_deltas(model: nn.Module, deltas: Sequence[Delta]) -> None:
    """Puts edits that were trained one on top of the other into a model, in that order, in place.

    Raises:
        DeltaError: As `apply_delta`, for any of them; nothing was changed.
    """
    _write_all_(model, values_to_apply(deltas, ModelWeights(model)))


def check_fits(delta: Delta, model: nn.Module) -> None:
    """Checks that an edit can be put into a model; nothing is changed.

    Raises:
        DeltaError: As `apply_delta`.
    """
    values_to_apply([delta], ModelWeights(model))


def revert_delta(model: nn.Module, delta: Delta) -> None:
    """Takes an edit out of a model, in place: the model is what it was before, bit for bit.

    Raises:
        DeltaError: The edit is not in the model or not the last one in it, or was saved without
            the values that it replaced (see `Delta.with_originals`); nothing was changed.
    """
    revert_deltas(model, [delta])


def revert_deltas(model: nn.Module, deltas: Sequence[Delta]) -> None:
    """Takes edits out of a model, in place; the one that was applied last comes first.

    Raises:
        DeltaError: As `revert_delta`, for any of them; nothing was changed.
    """
    _write_all_(model, values_to_revert(deltas, ModelWeights(model)))


@contextmanager
def applied(model: nn.Module, delta: Delta) -> Iterator[None]:
    """Within, `model` has the edit; afterwards it is as it was.

    Raises:
        DeltaError: As `apply_delta`; nothing was changed.
    """
    with exchanged(model, values_to_apply([delta], ModelWeights(model))):
        yield


def _write_all_(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Writes all values; if anything fails, or Ctrl-C interrupts, the model is as it was."""
    parameters = dict(model.named_parameters())
    held = copies_of({name: parameters[name] for name in values})
    try:
        write_(parameters, values)
    except BaseException:
        write_(parameters, held)
        raise
