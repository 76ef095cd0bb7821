"""What an edit's file says of the edit: made, and checked when it comes from outside."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ..hashes import DTYPES as _DTYPES
from ..hashes import SAMPLE_LENGTH, dtype_name, json_sha256

FORMAT = 1
DTYPES = {dtype_name(dtype): dtype for dtype in _DTYPES.values()}
_KEYS = (
    "format",
    "id",
    "checksum",
    "base_model",
    "matrices",
    "frozen",
    "lora",
    "hparams",
    "requests",
    "metrics",
    "losses",
    "versions",
    "created",
)
# Where a prefix begins a tensor's name in the file, a parameter's own name cannot.
PREFIXES = ("original.", "lora_A.", "lora_B.")
_MOST_NAME, _MOST_NAMES, _MOST_TEXT, _MOST_VALUES = 512, 500_000, 4096, 100_000
_HEX = re.compile(r"[0-9a-f]+", re.ASCII)


def sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `about` with the edit's id and a checksum of everything that is said."""
    about = {key: value for key, value in about.items() if key not in ("id", "checksum")}
    about["id"] = id_of(about)
    return about | {"checksum": json_sha256(about)}


def id_of(about: Mapping[str, Any]) -> str:
    """Returns the edit's id: a sha256 over the hashes of all that was changed and all that was not.

    Two edits with the same id put the same numbers into the same model.
    """
    return json_sha256([about["matrices"], about["frozen"], about["requests"], about["lora"]])


def versions() -> dict[str, str]:
    """Returns the versions of what an edit is made with."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "locft_easyedit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            found[name] = "unknown"
    return found


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0).isoformat()


def printable(value: Any) -> Any:
    """Returns a value for JSON whose texts a terminal shows as they are; NaN becomes `None`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {printable(str(key)): printable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(v) for v in value]
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value)[:_MOST_TEXT]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    plain = value is None or isinstance(value, (bool, int, float))
    return value if plain else printable(str(value))


def problems_of(about: Any) -> list[str]:
    """Returns a line for everything in `about` that is not as this format has it."""
    if not isinstance(about, dict):
        return ["what it says of the edit is no mapping."]
    if about.get("format") != FORMAT or isinstance(about["format"], bool):
        return [
            f"it is of format {str(about.get('format'))[:50]}; this version reads format {FORMAT}. "
            "Update locft_easyedit."
        ]
    problems = [f"`{key}` is missing." for key in _KEYS if key not in about]
    problems += [f"`{str(key)[:100]!r}` is not a key." for key in about if key not in _KEYS]
    if problems:
        return problems
    for key, problem in _CHECKS.items():
        problems += problem(about[key], key)
    if problems:
        return problems
    for name, described in about["matrices"].items():
        if about["lora"] is not None and not {"lora_A", "lora_B"} <= set(described):
            problems.append(f"`{name}` has no low-rank factors, as `lora` says.")
        if about["lora"] is None and {"lora_A", "lora_B"} & set(described):
            problems.append(f"`{name}` has low-rank factors of no rank.")
    both = sorted(set(about["matrices"]) & set(about["frozen"]))
    if both:
        problems.append(f"`{both[0]}` is both changed and unchanged.")
    if about["id"] != id_of(about):
        problems.append("its `id` does not belong to its hashes.")
    if about["checksum"] != json_sha256({k: v for k, v in about.items() if k != "checksum"}):
        problems.append("what it says of the edit was changed: the checksum differs.")
    return problems


def is_name(value: Any) -> bool:
    """Returns whether a value can be a parameter's name; it is never used as a path."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= _MOST_NAME
        and value.isprintable()
        and not any(c.isspace() for c in value)
        and not value.startswith(PREFIXES)
    )


def _hex(value: Any, key: str, length: int = 64) -> list[str]:
    good = isinstance(value, str) and len(value) == length and _HEX.fullmatch(value)
    return [] if good else [f"`{key}` is no hash of {length} hexadecimal digits."]


def _text(value: Any, key: str) -> list[str]:
    good = isinstance(value, str) and len(value) <= _MOST_TEXT and value.isprintable()
    return [] if good else [f"`{key}` is no text of at most {_MOST_TEXT} printable characters."]


def _time(value: Any, key: str) -> list[str]:
    if not _text(value, key):
        try:
            datetime.fromisoformat(value)
            return []
        except ValueError:
            pass
    return [f"`{key}` is no time."]


def _matrices(value: Any, key: str) -> list[str]:
    if not isinstance(value, dict) or not value:
        return [f"`{key}` names no matrix."]
    problems = []
    for name, described in value.items():
        if not is_name(name):
            problems.append(f"{str(name)[:100]!r} is no name that a parameter can have here.")
        elif not isinstance(described, dict) or not {"dtype", "shape", "new", "original"} <= set(
            described
        ) <= {"dtype", "shape", "new", "original", "lora_A", "lora_B"}:
            problems.append(f"`{name}` is not described by dtype, shape and hashes.")
        else:
            hashes = [k for k in described if k not in ("dtype", "shape")]
            problems += [p for k in hashes for p in _hex(described[k], f"{k} of {name}")]
            if not isinstance(described["dtype"], str) or described["dtype"] not in DTYPES:
                problems.append(f"`{name}` must be of {', '.join(DTYPES)}.")
            if not _is_shape(described["shape"]):
                problems.append(f"`{name}` has no shape that a parameter can have.")
    return problems


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= 8
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**48 for v in value)
    )


def _frozen(value: Any, key: str) -> list[str]:
    if not isinstance(value, dict) or len(value) > _MOST_NAMES:
        return [f"`{key}` is no mapping of at most {_MOST_NAMES} names."]
    problems = [f"{str(n)[:100]!r} is no parameter's name." for n in value if not is_name(n)]
    return problems + [
        problem
        for name, sample in value.items()
        if sample is not None
        for problem in _hex(sample, f"the sample of {str(name)[:100]}", SAMPLE_LENGTH)
    ]


def _lora(value: Any, key: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, dict) or set(value) != {"rank", "alpha"}:
        return [f"`{key}` has no rank and alpha."]
    rank, alpha = value["rank"], value["alpha"]
    whole = isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < 2**31
    good = whole and _is_number(alpha) and alpha > 0
    return [] if good else [f"`{key}` has no rank and alpha above 0."]


def _requests(value: Any, key: str) -> list[str]:
    if not isinstance(value, dict) or set(value) != {"sha256", "count"}:
        return [f"`{key}` has no sha256 and count."]
    count = value["count"]
    whole = isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**48
    return _hex(value["sha256"], key) + ([] if whole else [f"`{key}` has no count."])


def _losses(value: Any, key: str) -> list[str]:
    good = (
        isinstance(value, list) and len(value) <= _MOST_VALUES and all(_is_number(v) for v in value)
    )
    return [] if good else [f"`{key}` is no list of numbers."]


def _versions(value: Any, key: str) -> list[str]:
    if not isinstance(value, dict) or len(value) > 100:
        return [f"`{key}` is no mapping of texts."]
    return [p for name, v in value.items() for p in (*_text(name, key), *_text(v, key))]


def _plain(value: Any, key: str) -> list[str]:
    """Returns what is wrong with a mapping of plain values."""
    if not isinstance(value, dict):
        return [f"`{key}` is no mapping."]
    left, n_values = [value], 0
    while left:
        part = left.pop()
        n_values += 1
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
        elif not (part is None or isinstance(part, bool) or _is_number(part)) and _text(part, key):
            return [f"`{key}` holds what is no number and no printable text."]
        if n_values > _MOST_VALUES:
            return [f"`{key}` holds more than {_MOST_VALUES} values."]
    return []


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


_CHECKS = {
    "id": _hex,
    "checksum": _hex,
    "base_model": _text,
    "matrices": _matrices,
    "frozen": _frozen,
    "lora": _lora,
    "hparams": _plain,
    "requests": _requests,
    "metrics": _plain,
    "losses": _losses,
    "versions": _versions,
    "created": _time,
}
