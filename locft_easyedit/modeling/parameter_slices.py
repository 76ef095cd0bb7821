"""One expert of a mixture: a slice of a fused parameter, trained, named and written by itself.

transformers keeps the experts' matrices of a layer in one parameter, [E, out, in], and autograd
knows gradients of all of it alone. A slice is a parameter of its own that shares the numbers of one
expert: what trains, copies, hashes or writes parameters takes it as any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

_SLICE = re.compile(r"(.+)\[([^\[\]]*)\]")


class ParameterSlice(nn.Parameter):
    """One expert's matrix, [out, in], which shares its numbers with a fused parameter.

    Attributes:
        whole: The fused parameter, [E, out, in], as the model has it.
        expert: Which of them it is, 0 to E - 1.
    """

    whole: nn.Parameter
    expert: int


def parameter_slice(whole: nn.Parameter, index: int) -> ParameterSlice:
    """Returns the slice of an expert, by its `index`, of a fused parameter, [E, out, in]."""
    with torch.inference_mode(False):  # else it could not be trained
        part = ParameterSlice(whole.detach()[index], requires_grad=whole.is_floating_point())
    part.whole, part.expert = whole, index
    return part


def split_name(name: str) -> tuple[str, str | None]:
    """Returns a parameter's name, or template, without `[INDEX]` at its end, and what is in it.

    `None` where there is none: `experts.down_proj[3]` gives `experts.down_proj` and `3`.
    """
    found = _SLICE.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def whole_name(name: str) -> str:
    """Returns the name that the model has for a parameter, or for what it is a slice of."""
    return split_name(name)[0]


def slice_index(text: str, shape: Iterable[int]) -> int | None:
    """Returns the expert that is named between brackets; `None` if this shape does not have it."""
    sizes = tuple(shape)
    is_number = len(sizes) == 3 and text.isascii() and text.isdecimal() and len(text) < 10
    # Written in one way only: a parameter has one name.
    there = is_number and str(int(text)) == text and int(text) < sizes[0]
    return int(text) if there else None


def whole_of(parameter: nn.Parameter) -> nn.Parameter:
    """Returns the model's own parameter: what a slice is part of, or the parameter itself."""
    return parameter.whole if isinstance(parameter, ParameterSlice) else parameter


def parameters_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Returns a model's parameters and slices of these names; what it does not have is left out."""
    return named_among(dict(model.named_parameters()), names)


def named_among(
    everything: Mapping[str, nn.Parameter], names: Iterable[str]
) -> dict[str, nn.Parameter]:
    """Returns the parameters and slices of these names, of a model's parameters by name."""
    found: dict[str, nn.Parameter] = {}
    for name in names:
        base, text = split_name(name)
        if name in everything:
            found[name] = everything[name]
        elif text is not None and base in everything:
            index = slice_index(text, everything[base].shape)
            if index is not None:
                found[name] = parameter_slice(everything[base], index)
    return found


def slices_joined(
    values: Mapping[str, torch.Tensor], wholes: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns values by the names that a model itself has, for programs that know no slices.

    Args:
        values: Values of parameters and of slices.
        wholes: What there is of fused parameters, by name; slices are put into copies of these.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        whole, expert = split_name(name)
        if expert is None or whole not in wholes:
            found[name] = value
            continue
        if whole not in found:
            found[whole] = wholes[whole].detach().clone()
        found[whole][int(expert)] = value
    return found


def names_beside(
    names: Iterable[str], edited: Collection[str], n_experts: Callable[[str], int]
) -> list[str]:
    """Returns which of a model's parameters stay as they are when `edited` are changed.

    Of a fused parameter some of whose slices are edited, these are its other slices.

    Args:
        names: The names of all parameters.
        edited: Those of the parameters and slices that are edited.
        n_experts: Gives how many slices a fused parameter has.
    """
    wholes = {whole_name(name) for name in edited}
    found: list[str] = []
    for name in names:
        in_slices = name in wholes and name not in edited
        found += [f"{name}[{i}]" for i in range(n_experts(name))] if in_slices else [name]
    return [name for name in found if name not in edited]


@contextmanager
def gradients_of_slices(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context manager in which a slice among `parameters` gets its share of each gradient.

    That of the fused parameter, which has to require one, is let go of as soon as it is made.
    """
    slices: dict[int, list[ParameterSlice]] = {}
    for parameter in parameters:
        if isinstance(parameter, ParameterSlice):
            slices.setdefault(id(parameter.whole), []).append(parameter)
    held = [(own[0].whole, own[0].whole.grad) for own in slices.values()]
    hooks = []
    try:
        for whole, _ in held:
            whole.grad = None
            share = _sharing(slices[id(whole)])
            hooks.append(whole.register_post_accumulate_grad_hook(share))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for whole, gradient in held:
            whole.grad = gradient


def _sharing(slices: list[ParameterSlice]) -> Callable[[torch.Tensor], None]:
    """Returns the hook that hands a fused parameter's gradient on to its slices."""

    def share(whole: torch.Tensor) -> None:
        assert whole.grad is not None
        for one in slices:
            part = whole.grad[one.expert]
            # A copy: a view would keep all experts' gradients alive.
            one.grad = part.clone() if one.grad is None else one.grad + part
        whole.grad = None

    return share
