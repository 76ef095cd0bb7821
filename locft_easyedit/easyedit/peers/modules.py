"""What EasyEdit calls the parts of a model, found by looking at the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ...modeling.places import LayerList, find_layers
from .published import BATCHED, MODULE_KEYS

_MLP_OUTPUTS = (
    "mlp.down_proj",  # llama, mistral, qwen, gemma, phi3
    "mlp.c_proj",  # gpt2
    "mlp.fc_out",  # gptj
    "mlp.dense_4h_to_h",  # gpt_neox, falcon, bloom
    "mlp.fc2",  # phi
    "feed_forward.w2",  # internlm2
    "fc2",  # opt
)
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
_ATTENTION_OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense", "wo")
_ATTENTION_INPUTS = (
    ("q_proj", "v_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("wqkv",),
)
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


def module_names(
    method: str, model: Any, stack: LayerList, i: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns EasyEdit's names of modules, as in layer `i`, and a problem for each not found."""
    layer, template = stack.layers[i], f"{stack.path}.{{}}"
    names, missing = {"layer_module_tmp": template}, {}
    output = mlp_output(layer)
    experts = next((n for n, _ in layer.named_parameters() if n.endswith("experts.down_proj")), "")
    if output:
        names["mlp_module_tmp"] = f"{template}.{output.rpartition('.')[0] or output}"
        # FT looks for parameters by this name, the others for the module.
        suffix = ".weight" if method == "FT" else ""
        names["rewrite_module_tmp"] = f"{template}.{output}{suffix}"
    elif method == "FT" and experts:
        names["mlp_module_tmp"] = f"{template}.{experts.partition('.')[0]}"
        names["rewrite_module_tmp"] = f"{template}.{experts}"
    else:
        inside = [name for name, _ in layer.named_parameters()]
        missing["rewrite_module_tmp"] = _not_found(
            f"an output projection of the MLP in layer {i}", inside
        ) + (
            " A mixture of experts has one in each expert; compare with FT or LoRA."
            if any("expert" in name for name in inside)
            else " Name it as `rewrite_module_tmp`."
        )
    attention = _first(layer, _ATTENTIONS)
    names["attn_module_tmp"] = f"{template}.{attention}" if attention else template
    around, _, _ = stack.path.rpartition(".")
    norm = _first(model.get_submodule(around), _FINAL_NORMS)
    if norm:
        names["ln_f_module"] = f"{around}.{norm}".lstrip(".")
    else:
        beside = [name for name, _ in model.get_submodule(around).named_children()]
        missing["ln_f_module"] = _not_found("the final norm", beside) + " Name it as `ln_f_module`."
    head = _output_embedding(model)
    if head:
        names["lm_head_module"] = head
    else:
        missing["lm_head_module"] = (
            _not_found("the output embedding", []) + " Name it as `lm_head_module`."
        )
    return names, missing


def easyedit_name(model: Any) -> str:
    """Returns the `model_name` with which EasyEdit takes the right path for this model.

    EasyEdit tells models apart by substrings of `model_name`: AlphaEdit takes the width of the
    keys from a matrix stored as [in, out] for `gpt2-xl`, as [out, in] for `llama`, and fails for
    names without either (mistral, gpt-j); FT and LoRA have paths of their own for t5 and chatglm.
    How the matrix is stored decides, so every other model goes by `llama`.
    """
    stack = find_layers(model)
    layer = stack.layers[0] if stack and len(stack.layers) else model
    output = mlp_output(layer)
    return "gpt2-xl" if output and _is_conv1d(layer.get_submodule(output)) else "llama"


def attention_inputs(stack: LayerList) -> tuple[list[str], str]:
    """Returns the names of the query and value projections, or else a problem."""
    inside = dict.fromkeys(
        name.rpartition(".")[2] for layer in stack.layers for name, _ in layer.named_modules()
    )
    found = [list(names) for names in _ATTENTION_INPUTS if set(names) <= set(inside)]
    if found:
        return found[0], ""
    what = _not_found("query and value projections", [name for name in inside if name])
    return [], what + " Name them as `target_modules`."


def model_label(model: Any) -> str:
    """Returns what to call the model in a message."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def caveats(method: str, model: Any, layers: Collection[int]) -> list[str]:
    """Returns a line for each way in which the model is not as EasyEdit's method supposes."""
    if method == "LoRA" or method == "FT":
        return []
    lines = []
    if method in BATCHED and getattr(
        model.config.get_text_config(), "final_logit_softcapping", None
    ):
        lines.append(f"{method} computes logits itself, without this model's softcapping of them.")
    stack = find_layers(model)
    if stack and any(hasattr(stack.layers[i], "post_feedforward_layernorm") for i in layers):
        lines.append(
            f"{method} supposes that nothing follows the MLP; this model has a norm there."
        )
    return lines


def value_problems(method: str, model: Any, values: Mapping[str, Any]) -> list[str]:
    """Returns a line for each of the well-typed `values` with which the method would fail."""
    stack = find_layers(model)
    n = len(stack.layers) if stack else 0
    layers: list[int] = values["layers"]
    outside = [i for i in (*layers, values.get("v_loss_layer", 0)) if not 0 <= i < n]
    problems = []
    if outside:
        problems.append(
            f"Layers {outside} are out of range; {model_label(model)} has {n} (0 to {n - 1}). "
            "Choose `layers` and `v_loss_layer` among them."
        )
    if (not layers and method != "LoRA") or len(set(layers)) < len(layers):
        problems.append(f"`layers={layers}` must name at least one layer, and none twice.")
    modules = dict(model.named_modules())
    for key in (key for key in MODULE_KEYS if key in values):
        template = values[key]
        for i in [i for i in layers if i not in outside][: None if "{}" in template else 1]:
            name = template.replace("{}", str(i))
            if method == "FT" and key == "rewrite_module_tmp":
                problems += _parameter_problems(model, stack, key, template, i)
            elif name not in modules:
                problems.append(f"`{key}={template!r}`: there is no module `{name}`. Correct it.")
    if values.get("mom2_dtype", "float32") != "float32":
        problems.append("`mom2_dtype` must be float32, as key covariances are written.")
    return problems


def mlp_output(layer: nn.Module) -> str:
    """Returns the name of the MLP's output projection in a layer; empty if there is no such."""
    return _first(layer, _MLP_OUTPUTS, _is_matrix)


def attention_output(layer: nn.Module) -> str:
    """Returns the name of the attention's output projection; the attention's if there is none."""
    attention = _first(layer, _ATTENTIONS)
    names = [f"{attention}.{name}" for name in _ATTENTION_OUTPUTS]
    return _first(layer, names, _is_matrix) or attention


def _is_conv1d(module: nn.Module) -> bool:
    """Says whether the module's matrix is stored as [in, out], as gpt2's are."""
    return type(module).__name__ == "Conv1D"


def _parameter_problems(
    model: Any, stack: LayerList | None, key: str, template: str, i: int
) -> list[str]:
    """Returns why FT, which takes every parameter with the name in its name, would fail."""
    name = template.replace("{}", str(i))
    matches = [parameter for parameter, _ in model.named_parameters() if name in parameter]
    if not matches:
        return [f"`{key}={template!r}`: no parameter has `{name}` in its name. Correct it."]
    inside = f"{stack.path}.{i}." if stack else ""
    strays = [match for match in matches if not match.startswith(inside)]
    if strays and "{}" in template:
        return [f"`{key}={template!r}` for layer {i} is also in `{strays[0]}`. End it with a dot."]
    return []


def _output_embedding(model: Any) -> str:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # A shared matrix goes by the embedding's name in `named_parameters`, where EasyEdit looks.
    if head is not None and getattr(embedding, "weight", None) is head.weight:
        head = embedding
    return next((name for name, module in model.named_modules() if module is head), "")


def _first(
    module: nn.Module, names: Collection[str], holds: Callable[[nn.Module], bool] | None = None
) -> str:
    """Returns the first of `names` that is a module below `module`; empty if none is."""
    inside = dict(module.named_modules())
    return next((n for n in names if n in inside and (holds is None or holds(inside[n]))), "")


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 2


def _not_found(what: str, among: list[str]) -> str:
    shown = f" among {', '.join(among[:20])}" if among else ""
    return f"{what}: not found{shown}."
