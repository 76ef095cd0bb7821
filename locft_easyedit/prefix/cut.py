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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..modeling.devices import module_device, sent_to
from ..modeling.forward import Stop
from ..modeling.layer_trace import Trace, first_tensor, hidden_of, tracing, with_hidden
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
        n_returned: What the layers return as a tuple; 0 for the hidden states alone.
        width: Numbers a token, W; 0 if it was not measured.
        copies_first: Whether hidden states of several streams are [n, R, L, D], not [R, L, n, D].
        reads_tokens: Whether the model is given tokens as well: of some it computes more than what
            enters its first layer, such as inputs of each layer.
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
    n_returned: int = 0
    width: int = 0
    copies_first: bool = False
    reads_tokens: bool = False
    narrows: bool = True
    fold: Fold | None = None

    @property
    def above_attention(self) -> bool:
        """Whether no position sees another one above the cut, and the scored ones alone can run."""
        in_last_layer = self.first_layer == len(self.stack.layers) - 1
        return self.narrows and self.kind != "layer" and in_last_layer

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
            residual[:] = [sent_to(hidden_of(args, kwargs), module)]
            if self.kind == "layer":
                finish(self._in_rows(residual[0]))

        def add(module: nn.Module, args: Any, output: Any) -> None:
            residual.append(first_tensor(output))  # type: ignore[arg-type]

        def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            total = residual[0]
            for side in residual[1:]:
                total = total + side
            if self.kind != "matrix":
                finish(total)
                return
            inner = hidden_of(args, kwargs)
            if self.fold is not None:
                total, inner = total + self.fold.constant(inner), self.fold.inner(inner)
            finish(torch.cat([total, inner], dim=-1))

        def finish(states: torch.Tensor) -> None:
            keep(states.detach())
            if not go_on:
                raise Stop

        with ExitStack() as hooks:
            hooks.enter_context(self.layer.register_forward_pre_hook(enter, with_kwargs=True))
            if self.kind != "layer":
                for side in self.sides:
                    hooks.enter_context(side.register_forward_hook(add))
                until = self.norm if self.norm is not None else self.block
                assert until is not None
                hooks.enter_context(until.register_forward_pre_hook(reach, with_kwargs=True))
            with suppress(Stop):
                yield

    @contextmanager
    def replaying(self, states: Callable[[], torch.Tensor]) -> Iterator[None]:
        """Context manager that begins passes at the cut; the module tree is restored in any case.

        Layers keep their numbers, so that masks and types that depend on them stay right.

        Args:
            states: Gives the states of the rows that are run, [R, L, W].
        """

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_hidden(args, kwargs, self._as_given(states(), hidden_of(args, kwargs)))

        def resume(hidden: torch.Tensor) -> torch.Tensor:
            return self._from_block(states(), hidden.shape[-1])

        if self.kind == "layer":
            with (
                bypassing(self.stack, self.first_layer, self.n_returned),
                self.layer.register_forward_pre_hook(begin, with_kwargs=True),
            ):
                yield
        else:
            with bypassing(self.stack, self.first_layer, self.n_returned, then=resume):
                yield

    def _in_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what enters the layer as [R, L, W]; models with several streams have one more."""
        if hidden.dim() < 4:
            return hidden
        return (hidden.movedim(0, 2) if self.copies_first else hidden).flatten(2)

    def _as_given(self, states: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Returns states, [R, L, W], in the form of what the layer is `given`."""
        if given.dim() < 4:
            return states
        streams = given.shape[0 if self.copies_first else 2]
        hidden = states.unflatten(2, (streams, -1))
        return hidden.movedim(2, 0) if self.copies_first else hidden

    def _from_block(self, states: torch.Tensor, width: int) -> torch.Tensor:
        """Returns what leaves the layer, [R, L, width], of the states at the cut, [R, L, W]."""
        assert self.block is not None
        if self.kind == "matrix":
            residual, given = states[..., :width], states[..., width:]
        else:
            residual = states
            given = states if self.norm is None else self.norm(states)
        run = self.block if self.fold is None else self.fold.trained
        output = first_tensor(run(given))
        for module in self.after:
            output = first_tensor(module(output))
        assert output is not None
        return residual + output


def layer_cut(stack: LayerList, first_layer: int, n_returned: int = 0) -> Cut:
    """Returns the general cut: at the input of a layer."""
    return Cut(stack, first_layer, n_returned=n_returned)


def find_cuts(place: Place, run: Callable[[], None]) -> list[Cut]:
    """Returns the cuts that the first trained layer's anatomy suggests, the least to run first.

    The place lies inside a stack of layers; `run` runs the model once on some text.
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
    general = layer_cut(stack, first, trace.n_returned)
    if trace.entry is not None and trace.entry.dim() == 4:
        general = replace(general, copies_first=trace.entry.shape[0] > 1)  # the text is one row
    return [*_matrix_cut(general, trace, trained), *_mlp_cut(general, trace, trained), general]


def _matrix_cut(general: Cut, trace: Trace, trained: set[str]) -> list[Cut]:
    if len(trained) != 1:
        return []
    module = trace.layer.get_submodule(*trained)
    call = trace.call_of(module)
    if call is None or len(call.given) != 1 or call.result is None or call.given[0].dim() != 3:
        return []
    after = trace.way_out(call)
    if after is None:
        return []
    root = call.name.split(".")[0]
    outermost = next(c for c in trace.calls if c.name == root and c.started <= call.started)
    sides = tuple(trace.side_outputs(outermost))
    return [replace(general, kind="matrix", block=module, sides=sides, after=tuple(after))]


def _mlp_cut(general: Cut, trace: Trace, trained: set[str]) -> list[Cut]:
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
            if call.result.shape != residual.shape:
                return []  # several streams, into which outputs are mixed
            residual = residual + call.result
    if residual is None or not norm.given or not torch.equal(norm.given[0], residual):
        return []  # attention and MLP side by side, say: the norm does not see the residual
    run_anew = {block.name, norm.name, *(call.name for call in calls if call.module in after)}
    if not {path.split(".")[0] for path in trained} <= run_anew:
        return []
    cut = replace(
        general,
        kind="mlp",
        block=block.module,
        norm=norm.module,
        sides=tuple(sides),
        after=tuple(after),
    )
    return [cut]


@contextmanager
def bypassing(
    stack: LayerList, n_layers: int, n_returned: int, then: Apply | None = None
) -> Iterator[None]:
    """Context manager that lets the first `n_layers` pass on their input; then they run again.

    `then`, where it is given, runs in place of the layer after them.
    """
    runs: list[Apply] = [lambda hidden: hidden] * n_layers
    if then is not None:
        runs.append(then)
    originals = list(stack.layers[: len(runs)])
    try:
        for i, (layer, run) in enumerate(zip(originals, runs, strict=True)):
            stack.layers[i] = _StandIn(layer, run, n_returned)
        yield
    finally:
        for i, layer in enumerate(originals):
            stack.layers[i] = layer


class _StandIn(nn.Module):
    """Takes a layer's place in the stack; whatever a model asks of the layer it passes on.

    Models choose a mask, or what else they give a layer, by attributes that each names in its way.
    """

    def __init__(self, layer: nn.Module, run: Apply, n_returned: int) -> None:
        super().__init__()
        self.run = run
        self.n_returned = n_returned
        # In a tuple, it is no child: its parameters would be listed.
        self.original = (layer,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["original"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.run(hidden_of(args, kwargs))
        # What else a layer returns (weights, a state) is nothing that its successor needs.
        return (hidden, *[None] * (self.n_returned - 1)) if self.n_returned else hidden
