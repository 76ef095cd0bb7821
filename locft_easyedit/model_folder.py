"""A model's folder or hub name, checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import ModelError
from .reading import is_file, shown


def check_model_name(name: str) -> str:
    """Returns a model's folder or hub name, with the home folder in place of `~`.

    Raises:
        ModelError: It is a folder that does not exist or holds no model.
    """
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    check_folder(name)
    return name


def check_folder(name: str) -> None:
    """Tells a folder that is missing from a hub name, before anybody asks the hub.

    Raises:
        ModelError: It is a folder that does not exist, holds no model, or lacks parts of one.
    """
    path = Path(name).expanduser()
    in_a_folder_here = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    looks_local = name.startswith(".") or path.is_absolute() or name.count("/") > 1
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ModelError(
                f"`model_name={name!r}` is a folder without config.json. Give the folder of a "
                "model saved with `save_pretrained`."
            )
        _check_shards(name, path)
    elif looks_local or in_a_folder_here or "\\" in name:
        raise ModelError(
            f"`model_name={name!r}` does not exist. Download the model to that folder, or give its "
            "hub name or another folder."
        )


def _check_shards(name: str, folder: Path) -> None:
    """Checks that a checkpoint in parts is whole: a missing part shows before a long load."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        odd = [shard for shard in shards if Path(shard).name != shard or "\0" in shard]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"`{index}` is damaged: {error}. Download the model again.") from error
    if odd:
        raise ModelError(
            f"`{index}` names {shown(odd[0])}, which is no file of this folder. Download the model "
            "again, from somebody you trust."
        )
    missing = [shard for shard in shards if not is_file(folder / shard)]
    if missing:
        raise ModelError(
            f"`model_name={name!r}` lacks {len(missing)} of its {len(shards)} parts: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download them."
        )


def tokenizer_of(name: str) -> str:
    """Returns where a model's tokenizer is: peft saves adapters without one."""
    adapter = Path(name) / "adapter_config.json"
    if not adapter.is_file() or (Path(name) / "tokenizer_config.json").is_file():
        return name
    return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
