"""The model of a ledger with the matrices of one of its events, kept or made anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distributed.world import World
from ..errors import LedgerError, one_message
from ..hparams import LocFTBFHyperParams
from ..modeling.places import select_place
from ..training.trained_weights import copies_of
from .binding import check_agreed, check_loaded, surroundings
from .changes import Changes
from .facts import Book
from .log import Event, Log
from .places import event_of, hashes_at
from .recorded_facts import RecordedFacts
from .states import Matrices, State, States, delta_of, hashes_of
from .trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class BoundModel:
    """A ledger's model, and what makes its matrices.

    Attributes:
        changes: Changes the matrices.
        states: The files of those that are kept.
        at: The event whose matrices the model has.
        events: The ledger's events.
        moments_at: The event with whose moments the next training would begin, if any.
    """

    changes: Changes
    states: States
    at: int
    events: Sequence[Event]
    moments_at: int | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hparams: LocFTBFHyperParams,
        place: Mapping[str, Any],
        events: Sequence[Event],
        progress: bool,
        world: World,
    ) -> BoundModel:
        """Returns a model that is the ledger's base, or has the matrices of one of its events.

        Args:
            folder: The ledger's folder.
            model: The model.
            tokenizer: Its tokenizer.
            hparams: The settings, with the place.
            place: What the log says of it.
            events: The events so far.
            progress: Show progress bars.
            world: The processes that share the work.

        Raises:
            LedgerError: Its matrices are others, or the base's are nowhere to be found.
        """
        with world.sharing_errors():
            found = select_place(model, hparams.layers, hparams.templates)
            check_loaded(model, found.first_layer, hparams)
            at, known = event_of(found, place, events)
        check_agreed(world, "matrices", at)
        states = States(folder)
        base: Matrices | None = copies_of(found.parameters)
        if known[at] != known[0]:
            base = world.broadcast_from_main(lambda: states.load(0, known[0]))
        if base is None:
            raise LedgerError(
                f"{states.path(0)} is gone or damaged, and the model that was given is not the "
                "base. Give the base model: its matrices are written there again."
            )
        on_device = {name: base[name].to(p.device) for name, p in found.parameters.items()}
        facts = RecordedFacts(model, tokenizer, hparams, found, folder, progress, world)
        return cls(Changes(Trainer(facts), on_device), states, at, events)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.changes.trainer.model

    @property
    def world(self) -> World:
        """The processes that share the work; rank 0 alone reads and writes files."""
        return self.changes.trainer.world

    @property
    def hparams(self) -> LocFTBFHyperParams:
        """The settings, with the place."""
        return self.changes.trainer.hparams

    def bring_to_(self, events: Sequence[Event]) -> None:
        """Gives the model the matrices of the last event."""
        self.events = events
        last = events[-1].number
        if self.at != last:
            self.changes.put_(State(self.values_at(last)))
            self.at, self.moments_at = last, None

    def ready_to_train_(self) -> None:
        """Lets the next training begin with the moments that the last event has left."""
        if self.moments_at != self.at:
            self.changes.trainer.moments = self._state_at(self.at).moments
            self.moments_at = self.at

    def values_at(self, number: int) -> Matrices:
        """Returns the matrices after an event; the model is as before.

        Raises:
            LedgerError: They are not kept, and cannot be made again to the bit here.
        """
        return self._state_at(number, matrices_alone=True).matrices

    def _state_at(self, number: int, *, matrices_alone: bool = False) -> State:
        """Returns what an event has left; the model is as before.

        Args:
            number: The event.
            matrices_alone: Moments are not needed, and may be damaged or gone.

        Raises:
            LedgerError: As for `values_at`.
        """
        if number == 0:  # before the first facts there may be no place in the log
            return State(dict(self.changes.base))
        hashes = hashes_at(self.events, number)
        if hashes == hashes_at(self.events, 0):
            return State(dict(self.changes.base))
        once = self.world.broadcast_from_main
        found = once(lambda: self.states.load(number, hashes))
        if found is None:
            return self._made_anew(number)
        moments = self.events[number].said.get("moments")
        if moments is None or matrices_alone:
            return State(found)
        held = once(lambda: self.states.load_moments(number, moments))
        return self._made_anew(number) if held is None else State(found, held)

    def _made_anew(self, number: int) -> State:
        once = self.world.broadcast_from_main
        start = once(lambda: max((n for n in self.states.kept() if n < number), default=0))
        logger.info("What event %d has left is made anew, from event %d on.", number, start)
        before = self.changes.now
        try:
            self.changes.put_(self._state_at(start))
            for event in self.events[start + 1 : number + 1]:
                problem = self._remade_(event)
                if problem is not None:
                    raise LedgerError(
                        one_message(f"Event {event.number} cannot be made again:", [problem])
                    )
            found = self.changes.now
        finally:
            self.changes.put_(before)
        once(lambda: self._save(number, found))
        return found

    def replayed_(self, events: Sequence[Event]) -> list[str]:
        """Makes the matrices of every event anew from the base; returns what is not the same."""
        before, problems = self.changes.now, list[str]()
        try:
            self.changes.put_(State(self.changes.base))
            for event in events[1:]:
                problem = self._remade_(event)
                if problem is not None:
                    problems.append(f"event {event.number}: {problem}")
                    break
        finally:
            self.changes.put_(before)
        return problems

    def _remade_(self, event: Event) -> str | None:
        """Does what an event did to the model's matrices; returns why they are others, if so."""
        before = Book.of(self.events[: event.number])
        after = Book.of(self.events[: event.number + 1])
        self.changes.make_(event.kind, event.said, before, after)
        made, moments = self.changes.now, event.said.get("moments")
        same = made.hashes == hashes_at(self.events, event.number)
        if self.world.broadcast_from_main(lambda: same and made.moments_hashes == moments):
            return None
        now = surroundings(self.model, self.world)
        moved = [
            f"{key} was {value}, now {now.get(key)}"
            for key, value in event.said["surroundings"].items()
            if now.get(key) != value
        ]
        return f"the matrices came out differently ({'; '.join(moved) or 'for no known reason'})."

    def _save(self, number: int, state: State) -> None:
        book = Book.of(self.events[: number + 1])
        delta = delta_of(self.changes.base, state.matrices, self.model, self.hparams, book)
        self.states.save(number, delta, state.moments)

    def commit_(
        self, kind: str, said: Mapping[str, Any], book: Book, log: Log, start: float
    ) -> Event:
        """Does what an event says, and writes it: the matrices first, then the line of the log.

        Args:
            kind: `add` or `retract`.
            said: What it says of facts.
            book: The facts before it.
            log: The log, which gets the event.
            start: When it was asked for, as `time.perf_counter` tells it.

        Raises:
            LocFTError: It cannot be done or written; the model is as before.
        """
        number = len(log.events)
        after = Book.of([*log.events, Event(number, "", kind, said, "")])
        self.ready_to_train_()
        before = self.changes.now
        try:
            trained, how = self.changes.make_(kind, said, book, after)
            new = self.changes.now

            def write() -> Event:
                delta = delta_of(self.changes.base, new.matrices, self.model, self.hparams, after)
                self._keep_base()
                self.states.save(number, delta, new.moments)
                figures = {
                    "trained": trained.said(),
                    "how": how,
                    "surroundings": surroundings(self.model, self.world),
                    "seconds": round(time.perf_counter() - start, 3),
                    "state": hashes_of(delta),
                    "moments": new.moments_hashes,
                }
                return log.append(kind, {**said, **figures})

            event = self.world.broadcast_from_main(write)
        except BaseException:
            self.changes.put_(before)
            # Other facts may come to have the numbers of these.
            self.changes.trainer.facts.forget_all_but(book.groups)
            raise
        log.know_(event)
        self._tidy(log.events, after)
        return event

    def _keep_base(self) -> None:
        """Writes the base's matrices, unless they are there."""
        if not self.states.path(0).is_file():
            base = self.changes.base
            self.states.save(0, delta_of(base, base, self.model, self.hparams, Book()))

    def _tidy(self, events: Sequence[Event], book: Book) -> None:
        """Notes that the model has the matrices of the last event, which is written.

        Copies of matrices, and states of facts, that are not worth their room any more go.
        """
        self.at = self.moments_at = events[-1].number
        self.events = events
        if not self.world.is_main_process:
            return
        self.states.thin(events[-1].number)
        names = self.changes.trainer.facts.files_of(book.groups)
        if names is None:
            return
        for path in self.states.folder.glob("prefix-*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}.json").unlink(missing_ok=True)
