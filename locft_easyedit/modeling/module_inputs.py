"""What enters modules in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from .forward import Stop
from .layer_trace import hidden_of


@contextmanager
def module_inputs(
    modules: Mapping[str, nn.Module], take: Callable[[str, torch.Tensor], None]
) -> Iterator[set[str]]:
    """Context manager that gives what enters modules in a pass to `take`, and ends it after all.

    Args:
        modules: The modules by name.
        take: Gets a module's name and its input, a row a token, [tokens, D]; it may raise `Stop`.

    Yields:
        The names of those that have been run.
    """
    seen: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = hidden_of(args, kwargs)
            take(name, given.reshape(-1, given.shape[-1]))  # some models flatten before
            seen.add(name)
            if len(seen) == len(modules):
                raise Stop

        return listen

    with ExitStack() as hooks, suppress(Stop):
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield seen
