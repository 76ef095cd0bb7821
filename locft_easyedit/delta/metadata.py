"""What an edit's file says of the edit: made, and checked when it comes from outside."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import nn

from ..data.requests import Edit, with_leading_space
from ..hparams import LocFTBFHyperParams
from ..modeling.parameter_slices import named_among, names_beside, whole_name
from ..training.result import EditResult
from ..utils.hashing import DTYPES as _DTYPES
from ..utils.hashing import (
    SAMPLE_LENGTH,
    dtype_name,
    json_sha256,
    readable,
    sample_digest,
    tensor_sha256,
)
from ..utils.parsing import shown

FORMAT = 1
DTYPES = {dtype_name(dtype): dtype for dtype in _DTYPES.values()}
# Where a prefix begins a tensor's name in the file, a parameter's own name cannot.
PREFIXES = ("original.", "lora_A.", "lora_B.")
_MOST_NAME, _MOST_TEXT, _MOST_DEPTH = 512, 4096, 32


def metadata_of(
    result: EditResult,
    model: nn.Module,
    hparams: LocFTBFHyperParams,
    edits: Sequence[Edit],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what is said of an edit; see `Delta.from_result`."""
    matrices: dict[str, Any] = {
        name: {
            "dtype": dtype_name(new.dtype),
            "shape": list(new.shape),
            "new": tensor_sha256(new),
            "original": tensor_sha256(result.original[name]),
        }
        for name, new in result.new.items()
    }
    lora = None
    if result.lora is not None:
        lora = {"rank": result.lora.rank, "alpha": float(result.lora.alpha)}
        for name, described in matrices.items():
            described["lora_A"] = tensor_sha256(result.lora.a[name])
            described["lora_B"] = tensor_sha256(result.lora.b[name])
    return sealed(
        {
            "format": FORMAT,
            "base_model": printable(str(hparams.to_dict()["model_name"])),
            "matrices": matrices,
            "frozen": frozen_samples(model, matrices),
            "lora": lora,
            "hparams": printable(hparams.to_dict()),
            "requests": requests_hash(edits),
            "metrics": printable(metrics),
            "losses": [float(loss) for loss in result.losses],
            "versions": _versions(),
            "created": datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
        }
    )


def sealed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `metadata` with the edit's id and a checksum of everything that is said."""
    sealed = {key: value for key, value in metadata.items() if key not in ("id", "checksum")}
    sealed["id"] = _id_of(sealed)
    return sealed | {"checksum": json_sha256(sealed)}


def _id_of(metadata: Mapping[str, Any]) -> str:
    """Returns the edit's id: of one id, edits put the same numbers into the same model."""
    return json_sha256([metadata[key] for key in ("matrices", "frozen", "requests", "lora")])


def frozen_samples(model: nn.Module, edited: Collection[str]) -> dict[str, str | None]:
    """Returns a sample's hash of each parameter that an edit leaves alone.

    A parameter that is not in memory as plain numbers (left on disk, quantized) has `None`. Of a
    fused parameter of which single experts' slices are edited, each of the others has its own.
    """
    everything = dict(model.named_parameters())
    names = names_beside(everything, edited, lambda name: len(everything[name]))
    return {
        name: sample_digest(p) if readable(p) else None
        for name, p in named_among(everything, names).items()
    }


def requests_hash(edits: Sequence[Edit]) -> dict[str, Any]:
    """Returns the sha256 and the number of (prompt, target) pairs; their order plays no part."""
    texts = sorted([edit.prompt, with_leading_space(edit.target)] for edit in edits)
    return {"sha256": json_sha256(texts), "count": len(texts)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "locft_easyedit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            found[name] = "unknown"
    return found


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


def problems_of(metadata: Any) -> list[str]:
    """Returns a line for everything in `metadata` that is not as this format has it."""
    if not isinstance(metadata, dict):
        return ["what it says of the edit is no mapping."]
    number = metadata.get("format")
    if type(number) is not int or number != FORMAT:
        return [
            f"it is of format {shown(number, 50)}; this version reads format {FORMAT}. "
            "Update locft_easyedit."
        ]
    problems = [
        f"`{key}` must hold finite numbers and printable texts of at most {_MOST_TEXT} characters, "
        f"nested at most {_MOST_DEPTH} deep."
        for key, value in metadata.items()
        if not _is_plain(value)
    ]
    problems = problems or _problems(metadata, _schema(metadata.get("lora") is not None), "")
    if problems:
        return problems
    if not metadata["matrices"]:
        problems.append("`matrices` names no matrix.")
    both = sorted(set(metadata["matrices"]) & set(metadata["frozen"]))
    if both:
        problems.append(f"`{both[0]}` is both changed and unchanged.")
    everything = {*metadata["matrices"], *metadata["frozen"]}
    parts = sorted(n for n in everything if whole_name(n) != n and whole_name(n) in everything)
    if parts:
        problems.append(f"`{parts[0]}` is named beside `{whole_name(parts[0])}`, which it is in.")
    if metadata["id"] != _id_of(metadata):
        problems.append("its `id` does not belong to its hashes.")
    if metadata["checksum"] != json_sha256({k: v for k, v in metadata.items() if k != "checksum"}):
        problems.append("what it says of the edit was changed: the checksum differs.")
    return problems


def _is_plain(value: Any, depth: int = _MOST_DEPTH) -> bool:
    """Returns whether a value is finite numbers and printable texts, and what is made of these."""
    if isinstance(value, (dict, list)):
        parts = value if isinstance(value, list) else [*value, *value.values()]
        return depth > 0 and all(_is_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return len(value) <= _MOST_TEXT and value.isprintable()
    return value is None or isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**48


def _is_name(value: str) -> bool:
    """Returns whether a text can be a parameter's name; it is never used as a path."""
    spaces = any(c.isspace() for c in value)
    return 0 < len(value) <= _MOST_NAME and not spaces and not value.startswith(PREFIXES)


# The schema: a mapping has the schemas of its keys, `_ByName` one for every value, and whatever is
# neither is a `_Kind`: what a value must be, in words and as a test.
_Kind = tuple[str, Callable[[Any], bool]]


@dataclass(frozen=True)
class _ByName:
    """A mapping from parameters' names to values of one schema."""

    values: Any


def _matching(what: str, pattern: str) -> _Kind:
    return what, lambda v: isinstance(v, str) and bool(re.fullmatch(pattern, v, re.ASCII))


_HASH = _matching("a hash of 64 hexadecimal digits", "[0-9a-f]{64}")
_SAMPLE = _matching(f"a hash of {SAMPLE_LENGTH} hexadecimal digits", f"[0-9a-f]{{{SAMPLE_LENGTH}}}")
_COUNT: _Kind = ("a whole number, 0 or more", _is_count)
_TEXT: _Kind = ("a text", lambda v: isinstance(v, str))
_MAPPING: _Kind = ("a mapping", lambda v: isinstance(v, dict))
_MATRIX: dict[str, _Kind] = {
    "dtype": _matching(f"one of {', '.join(DTYPES)}", "|".join(DTYPES)),
    "shape": (
        "a list of 1 to 8 whole numbers above 0",
        lambda v: isinstance(v, list) and 1 <= len(v) <= 8 and all(_is_count(n, 1) for n in v),
    ),
    "new": _HASH,
    "original": _HASH,
}
_LORA: dict[str, _Kind] = {
    "rank": ("a whole number, 1 or more", lambda v: _is_count(v, 1)),
    "alpha": ("a number above 0", lambda v: _is_number(v) and v > 0),
}


def _schema(lora: bool) -> dict[str, Any]:
    """Returns the schema of an edit's metadata, trained as LoRA or not."""
    return {
        "format": _COUNT,
        "id": _HASH,
        "checksum": _HASH,
        "base_model": _TEXT,
        "matrices": _ByName(_MATRIX | ({"lora_A": _HASH, "lora_B": _HASH} if lora else {})),
        # A parameter that could not be read has no sample.
        "frozen": _ByName((f"{_SAMPLE[0]} or null", lambda v: v is None or _SAMPLE[1](v))),
        "lora": _LORA if lora else ("null", lambda v: v is None),
        "hparams": _MAPPING,
        "requests": {"sha256": _HASH, "count": _COUNT},
        "metrics": _MAPPING,
        "losses": (
            "a list of numbers",
            lambda v: isinstance(v, list) and all(map(_is_number, v)),
        ),
        "versions": (
            "a mapping of texts",
            lambda v: isinstance(v, dict) and all(isinstance(text, str) for text in v.values()),
        ),
        "created": _matching(
            "a time such as 2030-01-31T12:00:00+00:00",
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00",
        ),
    }


def _problems(value: Any, schema: Any, where: str) -> list[str]:
    """Returns a line for everything in `value` (named `where`) that is not as `schema` has it."""
    if isinstance(schema, (dict, _ByName)) and not isinstance(value, dict):
        return [f"{where} is {shown(value, 50)}, not a mapping."]
    if isinstance(schema, _ByName):
        problems = [
            f"{where} holds {shown(name, 100)}, which is no name that a parameter can have here."
            for name in value
            if not _is_name(name)
        ]
        schema = dict.fromkeys(value, schema.values)
    elif isinstance(schema, dict):
        own = where or "what it says"
        problems = [f"{own} lacks `{key}`." for key in schema if key not in value]
        problems += [
            f"{own} has the unknown key {shown(key, 100)}." for key in value if key not in schema
        ]
    else:
        what, is_right = schema
        return [] if is_right(value) else [f"{where} is {shown(value, 50)}, not {what}."]
    return problems or [
        line
        for key, part in schema.items()
        for line in _problems(value[key], part, f"`{key}` of {where}" if where else f"`{key}`")
    ]
