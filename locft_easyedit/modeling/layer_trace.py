"""What runs inside a layer, and in which order: seen by running it once.

Where a layer may be cut, and what in it needs only some positions, differs from one architecture
to the next. The modules' order and which tensor goes from one to the other tell it for all that
add a block's output to a residual stream; nothing depends on a module's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .devices import sent_to


@dataclass(eq=False)
class Call:
    """One call of a module within a layer.

    Attributes:
        name: The module's path within the layer.
        module: The module.
        given: The tensors it was given, the hidden states first.
        result: The first tensor that it returned.
        started: Its number in the order of beginnings.
        ended: How many calls had begun when it ended.
    """

    name: str
    module: nn.Module
    given: list[torch.Tensor]
    started: int
    result: torch.Tensor | None = None
    ended: int = -1


@dataclass
class Trace:
    """What happened in one forward pass through a layer.

    Attributes:
        layer: The layer.
        calls: The calls of the modules inside it, in the order of their beginnings.
        entry: The hidden states that the layer was given, [R, L, D].
        n_returned: What the layer returned as a tuple; 0 for the hidden states alone.
    """

    layer: nn.Module
    calls: list[Call] = field(default_factory=list)
    entry: torch.Tensor | None = None
    n_returned: int = 0

    def call_of(self, module: nn.Module) -> Call | None:
        """Returns the one call of `module`; `None` if it was called never or more than once."""
        found = [call for call in self.calls if call.module is module]
        return found[0] if len(found) == 1 else None

    def producer(self, tensor: torch.Tensor) -> Call | None:
        """Returns the last module that returned this very tensor."""
        return next((call for call in reversed(self.calls) if call.result is tensor), None)

    def way_out(self, call: Call) -> list[nn.Module] | None:
        """Returns what the output of `call` passes on its way to the end of the layer.

        Modules that hand it on unchanged are left out. `None` if something else than that way runs
        after `call`.
        """
        current, passed, inside = call.result, [], None
        for later in self.calls[call.ended :]:
            if inside is not None and later.started < inside.ended:
                continue
            if not any(tensor is current for tensor in later.given):
                return None
            if later.result is not current:
                passed.append(later.module)
            current, inside = later.result, later
        return passed

    def side_outputs(self, before: Call) -> list[nn.Module]:
        """Returns the modules whose outputs no module took in, up to the beginning of `before`.

        Code between the modules must have used them: added them to the residual stream.
        """
        direct = [
            call
            for call in self.calls[: before.started]
            if "." not in call.name and call.ended <= before.started
        ]
        taken = [tensor for call in self.calls for tensor in call.given]
        return [c.module for c in direct if not any(t is c.result for t in taken)]


@contextmanager
def tracing(layer: nn.Module) -> Iterator[Trace]:
    """Context manager that records one forward pass through `layer`."""
    trace = Trace(layer)
    open_calls: list[Call] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            open_calls.append(Call(name, module, given, len(trace.calls)))
            trace.calls.append(open_calls[-1])

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        call = open_calls.pop()
        call.result, call.ended = first_tensor(output), len(trace.calls)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace.entry = sent_to(hidden_of(args, kwargs), module)
        # What is inside gets this very tensor, by which it is recognized.
        return with_hidden(args, kwargs, trace.entry)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        trace.n_returned = n_returned(output)

    def hand_on(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output if module.training else args[0]

    with ExitStack() as hooks:
        hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.enter_context(layer.register_forward_hook(leave))
        for name, module in layer.named_modules():
            if isinstance(module, nn.Dropout):
                # Off, it hands its input on, but not always as the same tensor.
                hooks.enter_context(module.register_forward_hook(hand_on))
            elif name:
                started = module.register_forward_pre_hook(begin(name), with_kwargs=True)
                hooks.enter_context(started)
                hooks.enter_context(module.register_forward_hook(end))
        yield trace


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Returns a module's input, given by position or by name."""
    hidden: torch.Tensor = args[0] if args else kwargs[_hidden_name(kwargs)]
    return hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a module's arguments with another input, as a pre-forward hook returns them."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, _hidden_name(kwargs): hidden}


def _hidden_name(kwargs: dict[str, Any]) -> str:
    return next(name for name in ("hidden_states", "input", "x") if name in kwargs)


def n_returned(output: Any) -> int:
    """Returns how many values a layer returned in a tuple; 0 for the hidden states alone."""
    return len(output) if isinstance(output, tuple) else 0


def first_tensor(output: Any) -> torch.Tensor | None:
    """Returns what a module returned, or the first tensor of a tuple."""
    if isinstance(output, (tuple, list)):
        return next((value for value in output if torch.is_tensor(value)), None)
    return output if torch.is_tensor(output) else None


def entry_gradient(layer: nn.Module, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Returns the gradient of what `run` returns, a scalar, by what enters a layer, in float32.

    Below the layer nothing is differentiated.
    """
    entered: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered[:] = [hidden_of(args, kwargs).detach().requires_grad_()]
        return with_hidden(args, kwargs, entered[0])

    with layer.register_forward_pre_hook(enter, with_kwargs=True), torch.enable_grad():
        [gradient] = torch.autograd.grad(run(), entered)
    return gradient.float()
