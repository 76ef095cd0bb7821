"""EasyEdit's published values for its own methods, and the types of their keys."""

from __future__ import annotations

import math
from typing import Any

PEERS = ("FT", "LoRA", "ROME", "MEMIT", "AlphaEdit")
# Methods that make several edits in one call.
BATCHED = (
    *("MEMIT", "AlphaEdit", "MEMIT-FE", "PMET", "EMMET", "EAMET", "SPHERE", "CORE", "UltraEdit"),
)
# What EasyEdit's FT does with the objective that it is given here goes by a name of its own.
ALIASES = {"FT-M": "FT"}

# Values of EasyEdit's YAMLs that depend on no model; layers are those of the 32 in these Llamas:
# hparams/METHOD/llama3-8b.yaml, of MEMIT llama-7b.yaml.
VALUES_LAYERS = 32
_LOCATED = {
    "fact_token": "subject_last",
    "v_num_grad_steps": 25,
    "v_lr": 0.5,
    "v_loss_layer": 31,
    "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4.0,
    "kl_factor": 0.0625,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100_000,
    "mom2_dtype": "float32",
    "stats_dir": "./data/stats",
}
_SPREAD = _LOCATED | {
    "layers": [4, 5, 6, 7, 8],
    "layer_selection": "all",
    "mom2_adjustment": True,
    "mom2_update_weight": 15_000.0,
}
VALUES: dict[str, dict[str, Any]] = {
    "FT": {
        "layers": [21],
        "num_steps": 25,
        "batch_size": 1,
        "max_length": 40,
        "lr": 5e-4,
        "weight_decay": 0.0,
        "kl_factor": 0.0,
        "norm_constraint": False,
        "objective_optimization": "prompt_last",
        "model_parallel": False,
    },
    "LoRA": {
        "lora_type": "adalora",
        "layers": [],
        "num_steps": 70,
        "batch_size": 1,
        "max_length": 50,
        "lr": 5e-3,
        "weight_decay": 0.0,
        "kl_factor": 0.0,
        "rank": 8,
        "lora_alpha": 32.0,
        "lora_dropout": 0.1,
        "norm_constraint": False,
        "target_modules": ["q_proj", "v_proj"],
        "model_parallel": False,
    },
    "ROME": _LOCATED
    | {
        "layers": [5],
        "mom2_adjustment": False,
        "context_template_length_params": [[5, 10], [10, 10]],
        "model_parallel": False,
        "fp16": True,
    },
    "MEMIT": _SPREAD | {"model_parallel": False},
    "AlphaEdit": _SPREAD
    | {
        "v_lr": 0.1,
        "v_weight_decay": 0.5,
        "clamp_norm_factor": 0.75,
        "nullspace_threshold": 2e-2,
        "L2": 1.0,
        "P_loc": "./null_space_project.pt",
    },
}
# Defaults of EasyEdit's classes, for keys that not every YAML has.
DEFAULTS = {"max_length": 40, "model_parallel": False}
# What EasyEdit does where a hyper-parameter class does not have the key, as in its release.
WITHOUT_THE_KEY = {
    "model_parallel": False,
    "fp16": False,
    "objective_optimization": "prompt_last",
    "lora_type": "adalora",
}

MODULE_KEYS = (
    "rewrite_module_tmp",
    "layer_module_tmp",
    "mlp_module_tmp",
    "attn_module_tmp",
    "ln_f_module",
    "lm_head_module",
)
_WHOLE = frozenset(
    [
        *("num_steps", "v_num_grad_steps", "v_loss_layer", "mom2_n_samples", "rank"),
        *("batch_size", "max_length"),
    ]
)
_NUMBERS = frozenset(
    [
        *("lr", "weight_decay", "kl_factor", "v_lr", "v_weight_decay", "clamp_norm_factor"),
        *("mom2_update_weight", "nullspace_threshold", "L2", "lora_alpha", "lora_dropout"),
    ]
)
_FLAGS = frozenset(["mom2_adjustment", "model_parallel", "fp16"])


def scaled_layers(layers: list[int], n_layers: int, of: int = VALUES_LAYERS) -> list[int]:
    """Returns consecutive layers that end at the depth where `layers` end in `of` layers.

    As many as `layers`, or fewer where fewer lie between the depths of their first and last.
    """
    last = min(math.floor(layers[-1] * n_layers / of + 0.5), n_layers - 1)
    lowest = math.floor(layers[0] * n_layers / of)
    return list(range(max(min(lowest, last), last - len(layers) + 1), last + 1))


def typed(key: str, value: Any) -> Any:
    """Returns `value` as the key's type; numbers may be texts, as YAML leaves `5e-4`.

    Raises:
        TypeError: It is of another type.
        ValueError: It is no finite number, or not whole where that is needed.
    """
    if key in _WHOLE:
        return _whole(value)
    if key in _NUMBERS or (key == "norm_constraint" and value is not False):
        return _number(value)
    if key in _FLAGS or key == "norm_constraint":
        return _of(bool, value)
    if key == "layers":
        return [_whole(layer) for layer in _of(list, value)]
    if key == "target_modules":
        return [_of(str, name) for name in _of(list, value)]
    if key == "context_template_length_params":
        return [[_whole(n) for n in _of(list, pair)] for pair in _of(list, value)]
    if key == "device" and not isinstance(value, str):
        return _whole(value)
    return _of(str, value)


def allowed(key: str) -> str:
    """Returns what the key's type allows, in words."""
    kinds = {
        "layers": "a list of whole numbers, for example [5]",
        "target_modules": "a list of names, for example [q_proj, v_proj]",
        "context_template_length_params": "a list of pairs, for example [[5, 10], [10, 10]]",
        "norm_constraint": "a number, or false",
        "device": "cpu, or the number of a GPU",
    }
    if key in _WHOLE:
        return "a whole number"
    if key in _NUMBERS:
        return "a number"
    return "true or false" if key in _FLAGS else kinds.get(key, "a text")


def number_if_it_is_one(value: Any) -> Any:
    """Returns a text such as '5e-4', which YAML does not take for a number, as EasyEdit does."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    if _number(value) != int(_number(value)):
        raise ValueError
    return int(_number(value))
