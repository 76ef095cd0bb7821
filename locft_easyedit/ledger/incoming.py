"""Requests that are to be added to a ledger: new, in already, or in with other targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.requests import Edit, distinct_edits
from ..errors import LedgerError, one_message
from ..utils.parsing import shown
from .facts import Book, kept_request


@dataclass(frozen=True)
class Incoming:
    """Requests, compared with the facts that are in.

    Attributes:
        requests: EasyEdit's request dictionaries.
        new: The edits that are not in.
        first: The number that the first of them gets.
        superseded: The number of each fact that one of them replaces, and the new one's.
        already: How many edits are in.
    """

    requests: Sequence[Mapping[str, Any]]
    new: list[Edit]
    first: int
    superseded: list[tuple[int, int]]
    already: int

    @classmethod
    def of(cls, requests: Sequence[Mapping[str, Any]], book: Book, on_conflict: str) -> Incoming:
        """Returns requests compared with a ledger's facts.

        Args:
            requests: EasyEdit's request dictionaries.
            book: The facts that are in.
            on_conflict: `error` refuses prompts that are in with other targets, `last` keeps the
                last of those that contradict each other.

        Raises:
            RequestError: The requests cannot be used.
            LedgerError: They contradict each other, or what is in where that is refused.
        """
        edits = _agreeing(requests, last=on_conflict == "last")
        new = [
            edit
            for edit in edits
            if (fact := book.at_prompt(edit.prompt)) is None or not fact.says(edit)
        ]
        first = book.next_number
        superseded = [
            (fact.number, first + i)
            for i, edit in enumerate(new)
            if (fact := book.at_prompt(edit.prompt)) is not None
        ]
        if superseded and on_conflict == "error":
            lines = [
                f"{shown(book.facts[old].prompt)}: fact {old} says "
                f"{shown(book.facts[old].target)}, now {shown(new[number - first].target)}"
                for old, number in superseded
            ]
            title = "`on_conflict=error`: facts are in with other targets. Retract them first:"
            raise LedgerError(one_message(title, lines))
        return cls(requests, new, first, superseded, len(edits) - len(new))

    @property
    def numbers(self) -> range:
        """The numbers of the new facts."""
        return range(self.first, self.first + len(self.new))

    def said(self, source: str | None) -> dict[str, Any]:
        """Returns what the log says of them.

        Args:
            source: Where they are from.
        """
        facts = [
            {"fact": number}
            | kept_request(dict(self.requests[edit.request]) | {"rewordings": edit.rewordings})
            for number, edit in zip(self.numbers, self.new, strict=True)
        ]
        return {
            "source": source,
            "facts": facts,
            "superseded": [list(pair) for pair in self.superseded],
            "already": self.already,
            "place": None,
        }


def _agreeing(requests: Sequence[Mapping[str, Any]], *, last: bool) -> list[Edit]:
    """Returns the distinct edits of some requests.

    Raises:
        LocFTError: They cannot be used, or contradict each other.
    """
    edits = distinct_edits(requests, "last" if last else None).edits
    by_prompt: dict[str, list[Edit]] = {}
    for edit in edits:
        by_prompt.setdefault(edit.prompt, []).append(edit)
    lines = [
        f"{shown(prompt)} -> "
        + ", ".join(f"{shown(edit.target)} (request {edit.request})" for edit in group)
        for prompt, group in by_prompt.items()
        if len(group) > 1
    ]
    if lines:
        raise LedgerError(
            one_message(
                "Facts that are added together contradict each other. Keep one target of each "
                "prompt, or make the ledger with `on_conflict: last`:",
                lines,
            )
        )
    return edits
