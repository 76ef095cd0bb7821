"""A model's configuration: from its folder, or from the few that are shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ModelError
from ..models import model_without_weights

_FOLDER = Path(__file__).resolve().parent / "configs"


def shipped_models() -> dict[str, dict[str, Any]]:
    """Returns what is shipped, by every name in lower case.

    Each value has the `names` of the model, its number of `parameters` and the fields of its
    `config` that shapes depend on.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(_FOLDER.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        found |= {name.lower(): facts for name in facts["names"]}
    return found


def meta_model(model_name: Any, *, trust_remote_code: bool = False) -> tuple[Any, str]:
    """Returns a model without weights, on the meta device, and where its shapes come from.

    Args:
        model_name: A folder with a `config.json` (weights may be missing), or a folder or hub
            name that ends as a shipped model's does.
        trust_remote_code: Allow the folder's own code.

    Raises:
        ModelError: There is no such folder and no such shipped model, or the folder holds no
            causal language model.
    """
    if not isinstance(model_name, str) or not model_name.strip():
        raise ModelError(
            f"`model_name={model_name!r}` must be a folder with a config.json, or a name."
        )
    folder = Path(model_name).expanduser()
    if (folder / "config.json").is_file():
        model = model_without_weights(str(folder), trust_remote_code=trust_remote_code)
        return model, str(folder / "config.json")
    shipped = shipped_models()
    facts = shipped.get(folder.name.lower())
    if facts is None:
        names = ", ".join(sorted({known["names"][0] for known in shipped.values()}))
        raise ModelError(
            f"`model_name={model_name!r}` is no folder with a config.json, and its shapes are not "
            f"shipped. Put the model's config.json into that folder (it is enough; no weights are "
            f"needed), or name one of: {names}."
        )
    config = AutoConfig.for_model(**facts["config"])
    config.name_or_path = facts["names"][0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, f"shipped facts of {facts['names'][0]}"
