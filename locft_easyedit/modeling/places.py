"""Localized selection: from layers and templates to exact parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import PlaceError, one_message
from .devices import text_config
from .parameter_slices import (
    ParameterSlice,
    parameter_slice,
    slice_index,
    split_name,
    whole_name,
    whole_of,
)

_ROUTED = ", whose experts get not all tokens, but those that the router gives each"


@dataclass(frozen=True)
class LayerList:
    """A model's stack of layers: the path of its `nn.ModuleList` and the list itself."""

    path: str
    layers: nn.ModuleList


@dataclass(frozen=True)
class Place:
    """What is trained.

    Attributes:
        parameters: The parameters by their full names; one expert of a fused parameter as a
            `ParameterSlice`, `NAME[INDEX]`.
        first_layer: The lowest layer that holds one of them, or `None` if one lies outside the
            stack of layers (an embedding, a final norm).
        stack: The model's stack of layers, or `None` if it was not found.
    """

    parameters: dict[str, nn.Parameter]
    first_layer: int | None
    stack: LayerList | None


def find_layers(model: nn.Module) -> LayerList | None:
    """Returns the `nn.ModuleList` whose length is the configuration's number of layers.

    Where there are several, that beside the input embedding counts, and not a list of another
    tower; of those the one nearest to the root. `None` if there is none.
    """
    n_layers = number_of_layers(model)
    found = [
        LayerList(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    ask: Any = getattr(model, "get_input_embeddings", lambda: None)
    embedding = ask()
    beside = next((path for path, m in model.named_modules() if m is embedding), "").split(".")

    def distance(stack: LayerList) -> tuple[int, int]:
        path = stack.path.split(".")
        shared = next(
            (i for i, (a, b) in enumerate(zip(path, beside, strict=False)) if a != b), len(path)
        )
        return -shared, len(path)

    return min(found, key=distance, default=None)


def number_of_layers(model: nn.Module) -> int | None:
    """Returns the number of layers that the model's configuration names, if it does.

    Where a layer has two attentions, `num_hidden_layers` counts these, and `num_layers` the layers.
    """
    config = text_config(model)
    return getattr(config, "num_layers", None) or getattr(config, "num_hidden_layers", None)


def select_place(model: nn.Module, layers: Sequence[int], templates: Sequence[str]) -> Place:
    """Returns the parameters that `layers` and `templates` name.

    A template names a parameter (`model.layers.{}.mlp.down_proj.weight`) or a module with all its
    parameters (`model.layers.{}`, also written `model.layers.{}.`). Whole path components are
    compared: layer 2 is never taken for layer 20. `model.layers.{}.mlp.experts.down_proj[3]` is
    expert 3 of a fused parameter, [E, out, in].

    Args:
        model: The model.
        layers: Layers, counted from 0.
        templates: Templates with `{}` for the layer.

    Raises:
        PlaceError: A layer is out of range, a template matches nothing or an expert that is not
            there, or a parameter is quantized, tied, or not loaded. All such problems in one error.
    """
    selected, problems = _match(model, layers, templates)
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    stack = find_layers(model)
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in everywhere.items():
        names[_memory(parameter)].append(name)
    for name, parameter in selected.items():
        whole = whole_of(parameter)
        others = [other for other in names[_memory(whole)] if other != whole_name(name)]
        problems += _untrainable(name, whole, others)
    if problems:
        raise PlaceError(one_message("Nothing is trained:", problems))
    return Place(selected, first_layer_of(selected, stack), stack)


def match_parameters(
    model: nn.Module, layers: Sequence[int], templates: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Returns what `select_place` selects, trainable or not; weights need not be loaded.

    Raises:
        PlaceError: A layer is out of range, or a template matches nothing or an expert that is not
            there.
    """
    selected, problems = _match(model, layers, templates)
    if problems:
        raise PlaceError(one_message("Nothing is trained:", problems))
    return selected


def _match(
    model: nn.Module, layers: Sequence[int], templates: Sequence[str]
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Returns the parameters that match, and a line for each layer or template that does not."""
    stack = find_layers(model)
    n_layers = number_of_layers(model) if stack is None else len(stack.layers)
    outside = [layer for layer in layers if n_layers is not None and not 0 <= layer < n_layers]
    problems = []
    if outside:
        problems.append(
            f"`layers={outside}` is out of range; {_model_name(model)} has {n_layers} layers "
            f"(0 to {(n_layers or 1) - 1}). Choose among them."
        )
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    selected: dict[str, nn.Parameter] = {}
    for layer in (layer for layer in layers if layer not in outside):
        for template in templates:
            path, expert = split_name(template.replace("{}", str(layer)).strip("."))
            wanted = path.split(".")
            matches = {
                name: parameter
                for name, parameter in everywhere.items()
                if name.split(".")[: len(wanted)] == wanted
            }
            if not matches:
                problems.append(_no_match(model, template, layer, stack))
            elif expert is None:
                selected |= matches
            elif problem := _no_expert(template, path, expert, matches):
                problems.append(problem)
            else:
                part = parameter_slice(matches[path], int(expert))
                selected.setdefault(f"{path}[{expert}]", part)
    return selected, problems + [
        f"`{name}` is a part of `{whole_name(name)}`, which is selected as well. Name one of them."
        for name, parameter in selected.items()
        if isinstance(parameter, ParameterSlice) and whole_name(name) in selected
    ]


def _no_expert(
    template: str, path: str, expert: str, matches: Mapping[str, nn.Parameter]
) -> str | None:
    """Returns why a template names no expert of a fused parameter; `None` if it does."""
    asked = f"`rewrite_module_tmp={template!r}`"
    shape = tuple(matches[path].shape) if path in matches else ()
    if len(shape) != 3:
        what = f"a parameter of shape {list(shape)}" if shape else "a module"
        return (
            f"{asked} names one expert of `{path}`, and that is {what}, not the matrices of all "
            f"experts, [experts, out, in]. Leave out `[{expert}]`."
        )
    if slice_index(expert, shape) is None:
        return (
            f"{asked} names expert {expert!r}; `{path}` has {shape[0]} experts (0 to "
            f"{shape[0] - 1}). Choose among them."
        )
    return None


def _model_name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__


def _no_match(model: nn.Module, template: str, layer: int, stack: LayerList | None) -> str:
    path = split_name(template.replace("{}", str(layer)).strip("."))[0].removesuffix(".weight")
    if any(name.startswith(path + ".qweight") for name, _ in model.named_buffers()):
        return f"`{path}` is quantized (it has `qweight`); load the model unquantized."
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    prefix = f"{stack.path}.{layer}." if stack else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    shown = ", ".join(inside[:40]) + (", ..." if len(inside) > 40 else "")
    where = f"`{stack.path}.{{}}` has: {shown}" if stack else f"The model has: {shown}"
    return (
        f"`rewrite_module_tmp={template!r}` matches nothing in layer {layer}. {where}. "
        "Choose among them."
    )


def _untrainable(name: str, parameter: nn.Parameter, tied: Sequence[str]) -> Iterator[str]:
    """Yields why a parameter cannot be trained, if so; `tied` are the other names it has."""
    if parameter.is_meta:
        yield f"`{name}` is not loaded (meta device). Load the model's weights first."
    elif not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
        kind = "quantized" if hasattr(parameter, "quant_state") else str(parameter.dtype)
        yield f"`{name}` is {kind}; only floating-point weights train. Load it unquantized."
    elif parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield f"`{name}` is {parameter.dtype}; train float32, bfloat16 or float16 weights."
    elif tied:
        others = ", ".join(tied)
        yield f"`{name}` is tied to {others}; an edit would change both. Choose another place."


def _memory(parameter: nn.Parameter) -> int:
    """Returns what two names have in common when they share their numbers."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr()


def first_layer_of(selected: Iterable[str], stack: LayerList | None) -> int | None:
    """Returns the lowest layer of the parameters with these names; `None` if one lies outside."""
    if stack is None:
        return None
    layers = []
    for name in selected:
        if not name.startswith(stack.path + "."):
            return None
        layers.append(int(name[len(stack.path) + 1 :].split(".")[0]))
    return min(layers)


def unsuitable(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], why: str, remedy: str
) -> dict[str, str]:
    """Returns a complaint for each parameter that is not the weight of a linear layer.

    Args:
        model: The model; its weights need not be loaded.
        parameters: The parameters by name.
        why: What such a parameter cannot have, as the end of a sentence.
        remedy: What to set where no other place is wanted.
    """
    return {
        name: f"`{name}` is no matrix of a linear layer (it belongs to {type(module).__name__}"
        f"{_ROUTED if whole_of(parameters[name]).ndim == 3 else ''}), and {why}. Name matrices in "
        '`rewrite_module_tmp`, for example "model.layers.{}.mlp.down_proj.weight", or set '
        f"{remedy}."
        for name, module in ((name, owner(model, name)) for name in parameters)
        if not is_linear_weight(model, name)
    }


def is_linear_weight(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the matrix of a linear layer."""
    return name.endswith(".weight") and isinstance(owner(model, name), (nn.Linear, Conv1D))


def owner(model: nn.Module, name: str) -> nn.Module:
    """Returns the module that a parameter belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def sides(module: nn.Module) -> tuple[int, int]:
    """Returns a linear module's (out, in)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def check_low_rank(model: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int) -> None:
    """Checks that LoRA of this rank can be trained at a place; weights need not be loaded.

    Raises:
        PlaceError: Lists every parameter that is not the weight of a linear layer, and every one
            whose smaller side is below the rank.
    """
    problems = unsuitable(model, parameters, "LoRA changes nothing else", remedy="`tuning: full`")
    for name, parameter in parameters.items():
        if name not in problems and rank > min(parameter.shape):
            shape = " x ".join(str(n) for n in parameter.shape)
            problems[name] = (
                f"`lora_rank={rank}` is above {min(parameter.shape)}, the largest rank that "
                f"`{name}` ({shape}) can have. Lower it, or set `tuning: full`."
            )
    if problems:
        raise PlaceError(
            one_message("`tuning: lora` cannot be trained here:", [*problems.values()])
        )
