"""The plain values that an outcome's JSON file holds, and what is wrong with a damaged one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from ..errors import DataError, one_message
from ..reading import shown

STATUSES = ("ok", "failed", "unavailable", "not finite")
MEMORY_OF = ("GPU", "process")
# JSON has no NaN: a figure that is no number stays visible, and stays different from a text.
_NOT_FINITE = "not finite"
_SECTIONS = ("generated", "locality", "portability", "fluency")
Kind = tuple[str, Callable[[Any], bool]]


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
    """Returns `value` with NaN and infinity as `{"not finite": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: str(value)}
    if isinstance(value, dict):
        return {key: encoded(entry) for key, entry in value.items()}
    return [encoded(entry) for entry in value] if isinstance(value, list) else value


def decoded(value: Any) -> Any:
    """Returns what `encoded` was given."""
    if isinstance(value, Mapping):
        if list(value) == [_NOT_FINITE] and value[_NOT_FINITE] in ("nan", "inf", "-inf"):
            return float(value[_NOT_FINITE])
        return {key: decoded(entry) for key, entry in value.items()}
    return [decoded(entry) for entry in value] if isinstance(value, list) else value


def is_number(value: Any) -> bool:
    """Returns whether `value` is a float, or an int that one can hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023
    return isinstance(value, float)


def _is_means(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        v is None or is_number(v) or _is_means(v) for v in value.values()
    )


def _is_summary(value: Any) -> bool:
    return _is_means(value) and all(
        isinstance(value.get(section, {}), Mapping) for section in _SECTIONS
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _or_none(kind: Kind) -> Kind:
    return f"{kind[0]} or null", lambda value: value is None or kind[1](value)


_TEXT: Kind = ("a text", lambda v: isinstance(v, str))
_NUMBER: Kind = ("a number", is_number)
_COUNT: Kind = ("a whole number, 0 or more", _is_count)
_NUMBERS: Kind = ("a mapping of numbers", _is_means)
_MEANS: Kind = ("means as `summarize` returns them", _is_summary)
_MAPPING: Kind = ("a mapping", lambda v: isinstance(v, Mapping))
_TEXTS: Kind = ("a list of texts", lambda v: isinstance(v, list) and all(map(_TEXT[1], v)))
_CAPABILITY: Kind = (
    "a mapping with `tasks` (a mapping) and `mean` (a number)",
    lambda v: (
        isinstance(v, Mapping)
        and {"tasks", "mean"} <= set(v)
        and isinstance(v["tasks"], Mapping)
        and (v["mean"] is None or is_number(v["mean"]))
    ),
)
OUTCOME_KINDS: dict[str, Kind] = {
    "method": _TEXT,
    "status": (f"one of {', '.join(STATUSES)}", lambda v: v in STATUSES),
    "reason": _or_none(_TEXT),
    "n_edits": _COUNT,
    "after_all": _MEANS,
    "right_after_each": _or_none(_MEANS),
    "capability": _or_none(_CAPABILITY),
    "seconds": _NUMBERS,
    "seconds_per_edit": _or_none(_NUMBER),
    "peak_memory_gib": _or_none(_NUMBER),
    "peak_memory_of": (f"one of {', '.join(MEMORY_OF)} or null", lambda v: v in (*MEMORY_OF, None)),
    "corpus": _or_none(_TEXT),
    "hparams": _MAPPING,
    "notes": _TEXTS,
    "log": _or_none(_TEXT),
}
COMPARISON_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("model", "data", "easyedit", "device", "dtype"), _TEXT),
    "n": _COUNT,
    "versions": (
        "a mapping of texts",
        lambda v: isinstance(v, Mapping) and all(map(_TEXT[1], v.values())),
    ),
    "before": _MEANS,
    "capability_before": _or_none(_CAPABILITY),
    "outcomes": ("a list", lambda v: isinstance(v, list)),
}


def problems_of(value: Any, kinds: Mapping[str, Kind], where: str) -> list[str]:
    """Returns what keeps `value` from having the fields `kinds`."""
    if not isinstance(value, Mapping):
        return [f"{where} is a {type(value).__name__}, not a mapping."]
    problems = [f"{where} has no `{name}`." for name in kinds if name not in value]
    problems += [f"{where} has an unknown field `{name}`." for name in value if name not in kinds]
    for name, (what, is_kind) in kinds.items():
        if name in value and not is_kind(value[name]):
            problems.append(f"{where}: `{name}={shown(value[name], 80)}` is not {what}.")
    return problems


def raise_for(problems: list[str], source: str) -> None:
    """Raises one error for all problems.

    Raises:
        DataError: There are problems.
    """
    if problems:
        title = (
            f"{source} is no comparison that `locft compare` wrote, or is damaged. Run the "
            "comparison again, or mend the file:"
        )
        raise DataError(one_message(title, problems))
