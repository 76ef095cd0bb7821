"""Sizes of a confined change (`preserve`), read from modules on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..change import owner
from ..key_moments import input_width
from ..preserve.confined import check_confinable
from ..preserve.sources import kind_of
from .parts import normed_after


@dataclass(frozen=True)
class ConfinedShapes:
    """A confined change A S of the trained matrices, counted in numbers.

    Attributes:
        preserve: What is preserved, as it is named.
        kinds: What kind of source each is.
        inputs: Width of what each matrix is given, by its parameter's name: S is a square of it.
        sizes: Numbers of each matrix, and so of A.
        folds: Whether a prefix that ends at the matrix holds what does not change: W x and S x.
    """

    preserve: tuple[str, ...]
    kinds: tuple[str, ...]
    inputs: dict[str, int]
    sizes: dict[str, int]
    folds: bool

    @property
    def squares(self) -> int:
        """Numbers of all S."""
        return sum(width**2 for width in self.inputs.values())

    def of(self, names: Iterable[str]) -> int:
        """Returns the numbers of A and S for some of the matrices."""
        return sum(self.sizes[name] + self.inputs[name] ** 2 for name in names)


def confined_shapes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    layer: nn.Module,
    preserve: Sequence[str],
) -> ConfinedShapes:
    """Returns the sizes of a confined change at a place. No file is read.

    Args:
        model: The model; its weights need not be loaded.
        parameters: The place's parameters by name.
        layer: The lowest trained layer.
        preserve: What is preserved.

    Raises:
        PlaceError: Parameters are no matrices of linear layers.
        DataError: Something in `preserve` is no source.
    """
    check_confinable(model, parameters)
    return ConfinedShapes(
        preserve=tuple(preserve),
        kinds=tuple(map(kind_of, preserve)),
        inputs={name: input_width(owner(model, name)) for name in parameters},
        sizes={name: p.numel() for name, p in parameters.items()},
        folds=not normed_after(layer),
    )
