"""Frozen matrices that are given the same tensor, multiplied with it as one: fewer, larger kernels.

Queries, keys and values are three products with one input, an MLP's gate and what it gates are two.
Which modules these are is seen by running the model once; nothing depends on a module's name. The
matrices lie one below the other in one tensor of which the modules' own parameters are views, so
that no number is held twice. Whichever of the modules is called first computes for all.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .fsdp import sharded_layers
from .modes import forward_replaced, has_hooks


class FusedLinears:
    """Groups of frozen linear layers that are given the same input, each group run as one.

    Args:
        groups: The layers of each group, in the order of their calls; all of one input size.

    Attributes:
        groups: The groups.
    """

    def __init__(self, groups: Iterable[Sequence[nn.Linear]]) -> None:
        self.groups = [_Group(modules) for modules in groups]

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        """Context manager in which each group's weights, and biases, are views of one tensor.

        They are the same `nn.Parameter`s with the same values; afterwards each holds memory of its
        own again. Beside the model's own memory that of one group is needed, for a moment.
        """
        with ExitStack() as undo:
            for group in self.groups:
                undo.enter_context(group.laid_out())
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager in which each group is one product; within `laid_out`."""
        with ExitStack() as undo:
            for group in self.groups:
                undo.enter_context(group.running())
            yield


class _Group:
    """Linear layers of one input, and what is left to take of the product that they share."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self.modules = tuple(modules)
        self._sizes = [module.out_features for module in modules]
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._addresses: list[int] = []
        self._parts: dict[int, torch.Tensor] = {}  # by the number of the layer that takes it
        self._given: weakref.ref[torch.Tensor] | None = None
        self._how: tuple[int, bool] = (0, False)

    @contextmanager
    def laid_out(self) -> Iterator[None]:
        """As for `FusedLinears`."""
        weights = [module.weight for module in self.modules]
        biases = [module.bias for module in self.modules if module.bias is not None]
        with ExitStack() as undo:
            self._weight = undo.enter_context(_views_of_one(weights))
            self._bias = undo.enter_context(_views_of_one(biases)) if biases else None
            self._addresses = [weight.data_ptr() for weight in weights]
            try:
                yield
            finally:
                self._weight = self._bias = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """As for `FusedLinears`."""
        assert self._weight is not None
        with ExitStack() as undo:
            undo.callback(self._drop)
            for i, module in enumerate(self.modules):
                undo.enter_context(forward_replaced(module, partial(self._part, i)))
            yield

    def _part(self, i: int, input: torch.Tensor) -> torch.Tensor:  # named as `nn.Linear` names it
        """Returns what layer `i` gives for its input, [..., in] to [..., out]."""
        if not self._holds(i, input):
            self._drop()
            if input.is_inference() or not self._in_place():
                return nn.Linear.forward(self.modules[i], input)
            assert self._weight is not None
            product = F.linear(input, self._weight, self._bias)
            self._parts = dict(enumerate(product.split(self._sizes, dim=-1)))
            # Weakly: where a pass fails half-way, what was not taken goes with the input.
            self._given = weakref.ref(input, self._drop)
            self._how = input._version, torch.is_grad_enabled()
        part = self._parts.pop(i)
        if not self._parts:
            self._drop()
        return part

    def _holds(self, i: int, given: torch.Tensor) -> bool:
        """Returns whether the part of layer `i` is there, of this very input as it is now."""
        if i not in self._parts or self._given is None or self._given() is not given:
            return False
        return self._how == (given._version, torch.is_grad_enabled())

    def _in_place(self) -> bool:
        """Returns whether the layers' weights are frozen and still what `_weight` consists of."""
        return all(
            module.weight.data_ptr() == address and not module.weight.requires_grad
            for module, address in zip(self.modules, self._addresses, strict=True)
        )

    def _drop(self, of: weakref.ref[torch.Tensor] | None = None) -> None:
        """Forgets what was not taken: of an input that is gone, or of whichever."""
        if of is None or of is self._given:
            self._parts, self._given = {}, None


@contextmanager
def _views_of_one(parameters: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Context manager that makes parameters views of one tensor, which it yields."""
    # Tensors that are made in inference mode could not be trained with, whatever mode it is now.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([parameter.detach() for parameter in parameters])
        sizes = [len(parameter) for parameter in parameters]
        for parameter, part in zip(parameters, whole.split(sizes), strict=True):
            parameter.data = part
    try:
        yield whole
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for parameter in parameters:
                if _shares(parameter, whole):  # and was not moved by anybody else
                    parameter.data = parameter.detach().clone()


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def find_fused(
    model: nn.Module,
    layers: Iterable[nn.Module],
    trained: Collection[nn.Parameter],
    run: Callable[[], None],
) -> FusedLinears | None:
    """Returns the frozen linear layers that can be run in groups; `None` if there are none.

    Whether that leaves the logits as they are is for the caller to measure.

    Args:
        model: The model.
        layers: The part of it to look at.
        trained: The parameters that will be trained, whatever their flags are at present.
        run: Runs the model once on some text.
    """
    if sharded_layers(model) is not None:
        return None
    parents = _suitable(model, layers, {id(parameter) for parameter in trained})
    calls: Counter[nn.Module] = Counter()
    found: dict[tuple[Any, ...], list[nn.Linear]] = {}
    inputs: list[torch.Tensor] = []  # kept, so that no other one gets the same address

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] += 1
        if len(args) != 1 or kwargs or args[0].is_inference():
            return
        assert isinstance(module, nn.Linear)
        inputs.append(args[0])
        # What is written into between two calls is another input.
        key = (id(parents[module]), id(args[0]), args[0]._version, module.bias is None)
        found.setdefault((*key, module.weight.dtype, module.weight.device), []).append(module)

    with ExitStack() as hooks, torch.no_grad():
        for module in parents:
            hooks.enter_context(module.register_forward_pre_hook(see, with_kwargs=True))
        run()
    groups = [[m for m in modules if calls[m] == 1] for modules in found.values()]
    groups = [modules for modules in groups if len(modules) > 1]
    return FusedLinears(groups) if groups else None


def _suitable(
    model: nn.Module, layers: Iterable[nn.Module], trained: set[int]
) -> dict[nn.Linear, nn.Module]:
    """Returns the plain frozen linear layers whose memory is their own, with their parents."""
    holders = Counter(
        parameter.untyped_storage()._cdata
        for _, parameter in model.named_parameters(remove_duplicate=False)
    )

    def own(parameter: torch.Tensor | None) -> bool:
        if parameter is None:
            return True
        frozen = type(parameter) is nn.Parameter and not parameter.requires_grad
        resident = not parameter.is_meta and parameter.is_contiguous()
        storage = parameter.untyped_storage()
        whole = storage.nbytes() == parameter.nbytes and holders[storage._cdata] == 1
        return frozen and resident and whole and id(parameter) not in trained

    return {
        module: parent
        for layer in layers
        for parent in layer.modules()
        for module in parent.children()
        # Whatever else a module is or does (adapters, quantization, offloading), it does itself.
        if type(module) is nn.Linear
        and "forward" not in vars(module)
        and not has_hooks(module)
        and own(module.weight)
        and own(module.bias)
    }
