"""What became of what was asked of a ledger."""

from __future__ import annotations

from dataclasses import dataclass

from .facts import Fact
from .log import Event


@dataclass(frozen=True)
class Added:
    """What became of requests that were to be added.

    Attributes:
        event: The event; `None` if nothing was new.
        facts: The facts that are new.
        superseded: For each fact that another target has replaced, its number and the new one's.
        already: How many requests the ledger held already.
        lost: Numbers of active facts that do not hold, though they were trained again and again.
    """

    event: Event | None
    facts: list[Fact]
    superseded: list[tuple[int, int]]
    already: int
    lost: list[int]


@dataclass(frozen=True)
class Retracted:
    """What became of facts that were to be taken out.

    Attributes:
        event: The event.
        facts: The facts that were taken out.
        not_out: Numbers of those to which the model does not answer as the base does.
        lost: Numbers of active facts that do not hold.
    """

    event: Event
    facts: list[Fact]
    not_out: list[int]
    lost: list[int]


@dataclass(frozen=True)
class Verified:
    """What `Ledger.verify` found.

    Attributes:
        n_events: Events whose chain is whole.
        n_facts: Active facts that were asked.
        states: Events whose matrices are kept and whole.
        problems: A line for each thing that is wrong; the files it names are made anew when needed.
        lost: Numbers of active facts that the model does not answer.
    """

    n_events: int
    n_facts: int
    states: list[int]
    problems: list[str]
    lost: list[int]
