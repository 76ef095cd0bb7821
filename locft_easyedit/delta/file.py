"""Edits on disk: one safetensors file, from which nothing is believed before it is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import DeltaError, one_message
from ..utils.files import output_errors, replacing
from ..utils.hashing import DTYPES, dtype_name, tensor_sha256
from ..utils.parsing import ParseError, json_of, shown
from .metadata import PREFIXES, problems_of
from .safetensors_header import opened, read_header, read_tensor

METADATA_KEY = "locft_delta"


def write_edit(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes an edit as one safetensors file: whole, or not at all.

    Args:
        path: The file.
        metadata: What is said of the edit.
        tensors: Edited matrices under their own names, replaced ones under `original.NAME`,
            low-rank factors under `lora_A.NAME` and `lora_B.NAME`.

    Raises:
        OutputError: The file cannot be written.
    """
    text = json.dumps(metadata, allow_nan=False)
    # Copies where two names share their numbers, which safetensors refuses.
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        ready[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    with output_errors(path), replacing(path) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", METADATA_KEY: text})


def read_edit(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the metadata and the tensors of an edit's file, as `write_edit` was given them.

    Raises:
        DeltaError: The file is no edit, of another format, or damaged (one error with all of it).
    """
    with opened(path) as file:
        entries, texts = read_header(file, path)
        if METADATA_KEY not in texts:
            raise DeltaError(
                f"`{path}` is a safetensors file, but no edit: it says nothing of one. Give the "
                "edit.safetensors of `locft edit`."
            )
        try:
            metadata = json_of(texts[METADATA_KEY], unique_keys=True)
        except (ParseError, json.JSONDecodeError) as error:
            raise DeltaError(
                f"What `{path}` says of the edit is no JSON: {str(error)[:300]}. Get it again."
            ) from error
        problems = problems_of(metadata) or [
            f"the tensor {shown(name)} must hold numbers of {', '.join(DTYPES)}."
            for name, entry in entries.items()
            if entry.dtype not in DTYPES or not entry.size
        ]
        if problems:
            raise DeltaError(one_message(f"`{path}` cannot be used:", problems))
        tensors = {name: read_tensor(file, entry, path) for name, entry in entries.items()}
    problems = tensor_problems(metadata, tensors)
    if problems:
        raise DeltaError(one_message(f"`{path}` is damaged:", problems))
    return metadata, tensors


def tensor_problems(
    metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None]
) -> list[str]:
    """Returns a line for each tensor, named as in the file, that is not what `metadata` says."""
    prefixes = ["", *(PREFIXES if metadata["lora"] else PREFIXES[:1])]
    if not any(name.startswith("original.") for name in tensors):
        prefixes.remove("original.")
    expected = {prefix + name: name for prefix in prefixes for name in metadata["matrices"]}
    problems = [f"the tensor {shown(n)} belongs to nothing." for n in tensors if n not in expected]
    for full, name in expected.items():
        kind = full.removesuffix(name).rstrip(".") or "new"
        described = metadata["matrices"][name]
        problem = _problem(tensors.get(full), described, kind, metadata["lora"])
        problems += [f"`{full}`: {problem}"] if problem else []
    return problems


def _problem(
    tensor: torch.Tensor | None, described: Mapping[str, Any], kind: str, lora: Any
) -> str:
    if tensor is None:
        return "it is missing."
    dtype, shape = dtype_name(tensor.dtype), list(tensor.shape)
    if kind in ("new", "original"):
        if dtype != described["dtype"] or shape != list(described["shape"]):
            return f"it is {dtype} {shape}, described as {described['dtype']} {described['shape']}."
    elif not _is_factor(shape, kind, described["shape"], lora["rank"]):
        return f"{shape} is no factor of rank {lora['rank']}."
    if tensor_sha256(tensor) != described[kind]:
        return "its numbers are not the ones described: damaged, or tampered with."
    if not all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(2**24)):
        return "it holds NaN or infinite values."
    return ""


def _is_factor(factor: Sequence[int], kind: str, shape: Sequence[int], rank: int) -> bool:
    """Returns whether a shape is a low-rank factor's; Conv1D has its matrix transposed."""
    if len(factor) != 2 or len(shape) != 2:
        return False
    side, other = (1, 0) if kind == "lora_A" else (0, 1)
    return factor[other] == rank and factor[side] in shape
