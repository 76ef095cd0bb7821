"""Second moments in files, each of which says what it was computed from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import one_message
from ...utils.files import output_errors, replacing
from ...utils.hashing import json_sha256, tensor_sha256
from ...utils.parsing import is_file

logger = logging.getLogger(__name__)

_FORMAT = 1
_KEY, _TENSOR = "locft_key_moments", "second"


@dataclass(frozen=True)
class Origin:
    """What moments are computed from.

    Attributes:
        model: The model's fingerprint.
        text: A hash of all token ids.
        n_tokens: How many these are.
    """

    model: str
    text: str
    n_tokens: int

    def of(self, module: str) -> dict[str, Any]:
        """Returns what the file of a module says of itself."""
        return {"format": _FORMAT, "module": module, **asdict(self)}


def cache_errors(file: Path) -> AbstractContextManager[None]:
    """Context manager that turns a disk's error into one that says where else to keep measurements.

    Raises:
        OutputError: Something could not be written.
    """
    return output_errors(file, "set `preserve_dir` to a folder that you may write to")


def moments_file(cache: Path, module: str, origin: Origin) -> Path:
    """Returns where the moments of a module are kept."""
    return cache / f"{module}-{json_sha256(origin.of(module))[:16]}.safetensors"


def read_moments(cache: Path, widths: Mapping[str, int], origin: Origin) -> dict[str, torch.Tensor]:
    """Returns the moments that are kept, [D, D] by module; files of no use are reported.

    Args:
        cache: The folder.
        widths: Each module's D.
        origin: What they must be computed from.
    """
    found, problems = {}, []
    for module, width in widths.items():
        file = moments_file(cache, module, origin)
        if not is_file(file):
            continue
        second, problem = _read(file, origin.of(module), width)
        if second is None:
            problems.append(f"{file} is {problem}.")
        else:
            found[module] = second
    if problems:
        logger.warning("%s", one_message("Kept statistics are not used but made anew:", problems))
    return found


def write_moments(cache: Path, module: str, second: torch.Tensor, origin: Origin) -> None:
    """Keeps the moments of a module, [D, D] float32 on the host.

    Raises:
        OutputError: The file cannot be written.
    """
    file = moments_file(cache, module, origin)
    about = origin.of(module) | {"sha256": tensor_sha256(second)}
    with cache_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file({_TENSOR: second.contiguous()}, temporary, {_KEY: json.dumps(about)})


def _read(file: Path, expected: dict[str, Any], width: int) -> tuple[torch.Tensor | None, str]:
    """Returns the moments in a file, or what is wrong with it."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})[_KEY])
            # A later format may say everything else in another way.
            other = [key for key, value in expected.items() if about[key] != value]
            if other:
                return None, f"of another {' and '.join(other)}"
            second: torch.Tensor = opened.get_tensor(_TENSOR)
            right = second.shape == (width, width) and second.dtype == torch.float32
            if right and tensor_sha256(second) == about["sha256"]:
                return second, ""
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None, "damaged"
