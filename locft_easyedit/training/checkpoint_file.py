"""The file of a checkpoint: written whole or not at all, read with suspicion.

A safetensors file with the training's tensors; what is not a number lies in its metadata, as JSON,
with a checksum of every tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..hparams_rules import CUTS, DEPTH_FIRST
from ..utils.files import output_errors, replacing
from .identity import Identity
from .progress import REPAIRS, Progress

_FORMAT = 2
_KEY = "locft_checkpoint"
# Of `Progress`: kept as tensors, which hold every bit, or left to JSON.
_SERIES = ("losses", "step_losses")
_COUNTS = ("epoch", "step", "n_updates", "converged", "finished", "micro_batch_size", "seconds")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
        identity: What it belongs to.
        notes: What the session noted for its resumption, such as where the prefix ends.
        progress: How far training had come.
        tensors: `master.NAME` and Adam's `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`.
    """

    identity: Identity
    notes: dict[str, Any]
    progress: Progress
    tensors: dict[str, torch.Tensor]


def write_checkpoint(path: Path, saved: Saved) -> None:
    """Writes a checkpoint in place of what is there.

    Raises:
        OutputError: It cannot be written; what was there still is.
    """
    progress = saved.progress
    kept = {name: value.detach().cpu().contiguous() for name, value in saved.tensors.items()}
    kept["shuffling"] = progress.shuffling
    for name in _SERIES:
        kept[name] = torch.tensor(getattr(progress, name), dtype=torch.float64)
    content = {
        "format": _FORMAT,
        "identity": saved.identity.to_dict(),
        "notes": saved.notes,
        "progress": {name: getattr(progress, name) for name in (*_COUNTS, "repairs")},
        "crc32": {name: _crc32(value) for name, value in kept.items()},
    }
    with output_errors(path), replacing(path) as temporary:
        save_file(kept, temporary, metadata={"format": "pt", _KEY: json.dumps(content)})


def read_checkpoint(path: Path) -> Saved:
    """Reads a checkpoint; nothing in it is executed or taken for granted.

    Raises:
        CheckpointError: It cannot be read, is damaged, or is of another format.
    """
    remedy = "Remove it to begin anew, or restore it from a copy."
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {}).get(_KEY, ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no checkpoint: {error}. {remedy}") from error
    try:
        if content["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {content['format']!r}; this version reads {_FORMAT}. Finish "
                "that edit with the version that began it, or remove the file to begin anew."
            )
        sums = content["crc32"]
        if sums.keys() != tensors.keys():
            raise CheckpointError(f"{path} is damaged: tensors are missing. {remedy}")
        damaged = [name for name, value in tensors.items() if _crc32(value) != sums[name]]
        if damaged:
            named = ", ".join(damaged[:3])
            raise CheckpointError(f"{path} is damaged: {named} changed since. {remedy}")
        identity = Identity.from_dict(content["identity"])
        progress = _progress(content["progress"], tensors)
        progress.depth_first = identity.settings.get("pipeline") == DEPTH_FIRST
        told = content["notes"]
        notes = {"cut": told["cut"], "packed": told["packed"], "preserved": told.get("preserved")}
        if (
            notes["cut"] not in (None, *CUTS)
            or type(notes["packed"]) is not bool
            or not isinstance(notes["preserved"], str | None)
        ):
            raise ValueError(f"its notes are {notes}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged ({reason}). {remedy}") from error
    return Saved(identity, notes, progress, tensors)


def _progress(counts: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Progress:
    """Returns the progress that a checkpoint holds, and takes its tensors out.

    Raises:
        KeyError, TypeError, ValueError: Something is missing or is not what it must be.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Progress)}
    for name in _COUNTS:
        kind = type(defaults[name])
        least = 1 if name == "micro_batch_size" else 0
        if type(counts[name]) is not kind or not least <= counts[name] < math.inf:
            raise ValueError(f"{name} is {counts[name]!r}")
    series = {name: tensors.pop(name) for name in _SERIES}
    shuffling = tensors.pop("shuffling")
    if any(s.dtype != torch.float64 or s.dim() != 1 for s in series.values()):
        raise ValueError("its losses are no numbers")
    if len(series["losses"]) != counts["epoch"]:
        raise ValueError(f"{counts['epoch']} epochs, but {len(series['losses'])} losses")
    try:
        torch.Generator().set_state(shuffling)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"its random state: {error}") from error
    values: dict[str, Any] = {name: counts[name] for name in _COUNTS}
    values |= {name: numbers.tolist() for name, numbers in series.items()}
    repairs = counts.get("repairs")  # older ones lack it
    if repairs is not None and not (
        repairs.keys() == set(REPAIRS) and all(type(n) is int and n >= 0 for n in repairs.values())
    ):
        raise ValueError(f"its repairs are {repairs!r}")
    values["repairs"] = repairs
    return Progress(shuffling, **values)


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
