"""Where each tensor lies in a safetensors file, so that parts of it can be read and written over.

`safetensors.safe_open` checks the header (JSON, offsets without gaps or overlaps, sizes, the file's
length) but does not give the offsets; these are read here, from what it has accepted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ..errors import DeltaError
from ..utils.hashing import DTYPES
from ..utils.parsing import json_of


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file.

    Attributes:
        dtype: safetensors' name, such as `BF16`.
        shape: The shape.
        start: Its first byte, counted from the beginning of the file.
        size: How many bytes it takes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Yields a regular file, open for reading; a pipe or a device would block or never end.

    Raises:
        DeltaError: It is no regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise _unreadable(path, error) from error
    try:
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DeltaError(f"`{path}` is no regular file. Give the safetensors file itself.")
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> DeltaError:
    reason = getattr(error, "strerror", None) or error
    return DeltaError(f"`{path}` cannot be read: {reason}. Give the path of a file that can.")


def read_header(file: BinaryIO, path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the tensors' places by name, and the texts under `__metadata__`.

    Raises:
        DeltaError: It is no safetensors file, or a damaged one.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        # A name given twice passes `safe_open`, and readers differ in which of the two they take.
        header = json_of(file.read(length).decode(), unique_keys=True)
    except (SafetensorError, ValueError) as error:
        if (more := _bytes_behind(file)) > 0:
            raise DeltaError(
                f"`{path}` has {more} bytes behind its last tensor: something was appended to it. "
                "Get it again."
            ) from error
        reason = str(error).removeprefix("Error while deserializing header: ")[:300]
        raise DeltaError(
            f"`{path}` is no safetensors file, or is damaged or cut short: {reason}. Get it again."
        ) from error
    texts = header.pop("__metadata__", None) or {}
    entries = {}
    for name, described in header.items():
        start, end = described["data_offsets"]
        shape = tuple(described["shape"])
        entries[name] = Entry(described["dtype"], shape, 8 + length + start, end - start)
    return entries, texts


def _bytes_behind(file: BinaryIO) -> int:
    """Returns how many bytes follow the last tensor; 0 if the header does not say where it ends."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json_of(file.read(min(length, size)).decode())
        ends = [v["data_offsets"][1] for key, v in header.items() if key != "__metadata__"]
        return max(size - 8 - length - max(ends), 0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return 0


def read_tensor(file: BinaryIO, entry: Entry, path: str | Path) -> torch.Tensor:
    """Returns a tensor; read, not mapped: a file that is cut meanwhile would end the program.

    Raises:
        DeltaError: The file ends before the tensor does.
    """
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
