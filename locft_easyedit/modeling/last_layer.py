"""The end of the model, run only where a token is scored.

Above the last layer's attention, positions no longer see each other. Its output projection, its
MLP, the final norm and the logits are needed at the scored positions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layer_trace import hidden_of, tracing, with_hidden
from .places import LayerList


@dataclass(frozen=True, eq=False)
class Tail:
    """The last layer's modules at which the scored positions part from the others.

    Attributes:
        layer: The last layer. Its residual stream is narrowed to the scored positions.
        reads_all: The norm (or the attention itself) that still reads all positions.
        narrows: Modules whose input is narrowed as well: the attention's output projection, and
            an MLP that shares the attention's norm.
    """

    layer: nn.Module
    reads_all: nn.Module
    narrows: tuple[nn.Module, ...]

    @contextmanager
    def narrowed(self, scored: Callable[[], torch.Tensor]) -> Iterator[None]:
        """Context manager that runs the last layer's end at the scored positions alone, [1, S, D].

        Args:
            scored: Gives the scored cells of the rows that are run (flat, in R * L), [S].
        """
        everything: list[torch.Tensor] = []

        def narrow_hidden(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            everything[:] = [hidden_of(args, kwargs)]
            return with_hidden(args, kwargs, select(everything[0], scored()))

        def give_all(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return with_hidden(args, kwargs, everything.pop())

        def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (select(args[0], scored()), *args[1:])

        with ExitStack() as hooks:
            first = self.layer.register_forward_pre_hook(narrow_hidden, with_kwargs=True)
            hooks.enter_context(first)
            norm = self.reads_all.register_forward_pre_hook(give_all, with_kwargs=True)
            hooks.enter_context(norm)
            for module in self.narrows:
                hooks.enter_context(module.register_forward_pre_hook(narrow))
            yield


def select(hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Returns the scored cells of [R, L, any], [1, S, any]."""
    return hidden.flatten(0, 1).index_select(0, scored.to(hidden.device)).unsqueeze(0)


def find_tail(stack: LayerList, run: Callable[[], None]) -> Tail | None:
    """Returns the tail that the last layer's anatomy suggests; `None` if it suggests none.

    `run` runs the model once on some text. Whether the tail leaves the logits as they are is for
    the caller to measure.
    """
    with tracing(stack.layers[-1]) as trace, torch.no_grad():
        run()
    children = [call for call in trace.calls if "." not in call.name]
    attention = next((c for c in children if any(True for _ in c.module.children())), None)
    if attention is None or not attention.given or attention.result is None:
        return None
    inner = [c for c in trace.calls if c.name.startswith(attention.name + ".")]
    projection = next(
        (c for c in inner if c.result is attention.result and hasattr(c.module, "weight")), None
    )
    entered = attention.given[0]
    norm = trace.producer(entered)
    reads_all = norm or attention
    if projection is None or not reads_all.given or reads_all.given[0] is not trace.entry:
        return None
    if any(trace.call_of(call.module) is None for call in (reads_all, projection)):
        return None
    # Attention and MLP side by side may share the norm, which has read all positions.
    others = [call for call in children if call is not attention and norm and call.given]
    sharing = [call.module for call in others if call.given[0] is entered]
    return Tail(trace.layer, reads_all.module, (projection.module, *sharing))
