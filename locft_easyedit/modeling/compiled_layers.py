"""Layers compiled for training: what runs between their matrix products, in fewer passes over it.

Normalization, activation, rotary embedding and the sums between them move every number several
times, forward and backward; `torch.compile` makes few loops or kernels of them. One layer is a
region by itself, so that all layers of a kind are served by one compilation, for rows of any size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shapes_config

from ..distributed.world import brief
from .fsdp import sharded_layers
from .modes import forward_replaced, has_hooks

logger = logging.getLogger(__name__)

# Variants of one layer's code: PyTorch's limit is 8, counted for all layers of all models of a
# process together, beyond which layers silently run as they are.
_VARIANTS = 64


class CompiledLayers:
    """Layers without trained parameters, whose passes with gradients are compiled.

    Passes without gradients run as ever, so that what is measured does not depend on compilation.
    Code that is compiled another time may round otherwise. Where compilation fails, at rows of a
    kind that have not been before, a layer runs as it is, with a warning.

    Args:
        layers: The layers. Each is compiled when it first runs, or taken from those before.

    Attributes:
        layers: The layers.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = tuple(layers)
        self._forwards = [_compiled(layer) for layer in self.layers]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager in which passes with gradients are compiled."""
        with ExitStack() as undo:
            undo.enter_context(torch._dynamo.config.patch(recompile_limit=_VARIANTS))
            # Rows as long as a head is wide are rows like others.
            undo.enter_context(shapes_config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
            for layer, forward in zip(self.layers, self._forwards, strict=True):
                undo.enter_context(forward_replaced(layer, forward))
            yield


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    """Returns what a layer runs in place of its `forward`."""
    own = layer.forward
    compiled = torch.compile(own, dynamic=True)
    refused = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal refused
        if refused or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            refused = True
            logger.warning("A layer runs as it is, not compiled: %s", brief(error))
            return own(*args, **kwargs)

    return forward


def find_compilable(
    model: nn.Module, layers: Sequence[nn.Module], trained: Collection[nn.Parameter]
) -> CompiledLayers | None:
    """Returns the layers that may be compiled; `None` if there are none.

    Whether that leaves the logits as they are is for the caller to measure.

    Args:
        model: The model.
        layers: Layers that run whole in every step.
        trained: The parameters that will be trained: a layer that holds one runs as it is.
    """
    if sharded_layers(model) is not None:
        return None
    left_out = {id(parameter) for parameter in trained}
    suitable = [
        layer
        for layer in layers
        if not any(id(parameter) in left_out for parameter in layer.parameters())
        # Whatever else a module does (offloading, gathering), it does itself.
        and not any("forward" in vars(module) or has_hooks(module) for module in layer.modules())
    ]
    return CompiledLayers(suitable) if suitable else None
