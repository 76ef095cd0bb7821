"""What takes memory: where, how much and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PHASES = ("load", "prefix", "train", "evaluate")
PLACES = ("gpu", "host", "disk")

AFTER = ("train", "evaluate")
LATER = ("prefix", *AFTER)


@dataclass(frozen=True)
class Part:
    """What takes memory.

    Attributes:
        name: What it is.
        place: Where it is: `gpu`, `host` or `disk`.
        bytes: How much.
        phases: When it is there.
    """

    name: str
    place: str
    bytes: float
    phases: tuple[str, ...] = PHASES


def peak(parts: Sequence[Part], place: str) -> float:
    """Returns the most that a place holds at one time, in bytes."""
    return max(
        sum(p.bytes for p in parts if p.place == place and phase in p.phases) for phase in PHASES
    )
