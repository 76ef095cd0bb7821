"""A model's parameters as an edit looks at them: their kinds, hashes, and samples of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..modeling.parameter_slices import (
    named_among,
    names_beside,
    slice_index,
    slices_joined,
    split_name,
    whole_name,
)
from ..utils.hashing import dtype_name, readable, sample_digest, tensor_sha256
from .metadata import DTYPES

Kind = tuple[str, tuple[int, ...]]


class Weights(ABC):
    """A model's parameters as an edit looks at them; edits can be put on top of what is there.

    Of a fused parameter, NAME, one expert's slice is named NAME[INDEX].

    Args:
        label: The model, for messages.
        names: The names of all its parameters.
    """

    def __init__(self, label: str, names: Iterable[str]) -> None:
        self.label = label
        self.names = frozenset(names)
        self._put: dict[str, torch.Tensor] = {}
        self._digests: dict[str, str] = {}
        self._samples: dict[str, set[str]] = {}

    def kind(self, name: str) -> Kind | str:
        """Returns a parameter's dtype and shape, or a text that says why it cannot be read."""
        if name in self.names:
            return self._kind(name)
        whole, expert = split_name(name)
        if whole not in self.names or expert is None:
            return "it is not in the model"
        kind = self._kind(whole)
        if isinstance(kind, str):
            return kind
        if slice_index(expert, kind[1]) is None:
            return f"it is not in the model, whose `{whole}` is {list(kind[1])}"
        return kind[0], kind[1][1:]

    @abstractmethod
    def _kind(self, name: str) -> Kind | str:
        """Returns what `kind` gives of a parameter that is no slice."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Returns the numbers of a parameter in the model."""

    @abstractmethod
    def _sample(self, name: str) -> set[str]: ...

    def names_beside(self, edited: Collection[str]) -> set[str]:
        """Returns what an edit of these parameters leaves alone (see `names_beside`)."""

        def n_experts(name: str) -> int:
            kind = self.kind(name)
            return 0 if isinstance(kind, str) else kind[1][0]

        return set(names_beside(self.names, edited, n_experts))

    def tensor_sha256(self, name: str) -> str:
        """Returns the hash of all of a parameter."""
        if name not in self._digests:
            self._digests[name] = tensor_sha256(self._present(name))
        return self._digests[name]

    def samples(self, name: str) -> set[str]:
        """Returns the hashes that a sample of a parameter may have; empty if it cannot be read."""
        if name not in self._samples:
            changed = any(_overlap(name, other) for other in self._put)
            found = {sample_digest(self._present(name))} if changed else self._sample(name)
            self._samples[name] = found
        return self._samples[name]

    def put(self, values: Mapping[str, torch.Tensor], hashes: Mapping[str, str]) -> None:
        """Counts parameters as holding other values, whose hashes are known; changes no model."""
        for name in values:
            for known in (self._digests, self._samples):
                for other in [other for other in known if _overlap(name, other)]:
                    del known[other]
            for part in [other for other in self._put if whole_name(other) == name]:
                del self._put[part]
        self._put |= values
        self._digests |= hashes

    def _present(self, name: str) -> torch.Tensor:
        """Returns a parameter with what was put on top of it."""
        whole, expert = split_name(name)
        if name in self._put or name in self.names:
            tensor = self._put[name] if name in self._put else self.tensor(name)
        else:
            above = self._put.get(whole)
            tensor = self.tensor(name) if above is None else above[int(expert or 0)]
        parts = {n: v for n, v in self._put.items() if n != name and whole_name(n) == name}
        return slices_joined(parts, {name: tensor})[name] if parts else tensor


def _overlap(name: str, other: str) -> bool:
    """Returns whether two names share numbers: the same, or a fused parameter and its slice."""
    return name == other or whole_name(name) == other or whole_name(other) == name


class ModelWeights(Weights):
    """A model in memory.

    Args:
        model: The model.
        folder: Where it comes from, for messages.
    """

    def __init__(self, model: nn.Module, folder: str | Path | None = None) -> None:
        self.parameters = dict(model.named_parameters())
        label = type(model).__name__ if folder is None else f"`{folder}`"
        super().__init__(label, self.parameters)
        self._tied = tied_names(model)

    def _kind(self, name: str) -> Kind | str:
        parameter = self.parameters[name]
        if name in self._tied:
            return f"it is tied to `{self._tied[name]}`, which would change as well"
        if parameter.is_meta:
            return "it is not loaded (meta device, or left on disk). Load it into memory"
        if dtype_name(parameter.dtype) not in DTYPES or not readable(parameter):
            return f"it is quantized ({dtype_name(parameter.dtype)}). Load it unquantized"
        return dtype_name(parameter.dtype), tuple(parameter.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a parameter."""
        return named_among(self.parameters, [name])[name]

    def _sample(self, name: str) -> set[str]:
        parameter = self.tensor(name)
        return {sample_digest(parameter)} if readable(parameter) else set()


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns parameters that have another name as well, by their first name, which counts."""
    own = {id(p): name for name, p in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    return {own[id(p)]: name for name, p in everywhere if name != own[id(p)]}
