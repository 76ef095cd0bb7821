"""LoRA's sizes, read from modules on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..change import owner, sides
from ..lora import check_low_rank


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

    def of(self, matrices: Sequence[torch.Tensor]) -> int:
        """Returns the numbers of A and B for some of the matrices."""
        return sum(self.rank * sum(matrix.shape) for matrix in matrices)


def lora_shapes(model: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int) -> LoraShapes:
    """Returns the sizes of LoRA at a place.

    Args:
        model: The model; its weights need not be loaded.
        parameters: The place's parameters by name.
        rank: LoRA's rank.

    Raises:
        PlaceError: Parameters are no matrices of linear layers, or too small for that rank.
    """
    check_low_rank(model, parameters, rank)
    inputs = [sides(owner(model, name))[1] for name in parameters]
    trained = sum(rank * sum(p.shape) for p in parameters.values())
    return LoraShapes(rank, trained, sum(inputs), max(p.numel() for p in parameters.values()))
