"""Values of EasyEdit's methods that depend on the model and on the run, and why each is so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import LocFTError, one_message
from ...modeling.places import LayerList, find_layers
from .modules import (
    attention_inputs,
    attention_output,
    easyedit_name,
    mlp_output,
    model_label,
    module_names,
)
from .published import BATCHED, VALUES, VALUES_LAYERS, scaled_layers
from .yamls import scaled_parameters

LARGEST_BATCH = 100
_PRECISION = "the model is loaded already, in its own precision"


class PeerError(LocFTError):
    """A method of EasyEdit cannot be set up for this model, or with these values."""


class Rule(NamedTuple):
    """A value that depends on the model or on the run, and why it is what it is."""

    key: str
    value: Any
    why: str


def runtime_rules(
    model: Any, device: int | str | torch.device, stats_dir: str | Path, corpus: str, n: int
) -> list[Rule]:
    """Returns the values that say which model, device and files this run uses."""
    number = "0" if str(device) == "cuda" else str(device).removeprefix("cuda:")
    where = "key covariances of this very model, measured on this run's corpus"
    return [
        Rule("model_name", easyedit_name(model), "the path in EasyEdit's code for such a model"),
        Rule("device", int(number) if number.isdigit() else number, ""),
        Rule("stats_dir", str(stats_dir), where),
        Rule("mom2_dataset", corpus, where),
        Rule("mom2_n_samples", n, "documents in that corpus"),
        Rule("P_loc", "null_space_project.pt", "where AlphaEdit itself saves it"),
    ]


def model_rules(
    method: str, model: Any, n_edits: int, layers: list[int] | None
) -> tuple[list[Rule], dict[str, str]]:
    """Returns the values that depend on the model, and a problem for each key without one."""
    stack = _layers_of(model)
    n = len(stack.layers)
    if method == "LoRA":
        targets, problem = attention_inputs(stack)
        why = "peft's AdaLoRA needs `total_step`, which EasyEdit does not give"
        rules = [Rule("lora_type", "lora", why)]
        if problem:
            return rules, {"target_modules": problem}
        return [*rules, Rule("target_modules", targets, "the attention of this model")], {}
    published = VALUES[method]["layers"]
    scaled = scaled_layers(published, n)
    why = f"the depth of {published} in {VALUES_LAYERS} layers, here in {n}"
    rules = [Rule("layers", scaled, why)]
    if method == "FT":
        why = "FT-M; prompt_last would train every target token at the prompt's last position"
        rules.append(Rule("objective_optimization", "target_new", why))
    else:
        rules.append(_last_layer(stack))
    if method == "ROME":
        rules.append(Rule("fp16", False, _PRECISION))
    rules += _batch_rules(method, n_edits)
    chosen = [i for i in layers or scaled if 0 <= i < n] or scaled
    names, missing = module_names(method, model, stack, chosen[0])
    rules += _named(names)
    return rules, missing


def yaml_rules(
    method: str, model: Any, values: Mapping[str, Any], n_edits: int, n_layers: int
) -> list[Rule]:
    """Returns what is set anew in a published YAML, made for a model of `n_layers` layers.

    Raises:
        PeerError: The model lacks a module that the method needs.
    """
    stack = _layers_of(model)
    why = f"the depth of EasyEdit's choice in {n_layers} layers, here in {len(stack.layers)}"
    rules = [
        Rule("model_parallel", False, ""),
        Rule("use_chat_template", False, "prompts are asked as they stand"),
        Rule("fp16", False, ""),
        Rule("half", False, _PRECISION),
        _last_layer(stack),
    ]
    layers = [0]
    if values.get("layers"):
        layers = scaled_layers(values["layers"], len(stack.layers), n_layers)
        rules.append(Rule("layers", layers, why))
    weights = values.get("mom2_update_weight")
    if isinstance(weights, list):
        rules.append(Rule("mom2_update_weight", weights[: len(layers)], ""))
    names, missing = module_names(method, model, stack, layers[0])
    if missing and any(key in values for key in missing):
        title = f"{method} cannot be set up for {model_label(model)}:"
        raise PeerError(one_message(title, list(missing.values())))
    layer = stack.layers[layers[0]]
    output = mlp_output(layer)
    if values.get("mlp_module_tmp") == values.get("rewrite_module_tmp"):
        names["mlp_module_tmp"] = names.get("rewrite_module_tmp", "")
        names["attn_module_tmp"] = f"{names['layer_module_tmp']}.{attention_output(layer)}"
    rules += _named(names)
    if "rewrite_module_tmps" in values:
        rules.append(Rule("rewrite_module_tmps", [names["rewrite_module_tmp"]], ""))
    if "inner_params" in values:
        inner = scaled_parameters(
            values["inner_params"], stack, n_layers, {"mlp.down_proj": output} if output else {}
        )
        rules.append(Rule("inner_params", inner, why))
    rules += _batch_rules(method, n_edits)
    return rules


def _layers_of(model: Any) -> LayerList:
    stack = find_layers(model)
    if stack is None or not len(stack.layers):
        raise PeerError(f"{model_label(model)} has no list of layers to edit. Take another model.")
    return stack


def note(rule: Rule) -> str:
    """Returns a rule in words."""
    return f"{rule.key}={rule.value!r}: {rule.why}"


def _last_layer(stack: LayerList) -> Rule:
    return Rule("v_loss_layer", len(stack.layers) - 1, "the last layer")


def _batch_rules(method: str, n_edits: int) -> list[Rule]:
    size = min(n_edits, LARGEST_BATCH)
    why = f"{n_edits} edits, at most {LARGEST_BATCH} at once"
    return [Rule("batch_size", size, why)] if method in BATCHED else []


def _named(names: Mapping[str, str]) -> list[Rule]:
    return [Rule(key, name, "from this model's modules") for key, name in names.items()]
