"""torch.compile for what every step runs, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .place import LayerList


@contextmanager
def compiled(
    stack: LayerList, first_layer: int, apart: Iterable[nn.Parameter] = ()
) -> Iterator[None]:
    """Within, the norms and MLPs of the layers from `first_layer` up are compiled.

    Attention is left alone: its kernels are what they are, and hooks that other parts put on its
    modules would break the graph. Shapes change from batch to batch and are compiled as such.

    Args:
        stack: The model's layers.
        first_layer: The first layer that training runs.
        apart: Modules that hold one of these parameters are not compiled.
    """
    apart_ids = {id(parameter) for parameter in apart}
    last = len(stack.layers) - 1
    chosen: list[nn.Module] = []
    for number, layer in enumerate(stack.layers):
        # In the last layer hooks narrow what its modules get; below the first nothing runs.
        if first_layer < number < last:
            chosen += [m for name, m in layer.named_children() if "attn" not in name.lower()]
    chosen = [m for m in chosen if "attention" not in type(m).__name__.lower()]
    chosen = [m for m in chosen if not apart_ids & {id(p) for p in m.parameters()}]
    try:
        for module in chosen:
            module.compile(dynamic=True)
        yield
    finally:
        for module in chosen:
            module._compiled_call_impl = None


@contextmanager
def not_compiled(stack: LayerList) -> Iterator[None]:
    """Within, the layers run as they are written: what is run once is not worth a graph."""
    found = [
        (module, module._compiled_call_impl)
        for module in stack.layers.modules()
        if module._compiled_call_impl is not None
    ]
    try:
        for module, _ in found:
            module._compiled_call_impl = None
        yield
    finally:
        for module, graph in found:
            module._compiled_call_impl = graph
