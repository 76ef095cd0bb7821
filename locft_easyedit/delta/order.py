"""Edits one on top of the other: what each finds when its turn comes, first of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..errors import DeltaError, one_message
from .delta import Delta
from .verify import Report, Weights, compare, sample_hashes


def values_to_apply(deltas: Iterable[Delta], weights: Weights) -> dict[str, torch.Tensor]:
    """Returns what a model's parameters hold once edits are applied in order; all is checked.

    Raises:
        DeltaError: An edit does not fit what is there when its turn comes.
    """
    stacked, values = Stacked(weights), dict[str, torch.Tensor]()
    for delta in deltas:
        report = compare(delta, stacked)
        if not report.fits_base:
            raise _refusal(delta, report, "applied to", "applied")
        stacked.put(delta.new, {name: m["new"] for name, m in delta.matrices.items()})
        values |= delta.new
    return _some_values(values)


def values_to_revert(deltas: Iterable[Delta], weights: Weights) -> dict[str, torch.Tensor]:
    """Returns what a model's parameters hold once edits are undone in order, the last one first.

    Raises:
        DeltaError: An edit is not the last one when its turn comes, or lacks what it replaced.
    """
    stacked, values = Stacked(weights), dict[str, torch.Tensor]()
    for delta in deltas:
        report = compare(delta, stacked)
        if not report.fits_applied:
            raise _refusal(delta, report, "taken out of", "base")
        if not delta.original:
            raise DeltaError(
                f"Edit {delta.short_id} was saved without the values that it replaced. Take them "
                f"from its base ({delta.about['base_model']}) with `base=FOLDER`."
            )
        stacked.put(delta.original, {name: m["original"] for name, m in delta.matrices.items()})
        values |= delta.original
    return _some_values(values)


def _some_values(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not values:
        raise DeltaError("No edit was given. Give at least one.")
    return values


def _refusal(delta: Delta, report: Report, what: str, done: str) -> DeltaError:
    title = f"Edit {delta.short_id} cannot be {what} {report.model}:"
    if report.state == done:
        already = {
            "applied": "it is already applied.",
            "base": "it is not in there: the model is as before the edit.",
        }
        return DeltaError(f"{title} {already[done]}")
    lines = list(report.differences)
    if report.state == "neither" and done == "applied":
        lines.append("Give the model that the edit was trained on, or first apply what was in it.")
    elif report.state == "neither":
        lines.append("Edits come out in the opposite order: revert later ones first.")
    return DeltaError(one_message(title, lines))


class Stacked:
    """Weights as they will be once some of them are exchanged; nothing is changed yet.

    Args:
        under: What there is.
    """

    def __init__(self, under: Weights) -> None:
        self.label = under.label
        self._under = under
        self._samples: dict[str, set[str]] = {}
        self._digests: dict[str, str] = {}

    def put(self, values: Mapping[str, torch.Tensor], hashes: Mapping[str, str]) -> None:
        """Lets parameters hold other values, whose hashes are known."""
        self._digests |= hashes
        self._samples |= {name: sample_hashes(value) for name, value in values.items()}

    def names(self) -> Iterable[str]:
        """Returns the names of all parameters."""
        return self._under.names()

    def kind(self, name: str) -> tuple[str, tuple[int, ...]] | str:
        """Returns a parameter's dtype and shape, or why it cannot be read."""
        return self._under.kind(name)

    def digest(self, name: str) -> str:
        """Returns the hash of all of a parameter."""
        if name not in self._digests:
            self._digests[name] = self._under.digest(name)
        return self._digests[name]

    def samples(self, name: str) -> set[str]:
        """Returns the hashes that a sample of a parameter may have."""
        if name not in self._samples:
            self._samples[name] = self._under.samples(name)
        return self._samples[name]
