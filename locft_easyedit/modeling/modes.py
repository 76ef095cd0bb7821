"""What a model is put into for a while: modes and flags, restored in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .parameter_slices import gradients_of_slices, whole_of

_DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")  # that autocast can be turned on for
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def own_precision() -> Iterator[None]:
    """Context manager, or decorator, in which models run in the precision of their weights.

    Inside a program's `torch.autocast` a matrix that is trained would be read from a copy in half
    precision that autocast made once and keeps: no step would change what the model computes. What
    the program runs after it must not find such copies of former weights either.
    """
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, _DEVICE_TYPES):
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            torch.clear_autocast_cache()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager for passes without dropout, in the precision of the model's weights.

    Afterwards each module is in its own mode again.
    """
    with _without_dropout(model), own_precision():
        yield


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def with_gradients() -> Iterator[None]:
    """Context manager that turns gradients on, also where a program has turned them off for all.

    In the precision of the model's weights: gradients too are exact.
    """
    with torch.inference_mode(False), torch.enable_grad(), own_precision():
        yield


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager in which only `parameters` require gradients and dropout is off.

    A slice among them gets its share of the gradients of the fused parameter that it is part of. It
    may be held open for long: that passes run in the model's precision is for others to see to.
    """
    chosen = list(parameters)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(parameter, parameter.grad) for parameter in chosen]
    trained = {id(whole_of(parameter)) for parameter in chosen}
    try:
        for parameter, _ in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in trained)
        with _without_dropout(model), gradients_of_slices(chosen):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, flag in flags:
            if parameter.is_floating_point():
                parameter.requires_grad_(flag)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether anything runs with a module's passes."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


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
