"""Localized selection: from layers and templates to exact parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .errors import PlaceError, one_message


@dataclass(frozen=True)
class LayerList:
    """A model's stack of layers: the path of its `nn.ModuleList` and the list itself."""

    path: str
    layers: nn.ModuleList


@dataclass(frozen=True)
class Place:
    """What is trained.

    Attributes:
        parameters: The parameters by their full names.
        first_layer: The lowest layer that holds one of them, or `None` if one lies outside the
            stack of layers (an embedding, a final norm).
        stack: The model's stack of layers, or `None` if it was not found.
    """

    parameters: dict[str, nn.Parameter]
    first_layer: int | None
    stack: LayerList | None


def find_layers(model: nn.Module) -> LayerList | None:
    """Returns the `nn.ModuleList` whose length is the configuration's number of layers.

    The list nearest to the root counts where there are several. `None` if there is none.
    """
    n_layers = number_of_layers(model)
    found = [
        LayerList(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    return min(found, key=lambda stack: stack.path.count("."), default=None)


def number_of_layers(model: nn.Module) -> int | None:
    """Returns the number of layers that the model's configuration names, if it does."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "num_hidden_layers", None)


def select_place(model: nn.Module, layers: Sequence[int], templates: Sequence[str]) -> Place:
    """Returns the parameters that `layers` and `templates` name.

    A template names a parameter (`model.layers.{}.mlp.down_proj.weight`) or a module with all its
    parameters (`model.layers.{}`, also written `model.layers.{}.`). Whole path components are
    compared: layer 2 is never taken for layer 20.

    Args:
        model: The model.
        layers: Layers, counted from 0.
        templates: Templates with `{}` for the layer.

    Raises:
        PlaceError: A layer is out of range, a template matches nothing, or a parameter is
            quantized, tied, or not loaded. All such problems in one error.
    """
    selected, problems = _match(model, layers, templates)
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    stack = find_layers(model)
    owners = Counter(_memory(parameter) for parameter in everywhere.values())
    problems += [
        problem
        for name, parameter in selected.items()
        if (problem := _untrainable(name, parameter, everywhere, owners))
    ]
    if problems:
        raise PlaceError(one_message("Nothing is trained:", problems))
    return Place(selected, first_layer_of(selected, stack), stack)


def match_parameters(
    model: nn.Module, layers: Sequence[int], templates: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Returns the parameters that `layers` and `templates` name, trainable or not.

    Args:
        model: The model; its weights need not be loaded.
        layers: Layers, counted from 0.
        templates: Templates with `{}` for the layer.

    Raises:
        PlaceError: A layer is out of range, or a template matches nothing.
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
            wanted = template.replace("{}", str(layer)).strip(".").split(".")
            matches = {
                name: parameter
                for name, parameter in everywhere.items()
                if name.split(".")[: len(wanted)] == wanted
            }
            if not matches:
                problems.append(_no_match(model, template, layer, stack))
            selected |= matches
    return selected, problems


def _model_name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or type(model).__name__


def _no_match(model: nn.Module, template: str, layer: int, stack: LayerList | None) -> str:
    path = template.replace("{}", str(layer)).strip(".").removesuffix(".weight")
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


def _untrainable(
    name: str, parameter: nn.Parameter, everywhere: dict[str, nn.Parameter], owners: Counter[int]
) -> str | None:
    """Returns why a parameter cannot be trained, or `None`."""
    if parameter.is_meta:
        return f"`{name}` is not loaded (meta device). Load the model's weights first."
    if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
        kind = "quantized" if hasattr(parameter, "quant_state") else str(parameter.dtype)
        return f"`{name}` is {kind}; only floating-point weights train. Load it unquantized."
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"`{name}` is {parameter.dtype}; train float32, bfloat16 or float16 weights."
    if owners[_memory(parameter)] > 1:
        others = [
            o for o, p in everywhere.items() if o != name and _memory(p) == _memory(parameter)
        ]
        tied = ", ".join(others)
        return f"`{name}` is tied to {tied}; an edit would change both. Choose another place."
    return None


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
