"""The head of a safetensors file, read with suspicion: nothing in it is believed unchecked."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DeltaError, one_message

# Bytes of a number, by safetensors' names; a name that is not here may be of any size.
_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
}
_MOST_DIMENSIONS = 16
_MOST_DEPTH = 64


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


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        entries: The tensors by name.
        metadata: The texts under `__metadata__`.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]


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
    return DeltaError(f"`{path}` cannot be read: {reason}. Give a file that can.")


def read_header(file: BinaryIO, path: str | Path, most_bytes: int) -> Header:
    """Returns the head of an open safetensors file; its tensors fill the rest exactly.

    Args:
        file: The file.
        path: Its name, for messages.
        most_bytes: How long the head may be.

    Raises:
        DeltaError: The head is no head of a safetensors file (all problems in one error).
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
    if not 2 <= length <= min(size - 8, most_bytes):
        raise DeltaError(
            f"`{path}` is no safetensors file that can be read: a head of {length} bytes, of at "
            f"most {most_bytes}, in a file of {size}. It is cut short, or of another kind."
        )
    value = parsed(file.read(length), f"the head of `{path}`")
    if not isinstance(value, dict):
        raise DeltaError(f"`{path}` is no safetensors file: its head is no mapping of tensors.")
    metadata = value.pop("__metadata__", {})
    problems = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append("`__metadata__` must hold texts.")
        metadata = {}
    entries: dict[str, Entry] = {}
    for name, described in value.items():
        entry = _entry(described, 8 + length)
        if entry is None:
            problems.append(f"{name[:200]!r} has no valid dtype, shape and place.")
        else:
            entries[name] = entry
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.size)):
        if entry.start != end:
            problems.append(f"the tensors overlap or leave a gap at byte {min(entry.start, end)}.")
            break
        end += entry.size
    else:
        if end != size:
            problems.append(f"the tensors end at byte {end}, the file at {size}: it is cut short.")
    if problems:
        raise DeltaError(one_message(f"`{path}` is damaged:", problems))
    return Header(entries, metadata)


def parsed(text: bytes | str, what: str) -> Any:
    """Returns what a JSON text holds.

    Raises:
        DeltaError: It is no JSON, repeats a key, holds NaN, or is nested beyond measure.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refused)
        _check_depth(value, _MOST_DEPTH)
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{what} is no JSON that can be used: {str(error)[:300]}.") from error
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError("it is nested too deeply")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        _check_depth(part, left - 1)


def _entry(described: Any, first: int) -> Entry | None:
    """Returns a tensor's place, if what describes it is right in itself."""
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not (_whole_numbers(shape) and _whole_numbers(offsets)):
        return None
    if len(shape) > _MOST_DIMENSIONS or len(offsets) != 2 or offsets[1] < offsets[0]:
        return None
    size = offsets[1] - offsets[0]
    if dtype in _SIZES and math.prod(shape) * _SIZES[dtype] != size:
        return None
    return Entry(dtype, tuple(shape), first + offsets[0], size)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in values
    )
