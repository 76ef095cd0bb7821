"""Gradients of a mixture's fused experts, of one group of tokens apart from another's.

Autograd sums a parameter's gradient over all tokens. Where groups of them are to be told apart, the
experts run once for each group, with tensors that share the parameters' numbers: each has its own
gradient, which is handed on and let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..modeling.modes import forward_replaced
from ..modeling.places import LayerList

Take = Callable[[str, int, torch.Tensor], None]
_OUTSIDE = -1  # cells of no group


@contextmanager
def gradients_of_groups(
    stack: LayerList, groups: Sequence[torch.Tensor], n_cells: int, take: Take
) -> Iterator[None]:
    """Context manager in which the gradients of all fused experts are taken, group by group.

    Experts that are not given one row for each of the pass's cells are left alone.

    Args:
        stack: The model's layers.
        groups: Cells of each group, of all that run in a pass, [N]; no cell is in two of them.
        n_cells: How many cells there are, R * L.
        take: Gets a parameter's name, a group's number and the gradient, [E, ., .], of each
            parameter in the order of the groups.
    """
    with ExitStack() as undo:
        for path, module in stack.layers.named_modules():
            fused = {
                name: parameter
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.ndim == 3 and parameter.is_floating_point()
            }
            if fused:
                prefix = f"{stack.path}.{path}."
                run = _Grouped(module, fused, groups, n_cells, partial(_named, take, prefix))
                undo.enter_context(forward_replaced(module, run))
        yield


def _named(take: Take, prefix: str, name: str, group: int, gradient: torch.Tensor) -> None:
    take(prefix + name, group, gradient)


class _Grouped:
    """What fused experts run in place of their `forward`."""

    def __init__(
        self,
        module: nn.Module,
        fused: Mapping[str, nn.Parameter],
        groups: Sequence[torch.Tensor],
        n_cells: int,
        take: Take,
    ) -> None:
        self._module, self._forward, self._fused = module, module.forward, fused
        self._n_cells, self._take = n_cells, take
        outside = torch.ones(n_cells, dtype=torch.bool)
        outside[torch.cat([*groups])] = False
        # Backward runs what ran last first: the groups then come in their order.
        parts = [(_OUTSIDE, outside.nonzero()[:, 0]), *reversed([*enumerate(groups)])]
        self._parts = [(group, cells) for group, cells in parts if len(cells)]
        self._back = torch.cat([cells for _, cells in self._parts]).argsort()
        self._running = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        # Hidden states and where the router sends them; experts that are given sorted tokens are
        # given the sizes of their shares instead.
        by_cell = len(given) > 1 and all(t.ndim and len(t) == self._n_cells for t in given)
        if self._running or not by_cell or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        self._running = True
        try:
            order = _InOrder(self._take)
            outputs = [self._of(group, cells, order, args, kwargs) for group, cells in self._parts]
        finally:
            self._running = False
        joined = torch.cat(outputs)
        return joined[self._back.to(joined.device)]

    def _of(
        self,
        group: int,
        cells: torch.Tensor,
        order: _InOrder,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> torch.Tensor:
        """Returns what the experts make of some cells; a group's gradients are taken."""

        def chosen(value: Any) -> Any:
            return value[cells.to(value.device)] if isinstance(value, torch.Tensor) else value

        own = {}
        for name, parameter in self._fused.items() if group != _OUTSIDE else ():
            own[name] = parameter.detach().requires_grad_()
            own[name].register_post_accumulate_grad_hook(partial(order.made, name, group))
        output: torch.Tensor = functional_call(
            self._module, own, tuple(map(chosen, args)), {k: chosen(v) for k, v in kwargs.items()}
        )
        return output


class _InOrder:
    """Hands gradients on in the order of the groups, whenever autograd has made them."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._held: dict[tuple[str, int], torch.Tensor] = {}
        self._next: dict[str, int] = {}

    def made(self, name: str, group: int, leaf: torch.Tensor) -> None:
        """Takes a gradient away from the tensor that it was made for."""
        assert leaf.grad is not None
        self._held[name, group], leaf.grad = leaf.grad, None
        while (name, following := self._next.get(name, 0)) in self._held:
            self._take(name, following, self._held.pop((name, following)))
            self._next[name] = following + 1
