"""Parts of a layer, told apart by what they hold and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def parts_of(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns a layer's attention modules and its MLP: children that hold matrices."""
    attention: list[nn.Module] = []
    mlp: list[nn.Module] = []
    for name, child in layer.named_children():
        if any(p.dim() >= 2 for p in child.parameters()):
            (attention if "attn" in name or "attention" in name else mlp).append(child)
    return attention, mlp


def count(parameters: Sequence[torch.Tensor]) -> int:
    """Returns how many numbers the parameters hold."""
    return sum(p.numel() for p in parameters)


def matrices_in(modules: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    """Returns the matrices within `modules`, by path, in the order of definition."""
    return [
        (name, module)
        for parent in modules
        for name, module in parent.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]


def normed_after(layer: nn.Module) -> bool:
    """Returns whether a norm follows the MLP before its output is added to the residual."""
    named = {
        name
        for name, child in layer.named_children()
        if {p.dim() for p in child.parameters()} == {1}
    }
    return any("post" in name and ("feedforward" in name or "mlp" in name) for name in named)
