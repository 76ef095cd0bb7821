"""A ledger for people: what is in it, what happened, and how two of its states differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..utils.tables import Row, counted, number_text, terminal_table
from .facts import Book, Fact
from .log import ADD, RETRACT, Event

if TYPE_CHECKING:
    from rich.table import Table

MOST_SHOWN = 50  # facts in a table, unless all are asked for


@dataclass(frozen=True)
class Difference:
    """How the ledger after an event differs from that after another.

    Attributes:
        first: Number of the one event.
        second: Number of the other.
        came: Facts that are in after the second alone.
        went: Facts that are in after the first alone, as the second has them.
        change: ||second - first|| / ||first|| of each matrix (Frobenius norms).
    """

    first: int
    second: int
    came: list[Fact]
    went: list[Fact]
    change: dict[str, float]


def difference_of(
    books: tuple[Book, Book],
    values: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
) -> Difference:
    """Returns how two states of a ledger differ.

    Args:
        books: The facts of both.
        values: The matrices of both.
    """
    before, after = books
    there = [{fact.number for fact in book.active} for book in books]
    change = {
        name: float(torch.linalg.norm(values[1][name].float() - value.float()))
        / max(float(torch.linalg.norm(value.float())), 1e-30)
        for name, value in values[0].items()
    }
    return Difference(
        before.n_events - 1,
        after.n_events - 1,
        [fact for fact in after.active if fact.number not in there[0]],
        [
            after.facts.get(fact.number, fact)
            for fact in before.active
            if fact.number not in there[1]
        ],
        change,
    )


def facts_table(facts: Sequence[Fact], title: str, *, everything: bool = False) -> Table:
    """Returns a table of facts, the latest `MOST_SHOWN` unless `everything` is asked for."""
    shown = facts if everything else facts[-MOST_SHOWN:]
    left_out = len(facts) - len(shown)
    rows = [
        Row(
            [
                fact.prompt,
                fact.target.strip(),
                fact.source or "-",
                fact.since[:16].replace("T", " "),
                _state_of(fact),
                str(fact.number),
            ],
            style="" if fact.active else "dim",
        )
        for fact in shown
    ]
    headings = ["prompt", "target", "source", "since (UTC)", "state", "fact"]
    caption = f"{counted(left_out, 'earlier fact')} not shown; all=true shows all" * bool(left_out)
    return terminal_table(headings, rows, title=title, caption=caption or None, text_columns=5)


def log_table(events: Sequence[Event]) -> Table:
    """Returns a table of events."""
    rows = []
    for event in events:
        trained = event.said.get("trained", {})
        rows.append(
            Row(
                [
                    event.time[:16].replace("T", " "),
                    event.kind,
                    _what(event),
                    str(event.number),
                    number_text(trained.get("texts"), ","),
                    number_text(trained.get("repairs"), "d"),
                    number_text(event.said.get("seconds"), ".1f"),
                ]
            )
        )
    headings = ["when (UTC)", "kind", "what", "event", "texts", "repairs", "seconds"]
    return terminal_table(headings, rows, title="Log", text_columns=3)


def as_json(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Returns facts ready for JSON."""
    return [asdict(fact) for fact in facts]


def _state_of(fact: Fact) -> str:
    if fact.active:
        return "active"
    by = "" if fact.by is None else f" by {fact.by}"
    return f"{fact.why}{by} in event {fact.ended}"


def _what(event: Event) -> str:
    said = event.said
    if event.kind == ADD:
        parts = [counted(len(said["facts"]), "fact")]
        if said["superseded"]:
            parts.append(f"{len(said['superseded'])} superseded")
        if said["source"]:
            parts.append(f"from {said['source']}")
        return ", ".join(parts) + _wrong(said)
    if event.kind == RETRACT:
        numbers = ", ".join(map(str, said["facts"][:10]))
        more = f" and {len(said['facts']) - 10} more" if len(said["facts"]) > 10 else ""
        return f"{numbers}{more}" + ", exactly" * said["exact"] + _wrong(said)
    return str(said["hparams"]["model_name"])


def _wrong(said: Mapping[str, Any]) -> str:
    lost = said["trained"]["lost"]
    return f"; {len(lost)} not as they should be" if lost else ""
