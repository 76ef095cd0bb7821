"""What a ledger's log says: which facts are in, since when, from where, and what became of others.

The log is read event by event into a `Book`; the book as it was at any event is the same reading,
stopped there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from ..data.requests import Edit, with_leading_space
from ..errors import LedgerError, one_message
from ..utils.parsing import shown
from .log import ADD, RETRACT, Event

SUPERSEDED, RETRACTED = "superseded", "retracted"
# What of a request has a part in its training, and what it was before.
KEPT_FIELDS = ("prompt", "target_new", "subject", "rewordings", "ground_truth")
_TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?Z?)?")


@dataclass(frozen=True)
class Fact:
    """A fact of a ledger.

    Attributes:
        number: Its number, from 1, for good.
        request: What it was added with: `prompt`, `target_new` and what else of it is kept.
        source: Where it is from; `None` where that was not said.
        event: The event that added it.
        since: When that was, UTC.
        ended: The event that ended it; `None` while it is active.
        why: `superseded` or `retracted`; `None` while it is active.
        by: The number of the fact that took its place.
    """

    number: int
    request: Mapping[str, Any]
    source: str | None
    event: int
    since: str
    ended: int | None = None
    why: str | None = None
    by: int | None = None

    @property
    def active(self) -> bool:
        """Whether the fact is in the model."""
        return self.ended is None

    @property
    def prompt(self) -> str:
        """Its prompt."""
        return str(self.request["prompt"])

    @property
    def target(self) -> str:
        """Its target."""
        return str(self.request["target_new"])

    @property
    def subject(self) -> str | None:
        """Its subject, where it was given."""
        subject = self.request.get("subject")
        return subject.strip() or None if isinstance(subject, str) else None

    def says(self, edit: Edit) -> bool:
        """Returns whether an edit says the same."""
        mine = self.prompt, with_leading_space(self.target)
        return mine == (edit.prompt, with_leading_space(edit.target))


@dataclass
class Book:
    """The facts of a ledger after some events.

    Attributes:
        facts: All facts that there ever were, by number.
        first: Numbers of the facts that were trained first: what is preserved was measured with
            them.
        n_events: Events that were read.
    """

    facts: dict[int, Fact] = field(default_factory=dict)
    first: tuple[int, ...] = ()
    n_events: int = 0
    _groups: list[tuple[int, ...]] = field(default_factory=list, repr=False)
    _by_prompt: dict[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, events: Iterable[Event]) -> Book:
        """Returns the book that some events make, from the first on."""
        book = cls()
        for event in events:
            book.read_(event)
        return book

    def read_(self, event: Event) -> None:
        """Brings the book up to an event, in place."""
        said = event.said
        if event.kind == ADD:
            for old, new in said["superseded"]:
                self._end(old, event.number, SUPERSEDED, new)
            for entry in said["facts"]:
                request = dict(entry)
                number = request.pop("fact")
                self.facts[number] = Fact(number, request, said["source"], event.number, event.time)
                self._by_prompt[request["prompt"]] = number
            group = tuple(entry["fact"] for entry in said["facts"])
            self.first = self.first or group
            self._groups.append(group)
        elif event.kind == RETRACT:
            for number in said["facts"]:
                self._end(number, event.number, RETRACTED)
            if said["exact"] or not self._by_prompt:
                # All that are left were trained anew, as if the others had never been there.
                active = (tuple(filter(self._is_active, group)) for group in self._groups)
                self._groups = [group for group in active if group]
                self.first = self._groups[0] if self._groups else ()
        self.n_events += 1

    def _end(self, number: int, event: int, why: str, by: int | None = None) -> None:
        fact = self.facts[number]
        self.facts[number] = replace(fact, ended=event, why=why, by=by)
        self._by_prompt.pop(fact.prompt, None)

    @property
    def active(self) -> list[Fact]:
        """The facts that are in, by number."""
        return [fact for fact in self.facts.values() if fact.active]

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Numbers of the facts that were trained, and whose states were recorded, together.

        In order, and only groups with an active fact; others of the group may have ended.
        """
        return [group for group in self._groups if any(map(self._is_active, group))]

    @property
    def next_number(self) -> int:
        """The number of the next fact."""
        return len(self.facts) + 1

    def at_prompt(self, prompt: str) -> Fact | None:
        """Returns the active fact with a prompt."""
        number = self._by_prompt.get(prompt)
        return None if number is None else self.facts[number]

    def chosen(
        self,
        numbers: Sequence[int] = (),
        *,
        subject: str | None = None,
        source: str | None = None,
        since: str | None = None,
    ) -> list[Fact]:
        """Returns active facts: those numbered, or all that are of a subject, a source, a time.

        Args:
            numbers: Their numbers; with none the rest decides.
            subject: Their subject, as a whole.
            source: Where they are from, as a whole.
            since: Added at this day (or time, UTC) or later.

        Raises:
            LedgerError: Nothing or both was given; a number was never there, is not active any
                more or is given twice; no active fact is like that.
        """
        wanted = {"subject": subject, "source": source, "since": since}
        given = {key: value for key, value in wanted.items() if value is not None}
        if bool(numbers) == bool(given):
            raise LedgerError(
                "Name facts by their numbers, or by `subject`, `source` and `since`: one of the "
                "two. `locft ledger show LEDGER` lists the numbers."
            )
        if numbers:
            problems = [self._not_active(n) for n in numbers if not self._is_active(n)]
            twice = sorted({n for n in numbers if list(numbers).count(n) > 1})
            problems += [f"fact {n} is named twice. Keep one of them." for n in twice]
            if problems:
                raise LedgerError(one_message("The facts cannot be taken out:", problems))
            return [self.facts[n] for n in numbers]
        if since is not None and not _TIME.fullmatch(since):
            raise LedgerError(
                f"`since={shown(since, 50)}` is no day. Write since=2030-01-31, or with a time "
                "since=2030-01-31T12:00 (UTC)."
            )
        found = [
            fact
            for fact in self.active
            if (subject is None or fact.subject == subject.strip())
            and (source is None or fact.source == source)
            and (since is None or fact.since >= since.replace(" ", "T"))
        ]
        if not found:
            named = ", ".join(f"`{key}={shown(value, 60)}`" for key, value in given.items())
            raise LedgerError(
                f"No active fact is of {named}. `locft ledger show LEDGER` lists what is in."
            )
        return found

    def _is_active(self, number: int) -> bool:
        return number in self.facts and self.facts[number].active

    def _not_active(self, number: int) -> str:
        fact = self.facts.get(number)
        if fact is None:
            last = self.next_number - 1
            known = f"there are 1 to {last}" if last else "there are none yet"
            return f"fact {number} was never there; {known}."
        by = "" if fact.by is None else f" by fact {fact.by}"
        return f"fact {number} is not in any more: {fact.why}{by} in event {fact.ended}."


def event_at(events: Sequence[Event], at: str | int | None) -> int:
    """Returns the number of the event that `at` means: the last one of a day or before, or N.

    Args:
        events: The events of a ledger.
        at: A number; a day or time, UTC; `None` for the last event.

    Raises:
        LedgerError: There is no such event.
    """
    last = events[-1].number
    if at is None:
        return last
    text = str(at)
    if text.isdecimal():
        if int(text) > last:
            raise LedgerError(f"`at={text}` is no event; the last one is {last}.")
        return int(text)
    if not _TIME.fullmatch(text) or not _is_date(text[:10]):
        raise LedgerError(
            f"`at={shown(at, 50)}` is neither an event's number nor a day. Write at=12, "
            "at=2030-01-31 or at=2030-01-31T12:00 (UTC)."
        )
    until = text.replace(" ", "T").rstrip("Z")
    # A day or a minute takes in all of it.
    found = [event.number for event in events if event.time[: len(until)] <= until]
    if not found:
        raise LedgerError(f"`at={text}` is before the ledger began ({events[0].time}).")
    return found[-1]


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def kept_request(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the log keeps of a request."""
    kept = {key: request[key] for key in KEPT_FIELDS if request.get(key)}
    if not isinstance(kept.get("ground_truth", ""), str):
        del kept["ground_truth"]
    if not isinstance(kept.get("subject", ""), str):
        del kept["subject"]
    if "rewordings" in kept:
        kept["rewordings"] = list(kept["rewordings"])
    return kept
