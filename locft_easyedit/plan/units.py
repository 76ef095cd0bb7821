"""Sizes of memory as people write them, and figures as people read them."""

from __future__ import annotations

import math
import re

from ..errors import HyperParamsError

MIB, GIB = 2**20, 2**30
# 80G and 80 mean GiB, as GPUs are sold; 80GB is taken at its word.
_UNITS = {
    "": GIB,
    **{f"{letter}{tail}": 2 ** (10 * power) for power, letter in enumerate("kmgt", 1)
       for tail in ("", "ib")},
    **{f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", 1)},
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(key: str, text: str) -> int:
    """Returns a size such as `80GiB`, `80GB`, `80G` or `80` (GiB) in bytes.

    Raises:
        HyperParamsError: It is no size above 0.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise HyperParamsError(
            f"`{key}={text}` is no size. Write {key}=80GiB, {key}=80GB, or {key}=80 for GiB."
        )
    size = int(float(match.group(1)) * unit)
    if size < 1:
        raise HyperParamsError(f"`{key}={text}` must be above 0. Write {key}=80GiB, for example.")
    return size


def bytes_text(n: float) -> str:
    """Returns bytes as GiB with three digits, `-` for none."""
    if n == 0:
        return "-"
    gib = n / GIB
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.3g} GiB"


def flop_text(n: float) -> str:
    """Returns floating-point operations with their decimal prefix."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G")):
        if n >= 10**power:
            return f"{n / 10**power:.3g} {prefix}FLOP"
    return f"{n:.3g} FLOP"


def seconds_text(seconds: float) -> str:
    """Returns a duration in the unit that reads best."""
    if not math.isfinite(seconds):
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
