"""A ledger of facts: `Ledger.init`, `Ledger.open`, and what is done with one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import Edit
from ..delta.delta import Delta
from ..distributed.world import World, get_world
from ..errors import LedgerError
from ..hparams import LocFTBFHyperParams
from ..modeling.loading import load_model
from ..modeling.places import select_place
from ..utils.files import locked
from .beginning import begun
from .binding import (
    check_agreed,
    check_same_model,
    check_supported,
    hparams_of,
)
from .bound_model import BoundModel
from .choosing import choose
from .export import check_export, write_export
from .facts import Book, event_at
from .incoming import Incoming
from .log import ADD, INIT, RETRACT, Event, Log
from .outcomes import Added, Retracted, Verified
from .places import chosen_place, hashes_at, place_of
from .report import Difference, difference_of
from .states import Matrices, States, delta_of

logger = logging.getLogger(__name__)


@dataclass
class Ledger:
    """Facts of a model that come and go.

    Make one with `Ledger.init`, get it back with `Ledger.open`. What only reads the log needs no
    model; whatever else does loads it, unless one was given. The model then has the matrices of
    the last event.

    Where a launcher has started several processes, each of them does the same with it, and they
    share the work; rank 0 alone reads and writes the folder.

    Attributes:
        path: The ledger's folder.
        log: Its events.
        book: The facts after the last of them.
        progress: Show progress bars.
        world: The processes that share the work: those of the launcher.
    """

    path: Path
    log: Log
    book: Book
    progress: bool = True
    _given: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
    _overrides: dict[str, Any] = field(default_factory=dict)
    world: World = field(default_factory=get_world)
    _bound: BoundModel | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.progress = self.progress and self.world.is_main_process

    # Making and opening

    @classmethod
    def init(
        cls,
        path: str | Path,
        hparams: LocFTBFHyperParams,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        progress: bool = True,
    ) -> Ledger:
        """Returns a new ledger, bound to a base model, its tokenizer and the settings.

        Args:
            path: A folder that holds no ledger; made if need be.
            hparams: The settings. With `layers: auto` the first facts decide the place.
            model: The base model, without any edit; loaded as `hparams` say if `None`.
            tokenizer: Its tokenizer.
            progress: Show progress bars.

        Raises:
            LocFTError: There is a ledger already, a ledger cannot be kept with these settings, or
                the model or the place cannot be used.
        """
        log, model, tokenizer = begun(Path(path), hparams, model, tokenizer, get_world())
        return cls(Path(path), log, Book.of(log.events), progress, (model, tokenizer))

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        progress: bool = True,
        **overrides: Any,
    ) -> Ledger:
        """Returns a ledger; nothing but its log is read.

        Args:
            path: The ledger's folder.
            model: The base model, or the model as the ledger's last event has left it; loaded when
                needed if `None`.
            tokenizer: Its tokenizer.
            progress: Show progress bars.
            **overrides: Where the model is to be loaded from and to, in place of what the ledger
                was made with: `model_name`, `device`.

        Raises:
            LedgerError: There is no ledger, it is of a newer version, or damaged beyond repair.
        """
        log = get_world().broadcast_from_main(lambda: Log.read(path))
        for line in log.damage:
            logger.warning("%s: %s", path, line)
        if log.events[0].kind != INIT:
            raise LedgerError(f"`{path}` does not begin with a model. It is no ledger's log.")
        given = None if model is None or tokenizer is None else (model, tokenizer)
        kept = {key: value for key, value in overrides.items() if value is not None}
        return cls(Path(path), log, Book.of(log.events), progress, given, kept)

    @property
    def hparams(self) -> LocFTBFHyperParams:
        """The settings, with the place once it is chosen."""
        found = replace(hparams_of(self.log.events[0]), **self._overrides)
        place = self._place
        if place is not None:
            names = ("layers", "rewrite_module_tmp", "lr")
            found = replace(found, **{name: place[name] for name in names})
        return found

    @property
    def _place(self) -> Mapping[str, Any] | None:
        """What the log says of the place."""
        return place_of(self.log.events)

    @property
    def model(self) -> PreTrainedModel:
        """The model as the last event has left it, or the base model before there is any."""
        with self._writing():
            if self._place is None:
                return self._loaded()[0]
            return self._ready().model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._loaded()[1]

    # Adding and taking out

    def add(
        self,
        requests: Sequence[Mapping[str, Any]],
        *,
        source: str | None = None,
    ) -> Added:
        """Adds facts: trains them beside old ones, checks all, and trains again what is lost.

        A prompt that is in with another target is superseded; with `on_conflict: error` that is
        refused. What is in already is left as it is.

        Args:
            requests: EasyEdit's request dictionaries.
            source: Where they are from.

        Raises:
            LocFTError: The requests cannot be used or contradict each other, the model is another
                one, or training diverged. Ledger and model are as before.
        """
        with self._writing():
            incoming = Incoming.of(requests, self.book, self.hparams.on_conflict)
            if not incoming.new:
                return Added(None, [], [], incoming.already, [])
            said = incoming.said(source)
            if self._place is None:
                said["place"] = self._chosen(incoming.new)
            event = self._commit(ADD, said)
            return Added(
                event,
                [self.book.facts[number] for number in incoming.numbers],
                incoming.superseded,
                incoming.already,
                event.said["trained"]["lost"],
            )

    def retract(
        self,
        numbers: Sequence[int] = (),
        *,
        subject: str | None = None,
        source: str | None = None,
        since: str | None = None,
        exact: bool = False,
    ) -> Retracted:
        """Takes facts out: their prompts go back to the base model's own answers.

        Args:
            numbers: The facts' numbers; or choose them by the next three.
            subject: Their subject.
            source: Where they are from.
            since: Added at this day or time (UTC) or later.
            exact: Train all that remain anew from the base, commit by commit: the matrices are, bit
                for bit, those of a ledger that never had the facts.

        Raises:
            LocFTError: There are no such facts, the model is another one, or training diverged.
                Ledger and model are as before.
        """
        with self._writing():
            chosen = self.book.chosen(numbers, subject=subject, source=source, since=since)
            gone = sorted(fact.number for fact in chosen)
            event = self._commit(RETRACT, {"facts": gone, "exact": exact})
            wrong = event.said["trained"]["lost"]
            return Retracted(
                event,
                [self.book.facts[n] for n in gone],
                [n for n in wrong if n in set(gone)],
                [n for n in wrong if n not in set(gone)],
            )

    def _commit(self, kind: str, said: dict[str, Any]) -> Event:
        """Does what an event says, and writes it."""
        start, last = time.perf_counter(), self.log.events[-1].hash
        check_agreed(self.world, "facts, or another ledger", [kind, said, last])
        bound = self._ready(said.get("place"))
        try:
            event = bound.commit_(kind, said, self.book, self.log, start)
        except BaseException:
            if said.get("place") is not None:
                self._bound = None  # others may choose another place
            raise
        self.book = Book.of(self.log.events)
        return event

    # Looking

    def verify(self, *, replay: bool = False) -> Verified:
        """Checks the chain, the files, the model's matrices and every active fact.

        Args:
            replay: Also make the matrices after every event anew, and compare their hashes.

        Raises:
            LocFTError: The model is another one.
        """
        with self._writing():
            events, once = self.log.events, self.world.broadcast_from_main
            problems = once(lambda: list(self.log.damage))
            if self._place is None:
                self._loaded()
                return Verified(len(events), 0, [], problems, [])
            hashes = [hashes_at(events, event.number) for event in events]
            whole, damaged = once(lambda: States(self.path).looked_through(events, hashes))
            problems += damaged
            bound = self._ready()
            if replay:
                problems += bound.replayed_(events)
            lost = bound.changes.lost(self.book)
            return Verified(len(events), len(self.book.active), whole, problems, lost)

    def matrices(self, at: str | int | None = None) -> Matrices:
        """Returns the trained matrices as they were: kept ones, or made anew.

        Args:
            at: An event's number, or a day or time (UTC); the last event if `None`.

        Raises:
            LedgerError: There is no such event, or its matrices cannot be made again here.
        """
        number = event_at(self.log.events, at)
        with self._writing():
            return self._ready().values_at(number)

    def edit(self, at: str | int | None = None) -> Delta:
        """Returns the ledger's facts as one edit of the base model; see `matrices`."""
        number = event_at(self.log.events, at)
        with self._writing():
            bound = self._ready()
            book = Book.of(self.log.events[: number + 1])
            new = bound.values_at(number)
            return delta_of(bound.changes.base, new, bound.model, bound.hparams, book)

    def diff(self, first: str | int, second: str | int | None = None) -> Difference:
        """Returns which facts came and went between two states, and how far the matrices moved.

        Args:
            first: An event's number, or a day or time (UTC).
            second: Another; the last event if `None`.

        Raises:
            LedgerError: As for `matrices`.
        """
        events = self.log.events
        one, other = event_at(events, first), event_at(events, second)
        return difference_of(
            (Book.of(events[: one + 1]), Book.of(events[: other + 1])),
            (self.matrices(one), self.matrices(other)),
        )

    def export(
        self,
        output: str | Path,
        as_: str = "edit",
        at: str | int | None = None,
        *,
        model: str | Path | None = None,
    ) -> Path:
        """Writes the ledger's facts in a form that needs no ledger; returns where.

        Args:
            output: A folder that is new or empty.
            as_: `edit` (`edit.safetensors`, see `Delta`), `model` (the edited model) or `adapter`
                (a PEFT adapter).
            at: As for `matrices`.
            model: The folder of the base model; where the ledger's was loaded from if `None`.

        Raises:
            LocFTError: It cannot be exported so, or `output` cannot be written.
        """
        once, hparams = self.world.broadcast_from_main, self.hparams
        folder = once(lambda: check_export(hparams, as_, model))
        delta = self.edit(at)
        return once(lambda: write_export(delta, output, as_, folder, hparams.trust_remote_code))

    # The model

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Returns model and tokenizer, checked against what the ledger is bound to."""
        hparams = self.hparams
        check_supported(hparams)
        if self._given is None:
            self._given = load_model(hparams)
        model, tokenizer = self._given
        if self._bound is None:
            place = self._place
            trained = () if place is None else tuple(place["base"])
            with self.world.sharing_errors():
                check_same_model(self.log.events[0], model, tokenizer, trained)
        return self._given

    def _chosen(self, edits: Sequence[Edit]) -> dict[str, Any]:
        model, tokenizer = self._loaded()
        hparams = choose(
            model, tokenizer, edits, self.hparams, world=self.world, progress=self.progress
        )
        return chosen_place(hparams, select_place(model, hparams.layers, hparams.templates))

    def _ready(self, place: Mapping[str, Any] | None = None) -> BoundModel:
        """Returns the model with the matrices of the last event.

        Args:
            place: What the next event will say of the place; `None` if the log says it.
        """
        if self._bound is None:
            model, tokenizer = self._loaded()
            place = place or self._place
            if place is None:
                raise LedgerError("The ledger has no facts yet, and so no place. Add some first.")
            names = ("layers", "rewrite_module_tmp", "lr")
            hparams = replace(self.hparams, **{name: place[name] for name in names})
            self._bound = BoundModel.of(
                self.path, model, tokenizer, hparams, place, self.log.events, self.progress,
                self.world,
            )  # fmt: skip
        self._bound.bring_to_(self.log.events)
        return self._bound

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Context manager within which no other run writes; the log is brought up to date."""
        with ExitStack() as stack:

            def newer() -> Log | None:
                stack.enter_context(locked(self.path))
                return Log.read(self.path) if self.log.changed() else None

            log = self.world.broadcast_from_main(newer)
            if log is not None:
                self.log, self.book = log, Book.of(log.events)
            yield

    def close(self) -> None:
        """Gives back what recorded states take in memory; the model keeps its matrices."""
        if self._bound is not None:
            self._bound.changes.trainer.facts.close()
