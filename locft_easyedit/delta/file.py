"""Edits on disk: one safetensors file, from which nothing is believed before it is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file

from ..errors import DeltaError, one_message
from ..files import output_errors, replacing
from ..hashes import DTYPES, dtype_name
from .about import PREFIXES, problems_of
from .delta import Delta, tensor_problems
from .header import Entry, Header, opened, parsed, read_header

METADATA_KEY = "locft_delta"
# A head names every parameter of the model; those of the largest take less than a megabyte.
_MOST_HEAD = 64 * 2**20


def save_delta(path: str | Path, delta: Delta, *, originals: bool = True) -> None:
    """Writes an edit as one safetensors file: whole, or not at all.

    Edited matrices are under their own names, replaced ones under `original.NAME`, low-rank
    factors under `lora_A.NAME` and `lora_B.NAME`.

    Args:
        path: The file.
        delta: The edit.
        originals: Keep what was replaced, so that the edit can be undone without the base model.

    Raises:
        DeltaError: The edit is not consistent in itself.
        OutputError: The file cannot be written.
    """
    delta.check()
    tensors = dict(delta.new)
    if originals:
        tensors |= {f"original.{name}": value for name, value in delta.original.items()}
    for name, (a, b) in delta.lora.items():
        tensors |= {f"lora_A.{name}": a, f"lora_B.{name}": b}
    text = json.dumps(delta.about, allow_nan=False)
    # Copies where two names share their numbers, which safetensors refuses.
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        ready[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    with output_errors(path), replacing(path) as temporary:
        save_file(ready, temporary, metadata={"format": "pt", METADATA_KEY: text})


def load_delta(path: str | Path) -> Delta:
    """Returns the edit in a file, with every value checked against its hash.

    The file may come from anybody: nothing is unpickled, no path in it is opened, and what is
    not as described is refused. What its numbers do to a model is not known: that whoever made it
    can be trusted is for its user to judge.

    Args:
        path: The file that `save_delta` or `locft edit` wrote.

    Raises:
        DeltaError: The file is no edit, of another format, or damaged (one error with all of it).
    """
    with opened(path) as file:
        header = read_header(file, path, _MOST_HEAD)
        if METADATA_KEY not in header.metadata:
            raise DeltaError(
                f"`{path}` is a safetensors file, but no edit: it says nothing of one. Give the "
                "edit.safetensors of `locft edit`."
            )
        about = parsed(header.metadata[METADATA_KEY], f"what `{path}` says of the edit")
        problems = problems_of(about) or _entry_problems(header, about)
        if problems:
            raise DeltaError(one_message(f"`{path}` cannot be used:", problems))
        tensors = {name: _read(file, entry, path) for name, entry in header.entries.items()}
    names = list(about["matrices"])
    delta = Delta(
        new={name: tensors[name] for name in names},
        original={n: tensors[f"original.{n}"] for n in names if f"original.{n}" in tensors},
        about=about,
        lora={n: (tensors[f"lora_A.{n}"], tensors[f"lora_B.{n}"]) for n in names if about["lora"]},
    )
    problems = tensor_problems(delta)
    if problems:
        raise DeltaError(one_message(f"`{path}` is damaged:", problems))
    return delta


def _entry_problems(header: Header, about: dict) -> list[str]:
    """Returns a line for each tensor that is missing, too many, or not as described."""
    problems = []
    kinds = ["", *(PREFIXES if about["lora"] else PREFIXES[:1])]
    expected = {prefix + name: name for prefix in kinds for name in about["matrices"]}
    if not any(name.startswith(PREFIXES[0]) for name in header.entries):
        expected = {k: name for k, name in expected.items() if not k.startswith(PREFIXES[0])}
    problems += [
        f"the tensor {n[:200]!r} belongs to nothing." for n in header.entries if n not in expected
    ]
    for full, name in expected.items():
        entry, described = header.entries.get(full), about["matrices"][name]
        if entry is None:
            problems.append(f"the tensor `{full}` is missing.")
        elif entry.dtype not in DTYPES or not entry.size:
            problems.append(f"`{full}` must hold numbers of {', '.join(DTYPES)}.")
        elif not full.startswith(PREFIXES[1:]) and (
            dtype_name(DTYPES[entry.dtype]) != described["dtype"]
            or list(entry.shape) != described["shape"]
        ):
            problems.append(
                f"`{full}` is {entry.dtype} {list(entry.shape)}, described as "
                f"{described['dtype']} {described['shape']}."
            )
    return problems


def _read(file: BinaryIO, entry: Entry, path: str | Path) -> torch.Tensor:
    """Returns a tensor; read, not mapped: a file that is cut meanwhile would end the program."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    view = tensor.view(-1).view(torch.uint8).numpy().data
    file.seek(entry.start)
    done = 0
    while done < entry.size:
        n_read = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not n_read:
            raise DeltaError(f"`{path}` ends at byte {entry.start + done}: it is cut short.")
        done += n_read
    return tensor
