"""Where the frozen prefix ends: at the input of the first trained matrix, where that is possible.

Everything that runs before the first trained parameter is constant in training, also inside its
layer. Three cuts, from the one that leaves least to run:

- `matrix`: all that is trained in the layer is one projection back into the residual stream (an
  MLP's down-projection). Kept are the residual and the projection's input.
- `mlp`: all that is trained lies in the MLP. Kept is the residual that enters the MLP's norm.
- `layer`: the general case. Kept is the layer's input.

Whether a cut leaves the model's logits as they are is measured by the caller, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modeling.devices import module_device, sent_to
from ..modeling.forward import Stop
from ..modeling.layer_trace import Call, Trace, first_tensor, tracing
from ..modeling.places import LayerList, Place

Keep = Callable[[torch.Tensor], None]
Apply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Fold:
    """How a block y = f(x) + g(h(x)), of which only g is trained, is run: f and h but once.

    Attributes:
        constant: f, from [..., in] to [..., out].
        inner: h, from [..., in] to [..., in].
        trained: g, from [..., in] to [..., out].
        digest: Changes with f and h.
    """

    constant: Apply
    inner: Apply
    trained: Apply
    digest: str


@dataclass(frozen=True, eq=False)
class Cut:
    """Where a model is split into what runs once and what runs in every step.

    Attributes:
        stack: The model's layers.
        first_layer: The lowest layer that is not wholly frozen.
        kind: `matrix`, `mlp` or `layer`.
        block: The projection (`matrix`) or the MLP (`mlp`).
        norm: What the MLP takes its input from (`mlp`).
        sides: Modules whose outputs the layer has added to its input before `block`.
        after: What the block's output passes before it is added to the residual.
        returns_tuple: Whether the layer returns a tuple.
        width: Numbers a token, W; 0 if it was not measured.
        narrows: Whether the model takes fewer positions from its last layer than it gave it.
        fold: How the block is run (`matrix`); `None` runs it as it is.
    """

    stack: LayerList
    first_layer: int
    kind: str = "layer"
    block: nn.Module | None = None
    norm: nn.Module | None = None
    sides: tuple[nn.Module, ...] = ()
    after: tuple[nn.Module, ...] = ()
    returns_tuple: bool = False
    width: int = 0
    narrows: bool = True
    fold: Fold | None = None

    @property
    def above_attention(self) -> bool:
        """Whether no position sees another one above the cut, and the scored ones alone can run."""
        return self.narrows and self.kind != "layer" and self.in_last_layer

    @property
    def in_last_layer(self) -> bool:
        """Whether the cut is in the last layer, or where it begins."""
        return self.first_layer == len(self.stack.layers) - 1

    @property
    def layer(self) -> nn.Module:
        """The first layer that is not wholly frozen."""
        return self.stack.layers[self.first_layer]

    @property
    def device(self) -> torch.device | None:
        """Where what follows the cut is computed; `None` if that is not loaded."""
        return module_device(self.layer)

    @contextmanager
    def recording(self, keep: Keep, *, go_on: bool) -> Iterator[None]:
        """Context manager that hands a forward pass's states at the cut to `keep`.

        Args:
            keep: Gets the states, [R, L, W].
            go_on: Let the pass go on to the logits; else it ends there.
        """
        residual: list[torch.Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            residual[:] = [sent_to(_hidden(args, kwargs), module)]
            if self.kind == "layer":
                finish(residual[0])

        def add(module: nn.Module, args: Any, output: Any) -> None:
            residual.append(first_tensor(output))  # type: ignore[arg-type]

        def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            total = residual[0]
            for side in residual[1:]:
                total = total + side
            if self.kind != "matrix":
                finish(total)
                return
            inner = _hidden(args, kwargs)
            if self.fold is not None:
                total, inner = total + self.fold.constant(inner), self.fold.inner(inner)
            finish(torch.cat([total, inner], dim=-1))

        def finish(states: torch.Tensor) -> None:
            keep(states.detach())
            if not go_on:
                raise Stop

        with ExitStack() as stack:

            def hook(handle: Any) -> None:
                stack.callback(handle.remove)

            hook(self.layer.register_forward_pre_hook(enter, with_kwargs=True))
            if self.kind != "layer":
                for side in self.sides:
                    hook(side.register_forward_hook(add))
                until = self.norm if self.norm is not None else self.block
                assert until is not None
                hook(until.register_forward_pre_hook(reach, with_kwargs=True))
            with suppress(Stop):
                yield

    @contextmanager
    def replaying(self, states: Callable[[], torch.Tensor]) -> Iterator[None]:
        """Context manager that begins passes at the cut; the module tree is restored in any case.

        Layers keep their numbers, so that masks and types that depend on them stay right.

        Args:
            states: Gives the states of the rows that are run, [R, L, W].
        """
        layer = self.layer
        with bypassing(self.stack, self.first_layer, self.returns_tuple), ExitStack() as stack:
            if self.kind == "layer":
                hook = layer.register_forward_pre_hook(_substitute(states), with_kwargs=True)
                stack.callback(hook.remove)
            else:
                stack.callback(self.stack.layers.__setitem__, self.first_layer, layer)
                self.stack.layers[self.first_layer] = _Resumed(self, layer, states)
            yield


def layer_cut(stack: LayerList, first_layer: int, returns_tuple: bool = False) -> Cut:
    """Returns the general cut: at the input of a layer."""
    return Cut(stack, first_layer, returns_tuple=returns_tuple)


def find_cuts(place: Place, run: Callable[[], None]) -> list[Cut]:
    """Returns the cuts that the first trained layer's anatomy suggests, the least to run first.

    Args:
        place: What is trained, inside a stack of layers.
        run: Runs the model once on some text.
    """
    assert place.stack is not None
    assert place.first_layer is not None
    stack, first = place.stack, place.first_layer
    with tracing(stack.layers[first]) as trace, torch.no_grad():
        run()
    trained = {
        name.removeprefix(f"{stack.path}.{first}.").rpartition(".")[0]
        for name in place.parameters
        if name.startswith(f"{stack.path}.{first}.")
    }
    found = []
    if len(trained) == 1:
        found += _matrix_cut(stack, first, trace, next(iter(trained)))
    found += _mlp_cut(stack, first, trace, trained)
    return [*found, layer_cut(stack, first, trace.returns_tuple)]


def _matrix_cut(stack: LayerList, first: int, trace: Trace, path: str) -> list[Cut]:
    module = trace.layer.get_submodule(path)
    call = trace.call_of(module)
    if call is None or len(call.given) != 1 or call.result is None or call.given[0].dim() != 3:
        return []
    after = trace.way_out(call)
    if after is None:
        return []
    cut = Cut(
        stack,
        first,
        "matrix",
        block=module,
        sides=tuple(trace.side_outputs(_outermost(trace, call))),
        after=tuple(after),
        returns_tuple=trace.returns_tuple,
    )
    return [cut]


def _mlp_cut(stack: LayerList, first: int, trace: Trace, trained: set[str]) -> list[Cut]:
    children = {path.split(".")[0] for path in trained if path}
    calls = [c for c in trace.calls if "." not in c.name]
    blocks = [c for c in calls if any(True for _ in c.module.children()) and c.given]
    if "" in trained or not blocks:
        return []
    block = blocks[-1]
    after, norm = trace.way_out(block), trace.producer(block.given[0])
    if after is None or norm is None or trace.call_of(block.module) is None or "." in norm.name:
        return []
    sides = trace.side_outputs(norm)
    residual = trace.entry
    for call in calls:
        if call.module in sides and residual is not None and call.result is not None:
            residual = residual + call.result
    if residual is None or not norm.given or not torch.equal(norm.given[0], residual):
        return []  # attention and MLP side by side, say: the norm does not see the residual
    if not children <= {block.name, norm.name, *_names(calls, after)}:
        return []
    cut = Cut(
        stack,
        first,
        "mlp",
        block=block.module,
        norm=norm.module,
        sides=tuple(sides),
        after=tuple(after),
        returns_tuple=trace.returns_tuple,
    )
    return [cut]


def _outermost(trace: Trace, call: Call) -> Call:
    """Returns the call of the layer's own child that `call` was made within."""
    root = call.name.split(".")[0]
    return next(c for c in trace.calls if c.name == root and c.started <= call.started)


def _names(calls: list[Call], modules: list[nn.Module]) -> set[str]:
    return {call.name for call in calls if call.module in modules}


@contextmanager
def bypassing(stack: LayerList, n_layers: int, returns_tuple: bool) -> Iterator[None]:
    """Context manager that lets the first `n_layers` pass on their input; then they run again."""
    originals = list(stack.layers[:n_layers])
    try:
        for i, layer in enumerate(originals):
            stack.layers[i] = _PassThrough(layer, returns_tuple)
        yield
    finally:
        for i, layer in enumerate(originals):
            stack.layers[i] = layer


class _StandIn(nn.Module):
    """Takes a layer's place in the stack; models read attributes of it to choose a mask."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        # The layer itself must not be a child: its parameters would be listed.
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def _in_form(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self.returns_tuple else hidden


class _PassThrough(_StandIn):
    """Stands in for a frozen layer: gives its input back in the form the layer would."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._in_form(_hidden(args, kwargs))


class _Resumed(_StandIn):
    """Stands in for the first trained layer, of which only the block and what follows it run."""

    def __init__(self, cut: Cut, layer: nn.Module, states: Callable[[], torch.Tensor]) -> None:
        super().__init__(layer, cut.returns_tuple)
        self._cut = (cut,)  # in a tuple: its modules must not become children
        self._states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        [cut] = self._cut
        states, width = self._states(), _hidden(args, kwargs).shape[-1]
        assert cut.block is not None
        if cut.kind == "matrix":
            residual, given = states[..., :width], states[..., width:]
        else:
            residual = given = states
            if cut.norm is not None:
                given = cut.norm(given)
        run = cut.block if cut.fold is None else cut.fold.trained
        output = first_tensor(run(given))
        for module in cut.after:
            output = first_tensor(module(output))
        assert output is not None
        return self._in_form(residual + output)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Returns a layer's input, given by position or by name."""
    hidden: torch.Tensor = (
        args[0]
        if args
        else next(kwargs[name] for name in ("hidden_states", "input", "x") if name in kwargs)
    )
    return hidden


def _substitute(states: Callable[[], torch.Tensor]) -> Callable[..., Any]:
    """Returns a pre-forward hook that replaces a module's input."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (states(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states()}

    return hook
