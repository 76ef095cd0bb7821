"""Sizes of what is trained beside the matrices: LoRA, or a confined change (`preserve`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..change import owner
from ..key_moments import input_width
from ..lora import check_low_rank
from ..preserve.confined import check_confinable
from ..preserve.sources import kind_of
from .activations import layer_parts


@dataclass(frozen=True)
class LoraShapes:
    """LoRA of the trained matrices, counted in numbers.

    Attributes:
        rank: Its rank.
        trained: All matrices A and B.
        inputs: Widths of what the matrices are given, together.
        largest: The largest of the matrices.
    """

    rank: int
    trained: int
    inputs: int
    largest: int

    def of(self, matrices: Iterable[torch.Tensor]) -> int:
        """Returns the numbers of A and B for some of the matrices."""
        return sum(self.rank * sum(matrix.shape) for matrix in matrices)


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

    @property
    def largest_square(self) -> int:
        """Numbers of the largest S."""
        return max(self.inputs.values()) ** 2

    def of(self, names: Iterable[str]) -> int:
        """Returns the numbers of A and S for some of the matrices."""
        return sum(self.sizes[name] + self.inputs[name] ** 2 for name in names)


def lora_shapes(model: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int) -> LoraShapes:
    """Returns the sizes of LoRA of a place's parameters, by name.

    Raises:
        PlaceError: Parameters are no matrices of linear layers, or too small for that rank.
    """
    check_low_rank(model, parameters, rank)
    return LoraShapes(
        rank=rank,
        trained=sum(rank * sum(p.shape) for p in parameters.values()),
        inputs=sum(input_width(owner(model, name)) for name in parameters),
        largest=max(p.numel() for p in parameters.values()),
    )


def confined_shapes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    layer: nn.Module,
    preserve: Sequence[str],
) -> ConfinedShapes:
    """Returns the sizes of a confined change of a place's parameters. No file is read.

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
    # Where a norm follows the MLP, what leaves the matrix is not yet what the residual gets.
    norms, _, _ = layer_parts(layer)
    normed = any("post" in name and ("feedforward" in name or "mlp" in name) for name in norms)
    return ConfinedShapes(
        preserve=tuple(preserve),
        kinds=tuple(map(kind_of, preserve)),
        inputs={name: input_width(owner(model, name)) for name in parameters},
        sizes={name: p.numel() for name, p in parameters.items()},
        folds=not normed,
    )
