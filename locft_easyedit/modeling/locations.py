"""The places of a model that can be named: every module of every layer, with its templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError
from .places import find_layers

# What models call the matrices of a layer, by the part they play in it.
_ATTENTION = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "wqkv"),
    "o": ("o_proj", "c_proj", "out_proj", "dense", "wo"),
}
_MLP = {
    "gate": ("gate_proj",),
    "up": ("up_proj", "c_fc", "fc_in", "fc1", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h"),
}
# Of the expert of a mixture that gets all tokens.
_SHARED = {f"shared_{role}": names for role, names in _MLP.items()}
# Of one routed expert, by what the module of all of them is called.
EXPERT = {role: f"expert_{role}" for role in _MLP}
WHOLE = ("mlp", "layer")
MODULES = (*_ATTENTION, *_MLP, *_SHARED, *EXPERT.values(), *WHOLE)
_ATTENTION_NAMES = ("attn", "attention")


@dataclass(frozen=True, order=True)
class Location:
    """One place of a model.

    Attributes:
        layer: The layer, counted from 0.
        module: What is trained in it: one of `MODULES`.
        templates: The `rewrite_module_tmp` that selects it.
    """

    layer: int
    module: str
    templates: tuple[str, ...]

    @property
    def rewrite_module_tmp(self) -> str | list[str]:
        """The templates as a YAML has them."""
        return self.templates[0] if len(self.templates) == 1 else list(self.templates)

    def __str__(self) -> str:
        return f"layer {self.layer} {self.module}"


def find_locations(model: Any) -> list[Location]:
    """Returns every place of a model, by layer and in the order of `MODULES`.

    A module that a layer does not have (a fused query-key-value projection in place of three) is
    simply absent. The routed experts of a mixture are one place together, and the expert that all
    tokens share is another (`shared_down`). Which single expert is worth a trial (`expert_down`) is
    for a backward pass to tell. Weights need not be loaded.

    Raises:
        ModelError: The model's layers cannot be found.
    """
    stack = find_layers(model)
    if stack is None:
        raise ModelError(
            f"{type(model).__name__} has no list of layers as long as its configuration says. Name "
            "`layers` and `rewrite_module_tmp` by hand."
        )
    found = []
    for i, layer in enumerate(stack.layers):
        own = _modules_of(layer)
        found += [
            Location(i, module, tuple(f"{stack.path}.{{}}{path}" for path in own[module]))
            for module in MODULES
            if module in own
        ]
    return found


def _modules_of(layer: nn.Module) -> dict[str, list[str]]:
    """Returns what a layer has of `MODULES`: paths within it, each with a leading dot."""
    found: dict[str, list[str]] = {}
    for name, parameter in layer.named_parameters():
        path = name.removesuffix(".weight")
        module = _role(path) if parameter.ndim > 1 else None
        if module is not None:
            found.setdefault(module, []).append(f".{name}")
    mlp = {paths[0].split(".")[1] for role, paths in found.items() if role not in _ATTENTION}
    # Where the matrices are the layer's own children (OPT's), no module is the MLP.
    if len(mlp) == 1 and any(True for _ in layer.get_submodule(*mlp).children()):
        found["mlp"] = [f".{next(iter(mlp))}"]
    found["layer"] = [""]
    return found


def _role(path: str) -> str | None:
    """Returns which of a layer's modules the matrix at `path` is; `None` if it is none of them."""
    *above, last = path.split(".")
    in_attention = any(word in part for part in above for word in _ATTENTION_NAMES)
    shared = any("shared" in part for part in above)
    names = _ATTENTION if in_attention else _SHARED if shared else _MLP
    return next((role for role, known in names.items() if last in known), None)


def select_locations(
    locations: Sequence[Location],
    layers: Sequence[int] | None = None,
    modules: Sequence[str] | None = None,
) -> list[Location]:
    """Returns the places in some layers and modules; all layers, or modules, if `None`."""
    return [
        location
        for location in locations
        if (layers is None or location.layer in layers)
        and (modules is None or location.module in modules)
    ]
