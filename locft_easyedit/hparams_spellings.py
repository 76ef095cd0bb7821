"""Other spellings of hyper-parameters: names in any case, and the keys of the paper's own YAMLs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from .hparams_rules import ALG_NAME, ALG_NAMES

logger = logging.getLogger(__name__)

# Key of the paper's repository -> ours; its other keys are ours already.
_PUBLISHED = {
    "model_name_or_path": "model_name",
    "layer": "layers",
    "rewrite_module": "rewrite_module_tmp",
}
# What else it keeps in its YAMLs -> where it is given here.
_ELSEWHERE = {"data_path": "`data=`", "save_model_dir": "`output=`"}


def known_alg_name(value: Any) -> Any:
    """Returns our name of the method if `value` is one of its spellings, else `value` itself.

    Case, and what stands between the letters, do not matter: `locft_bf+` is `LocFT-BF+`.
    """
    if not isinstance(value, str):
        return value
    return next((name for name in ALG_NAMES if _letters(name) == _letters(value)), value)


def _letters(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.casefold())


def translated(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the values under our keys; those of a YAML with our own keys are as they were.

    Args:
        config: The values of a file.
        source: The file, for what is logged.
    """
    if not _is_published(config):
        return config
    values: dict[str, Any] = {"alg_name": ALG_NAME}
    for key, value in config.items():
        if key not in _ELSEWHERE:
            values[_PUBLISHED.get(key, key)] = value
    if type(values.get("layers")) is int:
        values["layers"] = [values["layers"]]
    left_out = [f"`{key}` ({_ELSEWHERE[key]} here)" for key in _ELSEWHERE if key in config]
    logger.info(
        "%s has the keys of the paper's own code and is read as a YAML of %s%s.",
        source,
        ALG_NAME,
        f", without {' and '.join(left_out)}" if left_out else "",
    )
    return values


def _is_published(config: Mapping[str, Any]) -> bool:
    return "alg_name" not in config and {"model_name_or_path", "layer", "rewrite_module"} <= set(
        config
    )
