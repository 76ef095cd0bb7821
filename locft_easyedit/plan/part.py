"""What takes memory: where, how much and when."""

from __future__ import annotations

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
