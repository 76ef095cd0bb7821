"""What a model is put into for a while: modes and flags, restored in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that puts a model into evaluation mode; then each module is as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def with_gradients() -> Iterator[None]:
    """Context manager that turns gradients on, also where a program has turned them off for all."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager in which only `parameters` require gradients and dropout is off."""
    chosen = list(parameters)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(parameter, parameter.grad) for parameter in chosen]
    trained = {id(parameter) for parameter in chosen}
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in trained)
        with evaluation_mode(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, flag in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(flag)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context manager that lets `module` run `forward`; then its own (accelerate's, say) again."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before
