"""Whether an edit fits a model: is it in there, could it be put in, and if neither, why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from ..hashes import dtype_name, readable, sample_digest, tensor_sha256
from .about import DTYPES, problems_of
from .delta import Delta, tensor_problems

# Other edits change a few parameters; of another model nearly all differ.
_FEW = 0.2
_PATIENCE = 2  # seconds before a progress bar shows


class Weights(Protocol):
    """A model's parameters, in memory or on disk, as an edit looks at them."""

    label: str

    def names(self) -> Iterable[str]:
        """Returns the names of all parameters."""

    def kind(self, name: str) -> tuple[str, tuple[int, ...]] | str:
        """Returns a parameter's dtype and shape, or a text that says why it cannot be read."""

    def digest(self, name: str) -> str:
        """Returns the hash of all of a parameter."""

    def samples(self, name: str) -> set[str]:
        """Returns the hashes that a sample of a parameter may have; empty if it cannot be read."""


@dataclass
class Report:
    """What `verify_delta` found.

    Attributes:
        id: The edit.
        model: What it was compared with.
        fits_base: The edit can be applied: everything is as it was before it.
        fits_applied: The edit is in, and nothing else has changed: it can be reverted.
        differences: A line for each thing that is neither.
        unchecked: Parameters that could not be compared: left on disk, or quantized.
    """

    id: str
    model: str
    fits_base: bool
    fits_applied: bool
    differences: list[str] = field(default_factory=list)
    unchecked: int = 0

    @property
    def state(self) -> str:
        """`base`, `applied` or `neither`; without a model `whole` or `damaged`."""
        if not self.model:
            return "damaged" if self.differences else "whole"
        return "applied" if self.fits_applied else "base" if self.fits_base else "neither"


def verify_delta(delta: Delta, model: nn.Module | None = None) -> Report:
    """Returns whether an edit is whole, and how a model stands to it; nothing is changed.

    The edited matrices are compared number by number; of every other parameter 1,024 evenly strided
    numbers are. That tells another base model and other edits, before this one or after it, but
    not a change of a few single numbers.

    Args:
        delta: The edit.
        model: A model; without one the edit itself is checked.
    """
    if model is None:
        problems = problems_of(delta.about) or tensor_problems(delta)
        return Report(delta.id, "", False, False, problems)
    return compare(delta, ModelWeights(model))


def compare(delta: Delta, weights: Weights) -> Report:
    """Returns how a model stands to an edit; see `verify_delta`."""
    found: dict[str, set[str]] = {}
    differences, other_precision = [], set()
    names = set(weights.names())
    for name, described in delta.matrices.items():
        kind = weights.kind(name) if name in names else "it is not in the model"
        if isinstance(kind, str):
            differences.append(f"`{name}`: {kind}.")
        elif list(kind[1]) != described["shape"]:
            differences.append(
                f"`{name}` is {list(kind[1])} there and {described['shape']} in the edit: the base "
                "is another model."
            )
        elif kind[0] != described["dtype"]:
            other_precision.add((kind[0], described["dtype"]))
        else:
            present = weights.digest(name)
            found[name] = {k for k in ("new", "original") if described[k] == present}
    for there, ours in sorted(other_precision):
        differences.append(
            f"The model is of another precision: {there}; the edit was made in {ours}. Load the "
            f"model with dtype={ours}."
        )
    if differences:
        return Report(delta.id, weights.label, False, False, differences)
    others, unchecked = _other_parameters(delta, weights, names)
    differences = [*_of_matrices(found), *others]
    return Report(
        delta.id,
        weights.label,
        not others and all("original" in kinds for kinds in found.values()),
        not others and all("new" in kinds for kinds in found.values()),
        differences,
        unchecked,
    )


def _of_matrices(found: Mapping[str, set[str]]) -> list[str]:
    strange = [name for name, kinds in found.items() if not kinds]
    if strange:
        return [
            f"{_some(strange)}: neither the values before the edit nor those after it. Another "
            "edit is in there, or the base is another model."
        ]
    for kind in ("new", "original"):
        if all(kind in kinds for kinds in found.values()):
            return []
    edited = [name for name, kinds in found.items() if "new" in kinds]
    return [f"{_some(edited)}: the edited values; the edit's other matrices hold those before it."]


def _other_parameters(delta: Delta, weights: Weights, names: set[str]) -> tuple[list[str], int]:
    """Returns lines on the parameters that the edit leaves alone, and how many went unseen."""
    frozen = delta.about["frozen"]
    lacking = sorted(set(frozen) - names)
    added = sorted(names - set(frozen) - set(delta.matrices))
    lines = []
    if lacking:
        lines.append(f"{_some(lacking)}: not in the model. The base is another one.")
    if added:
        lines.append(f"{_some(added)}: not in the model that was edited. The base is another one.")
    present = [name for name in frozen if name in names]
    bar = tqdm(present, desc="comparing parameters", delay=_PATIENCE, leave=False)
    samples = {name: weights.samples(name) for name in bar}
    unchecked = [n for n, found in samples.items() if frozen[n] is None or not found]
    checked = [name for name in samples if name not in set(unchecked)]
    changed = [name for name in checked if frozen[name] not in samples[name]]
    if changed:
        one = len(changed) <= max(1, _FEW * len(checked))
        reason = (
            "An edit is missing there, or lies in between or on top"
            if one
            else "The base is another model, or of another precision"
        )
        lines.append(
            f"{_some(changed)}: {len(changed)} of {len(checked)} other parameters are not as in "
            f"the model that was edited. {reason}."
        )
    return lines, len(unchecked)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


class ModelWeights:
    """A model in memory.

    Args:
        model: The model.
        folder: Where it comes from, for messages.
    """

    def __init__(self, model: nn.Module, folder: str | Path | None = None) -> None:
        self.label = type(model).__name__ if folder is None else f"`{folder}`"
        self.parameters = dict(model.named_parameters())
        self._tied = tied_names(model)

    def names(self) -> Iterable[str]:
        """Returns the names of all parameters."""
        return self.parameters

    def kind(self, name: str) -> tuple[str, tuple[int, ...]] | str:
        """Returns a parameter's dtype and shape, or why it cannot be read."""
        parameter = self.parameters[name]
        if name in self._tied:
            return f"it is tied to `{self._tied[name]}`, which would change as well"
        if parameter.is_meta:
            return "it is not loaded (meta device, or left on disk). Load it into memory"
        if dtype_name(parameter.dtype) not in DTYPES or not readable(parameter):
            return f"it is quantized ({dtype_name(parameter.dtype)}). Load it unquantized"
        return dtype_name(parameter.dtype), tuple(parameter.shape)

    def digest(self, name: str) -> str:
        """Returns the hash of all of a parameter."""
        return tensor_sha256(self.parameters[name])

    def samples(self, name: str) -> set[str]:
        """Returns the hash of a parameter's sample."""
        return sample_hashes(self.parameters[name])


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns parameters that have another name as well, by their first name, which counts."""
    own = {id(p): name for name, p in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return {own[id(p)]: name for name, p in everywhere if name != own[id(p)]}


def sample_hashes(tensor: torch.Tensor) -> set[str]:
    """Returns the hash of a tensor's sample, none if it cannot be read."""
    return {sample_digest(tensor)} if readable(tensor) else set()
