"""What the values of hyper-parameters must be: a rule for each."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, List  # noqa: UP035

from .utils.parsing import shown

ALG_NAME = "LocFT-BF"
# The preset: the published method with `forms` and `preserve` on.
PLUS_NAME = "LocFT-BF+"
ALG_NAMES = (ALG_NAME, PLUS_NAME)
SAMPLED, NEIGHBOURS = "sampled", "neighbours"  # what `preserve` takes besides files
EDITED, ENDPOINT = "edited", "endpoint:"  # what `augment_model` takes besides folders
# The forms that `forms` takes: how an edit's prompt is put to the model.
PLAIN, CHAT, QUESTION_ANSWER, CONTEXT = FORMS = ("plain", "chat", "question_answer", "context")
AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")  # names of torch's
ON_CONFLICT = ("train", "error", "last")
CUTS = ("matrix", "mlp", "layer")
QUANTIZED = ("8bit", "4bit")
TUNING = ("full", "lora")
BREADTH_FIRST, DEPTH_FIRST = PIPELINES = ("breadth_first", "depth_first")
EDIT, TOKEN = LOSS_AVERAGES = ("edit", "token")
CONSTANT, COSINE = LR_SCHEDULES = ("constant", "cosine")
EVALUATION_TYPES = ("LLM-judge", "generate-text")
_COUNTS = (
    "num_steps",
    "batch_size",
    "min_batches",
    "repairs",
    "eval_batch_size",
    "max_length",
    "row_tokens",
    "micro_batch_size",
    "lora_rank",
    "forms_per_epoch",
)
# Fields that take the word `auto` besides values of their type; OmegaConf knows no such union.
OR_AUTO: dict[str, Any] = {"layers": List[int], "lr": float}  # noqa: UP006
# What is decided while the model is loaded.
_NEEDS_A_PLACE = {
    "quantize_frozen": "what is trained must stay whole when the model is loaded",
    "shard_frozen": "the layers to share out must be known when the model is loaded",
    "stream_frozen": "the layers to leave on disk must be known when the model is loaded",
}
_NO_RATE = (
    "`lr=auto` does not go with `tuning=lora`: rates are scaled from the size of the weights, and "
    "LoRA's matrices have another. Give a rate."
)
_MOST_STRENGTH = 1e6  # beyond it nothing is left of the directions that text uses
_MOST = 2**31  # of a count: what arrays are indexed with


Rule = tuple[str, Callable[[Any], bool], str]


def rules(values: Mapping[str, Any]) -> list[Rule]:
    """Returns each rule: its key, a test of that key's value, and what the value must be.

    Args:
        values: The well-typed values; a few rules look at another key's.
    """
    at_least_one = "must be 1 or more"
    off_at_zero = "must be 0 or more (0 turns it off)"
    return [
        ("alg_name", lambda v: v in ALG_NAMES, f"must be {ALG_NAME} or {PLUS_NAME}"),
        ("model_name", _is_model, "must be a folder, a hub name, or a loaded (model, tokenizer)"),
        ("layers", bool, "is empty; name at least one layer"),
        ("layers", lambda v: all(type(i) is int for i in v), "must be a list of whole numbers"),
        (
            "layers",
            lambda v: all(i >= 0 for i in v if type(i) is int),
            "has a negative layer; count from 0",
        ),
        ("layers", lambda v: len({str(i) for i in v}) == len(v), "names a layer twice"),
        ("lr", lambda v: math.isfinite(v) and v > 0, "must be above 0 and finite"),
        (
            "forms",
            lambda v: v is None or (all(one in FORMS for one in v) and len({*v}) == len(v)),
            f"must be a list of {', '.join(FORMS)}, each once, or null",
        ),
        (
            "augment_model",
            lambda v: v is None or bool(v.removeprefix(ENDPOINT).strip()),
            f"must be {EDITED}, the folder of a model, {ENDPOINT}NAME, or null",
        ),
        (
            "augment_cache",
            _is_path_or_null,
            "must be a file (a ~ in front stands for a home folder that there is), or null",
        ),
        (
            "preserve",
            lambda v: v is None or all(isinstance(one, str) and one.strip() for one in v),
            f"must list {SAMPLED}, {NEIGHBOURS} or paths of .txt, .json and .jsonl files",
        ),
        (
            "preserve",
            lambda v: v is None or len({str(one) for one in v}) == len(v),
            "names something twice",
        ),
        (
            "preserve_strength",
            lambda v: 0 < v <= _MOST_STRENGTH,
            f"must be above 0 and at most {_MOST_STRENGTH:g}; `preserve: []` turns it off",
        ),
        (
            "preserve_dir",
            _is_path_or_null,
            "must be a folder (a ~ in front stands for a home folder that there is), or null",
        ),
        (
            "preserve",
            lambda v: not v or values.get("tuning") != "lora",
            "does not go with `tuning=lora`: both say what the change may be; keep one of them",
        ),
        ("weight_decay", lambda v: math.isfinite(v) and v >= 0, "must be 0 or more"),
        ("num_steps", lambda v: v >= 1, at_least_one),
        ("pipeline", lambda v: v in PIPELINES, f"must be one of {', '.join(PIPELINES)}"),
        ("batch_size", lambda v: v >= 1, at_least_one),
        ("min_batches", lambda v: v is None or v >= 1, f"{at_least_one}, or null"),
        (
            "min_batches",
            lambda v: v is None or values.get("pipeline") != DEPTH_FIRST,
            f"does not go with `pipeline={DEPTH_FIRST}`, which has no epochs; keep one of them",
        ),
        ("repairs", lambda v: v is None or v >= 0, "must be 0 or more, or null"),
        (
            "repairs",
            lambda v: not v or values.get("pipeline") != DEPTH_FIRST,
            f"does not go with `pipeline={DEPTH_FIRST}`, which trains each edit until it holds; "
            "keep one of them",
        ),
        ("loss_average", lambda v: v in LOSS_AVERAGES, f"must be {EDIT} or {TOKEN}"),
        ("lr_schedule", lambda v: v in LR_SCHEDULES, f"must be {CONSTANT} or {COSINE}"),
        (
            "lr_schedule",
            lambda v: v == CONSTANT or values.get("pipeline") != DEPTH_FIRST,
            f"does not go with `pipeline={DEPTH_FIRST}`, which ends each edit at its threshold; "
            "keep one of them",
        ),
        ("eval_batch_size", lambda v: v >= 1, at_least_one),
        ("max_length", lambda v: v >= 1, at_least_one),
        ("row_tokens", lambda v: v >= 1, at_least_one),
        ("micro_batch_size", lambda v: v is None or v >= 1, f"{at_least_one}, or null"),
        ("forms_per_epoch", lambda v: v > 0, "must be above 0"),
        # Of NaN the rule before says enough.
        *((name, lambda v: v is None or not v >= _MOST, "must be below 2**31") for name in _COUNTS),
        ("prefix_cut", lambda v: v in (None, *CUTS), f"must be null or one of {', '.join(CUTS)}"),
        *(
            (
                f"prefix_{tier}_gib",
                lambda v: v is None or (math.isfinite(v) and v >= 0),
                "must be 0 or more (0 leaves it alone), or null",
            )
            for tier in ("gpu", "host", "disk")
        ),
        ("tuning", lambda v: v in TUNING, f"must be one of {', '.join(TUNING)}"),
        ("lora_rank", lambda v: v >= 1, at_least_one),
        (
            "lora_alpha",
            lambda v: v is None or (math.isfinite(v) and v > 0),
            "must be above 0 and finite, or null",
        ),
        (
            "checkpoint_minutes",
            lambda v: v is None or (math.isfinite(v) and v >= 0),
            "must be 0 or more (0 makes one after every step), or null",
        ),
        ("seed", lambda v: 0 <= v < 2**64, "must be 0 or more, and below 2**64"),
        ("batch_loss_threshold", lambda v: math.isfinite(v) and v >= 0, off_at_zero),
        ("epoch_loss_threshold", lambda v: math.isfinite(v) and v >= 0, off_at_zero),
        ("dtype", lambda v: v in (None, *DTYPES), f"must be one of {', '.join(DTYPES)}"),
        (
            "fp16",
            lambda v: not v or values.get("dtype") in (None, "float16"),
            f"contradicts `dtype={values.get('dtype')!r}`; keep one of them",
        ),
        (
            "quantize_frozen",
            lambda v: v in (None, *QUANTIZED),
            f"must be null or one of {', '.join(QUANTIZED)}",
        ),
        (
            "quantize_frozen",
            lambda v: not (v and values.get("stream_frozen")),
            "does not go with `stream_frozen`; keep one of them",
        ),
        *(
            (
                "shard_frozen",
                lambda v, key=key: not (v and values.get(key)),
                f"does not go with `{key}`; keep one of them",
            )
            for key in ("model_parallel", "quantize_frozen")
        ),
        ("on_conflict", lambda v: v in ON_CONFLICT, f"must be one of {', '.join(ON_CONFLICT)}"),
        (
            "evaluation_type",
            lambda v: v in (None, *EVALUATION_TYPES),
            f"must be null or one of {', '.join(EVALUATION_TYPES)}",
        ),
    ]


def broken_rules(values: Mapping[str, Any]) -> list[str]:
    """Returns a line for each of the well-typed `values` that breaks a rule."""
    problems = [
        f"`{key}={shown(values[key])}` {rule}."
        for key, holds, rule in rules(values)
        if key in values and not (key in OR_AUTO and values[key] == AUTO) and not holds(values[key])
    ]
    template = values.get("rewrite_module_tmp", AUTO)
    if template != AUTO:
        problems += _template_problems(template)
    return problems + _auto_problems(values)


def _auto_problems(values: Mapping[str, Any]) -> list[str]:
    """Returns a line for everything that does not go with a place that is still to be chosen."""
    if values.get("layers", AUTO) != AUTO:
        return [
            f"`{key}=auto` goes only with `layers=auto`. Choose the layer by itself as well, or "
            "give a value."
            for key in ("rewrite_module_tmp", "lr")
            if values.get(key) == AUTO
        ]
    if "layers" not in values:
        return []
    lora = values.get("lr") == AUTO and values.get("tuning") == "lora"
    problems = [_NO_RATE] if lora else []
    return problems + [
        f"`{key}={shown(values[key])}` does not go with `layers=auto`: {why}. Find the place with "
        "`locft locate` and name it, or leave `{key}` out.".replace("{key}", key)
        for key, why in _NEEDS_A_PLACE.items()
        if values.get(key)
    ]


def _is_path_or_null(value: str | None) -> bool:
    if value is None:
        return True
    return bool(value.strip()) and not os.path.expanduser(value).startswith("~")


def _is_model(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    # A pair of anything else, of two names say, is of no use.
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if value is None or not pair:
        return value is None
    torch = sys.modules.get("torch")  # a model that is loaded has loaded it
    return torch is not None and isinstance(value[0], torch.nn.Module)


def _template_problems(template: Any) -> list[str]:
    templates = [template] if isinstance(template, str) else template
    if not isinstance(templates, (list, tuple)) or not templates:
        return [
            f"`rewrite_module_tmp={shown(template)}` must be a text or a list of texts, such as "
            '"model.layers.{}.mlp.down_proj.weight".'
        ]
    return [
        f"`rewrite_module_tmp={shown(one)}` must hold {{}} once, in place of the layer number, for "
        'example "model.layers.{}.mlp.down_proj.weight".'
        for one in templates
        if not isinstance(one, str)
        or one.count("{}") != 1
        or set(one.replace("{}", "")) & {"{", "}"}
    ]
