"""Values of any library as the plain ones that JSON has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any


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


def encoded(value: Any) -> Any:
    """Returns `value` with NaN and infinity as `{"not finite": "nan"}`.

    JSON has no NaN. So a figure that is no number stays visible, and differs from a text.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"not finite": str(value)}
    if isinstance(value, Mapping):
        return {key: encoded(entry) for key, entry in value.items()}
    return [encoded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
