"""Dataclasses as JSON files: values of any library as the plain ones that JSON has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import output_errors, write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def plain(value: Any) -> Any:
    """Returns a copy in the kinds of value that JSON has (and NaN)."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Real) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0):
        number = value.item() if hasattr(value, "item") else value
        return number if isinstance(number, (int, float)) else str(number)
    return str(value)


def encoded(value: Any, not_finite: Callable[[float], Any]) -> Any:
    """Returns `value` with what `not_finite` gives in place of NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    if isinstance(value, Mapping):
        return {str(key): encoded(entry, not_finite) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(entry, not_finite) for entry in value]
    return value


def write_dataclass(path: str | Path, record: DataclassInstance) -> None:
    """Writes a dataclass as JSON, every field under its name.

    JSON has no NaN: it is written as `{"not finite": "nan"}`, infinity likewise. So such a figure
    stays visible, and differs from a text.

    Raises:
        OutputError: The file cannot be written.
    """
    values = encoded(asdict(record), lambda value: {"not finite": str(value)})
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    with output_errors(path):
        # A lone surrogate in an error message becomes the JSON escape that it came from.
        write_atomically(path, f"{text}\n".encode("utf-8", "backslashreplace"))
