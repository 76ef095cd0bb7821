"""What `model_name` names: a folder that holds a model, or a name that a hub may know."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import get_session, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT as HUB

from ..errors import ModelError
from ..utils.parsing import is_file, shown

_HUB_SECONDS = 10.0  # to answer


def check_model_name(name: str) -> str:
    """Returns a model's folder or hub name, with the home folder in place of `~`.

    A folder that is missing is told from a hub name before anybody asks the hub.

    Raises:
        ModelError: It is a folder that does not exist, holds no model, or lacks parts of one.
    """
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    path = Path(name)
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
    elif not _is_downloaded(name):
        _check_hub(name)
    return name


def _is_downloaded(name: str) -> bool:
    """Returns whether the hub's cache on this machine has the model of a name."""
    try:
        found = [try_to_load_from_cache(name, f"{kind}config.json") for kind in ("", "adapter_")]
    except ValueError:  # no name that a hub could know
        return False
    return any(isinstance(path, str) for path in found)


def _check_hub(name: str) -> None:
    """Checks, by asking once, that there is a hub: transformers would try for a minute.

    Raises:
        ModelError: There is none, so that the name can only be that of a folder.
    """
    try:
        get_session().head(f"{HUB}/{name}", timeout=_HUB_SECONDS)
    except Exception as error:  # of whatever library asks
        raise ModelError(
            f"`model_name={name!r}`: there is no such folder here, and no model hub can be reached "
            "where it could be a name. Correct the path, or download the model to a folder."
        ) from error


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
            "again, from a source that you trust."
        )
    missing = [shard for shard in shards if not is_file(folder / shard)]
    if missing:
        raise ModelError(
            f"`model_name={name!r}` lacks {len(missing)} of its {len(shards)} parts: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download them."
        )
