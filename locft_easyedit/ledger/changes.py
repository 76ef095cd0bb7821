"""What the events of a ledger do to the matrices: facts added, taken out, or all trained anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..modeling.devices import context_length
from ..training.preserve.protection import Protection, check_protectable
from ..training.preserve.sources import Source, read_sources
from ..training.trained_weights import copies_of, values_swapped, write_
from ..utils.hashing import json_sha256, tensor_sha256
from .facts import Book, Fact
from .filters_file import FiltersFile
from .log import ADD
from .removal import MOST_LEFT, moments, remove_
from .retraction import not_back, texts_to_return
from .states import Matrices, State
from .trainer import Trained, Trainer


@dataclass(eq=False)
class Changes:
    """The model of a ledger, whose matrices events change.

    Attributes:
        trainer: Trains and checks.
        base: The base model's matrices.
        sources: What is to be preserved.
    """

    trainer: Trainer
    base: Matrices
    sources: Sequence[Source] = field(init=False)

    def __post_init__(self) -> None:
        self.sources = read_sources(self.trainer.hparams.preserved)
        if self.sources:
            check_protectable(self.trainer.model, self.trainer.place.parameters)

    @property
    def now(self) -> State:
        """Copies of the model's present matrices, and Adam's moments."""
        return State(copies_of(self.trainer.place.parameters), self.trainer.moments)

    def put_(self, state: State) -> None:
        """Puts matrices into the model; the next training begins with the moments."""
        write_(self.trainer.place.parameters, state.matrices)
        self.trainer.moments = state.moments

    def make_(
        self, kind: str, said: Mapping[str, Any], before: Book, after: Book
    ) -> tuple[Trained, dict[str, Any]]:
        """Does what an event says to the model's present matrices, in place.

        Args:
            kind: `add` or `retract`.
            said: What the event says of facts.
            before: The facts before it.
            after: Those after it.

        Returns:
            What training came to, and what moves its last bits.

        Raises:
            LocFTError: The facts cannot be trained; to put back the matrices is up to the caller.
        """
        self.trainer.facts.forget_all_but(after.groups)
        if not after.active:
            self.put_(State(self.base))
            return Trained(), {}
        with self.trainer.ready():
            self._confine_(after)
            if kind == ADD:
                found = self._added_(_groups(after), [entry["fact"] for entry in said["facts"]])
            elif said["exact"]:
                found = self._anew_(_groups(after))
            else:
                found = self._returned_(before, after, said["facts"])
        filters = self.trainer.filters
        how = self.trainer.facts.recorder.how_it_runs()
        if filters is not None:
            how["filters"] = json_sha256(
                [[n, tensor_sha256(s)] for n, s in filters.tensors().items()]
            )
        return found, how

    def lost(self, book: Book, *, clearly: bool = False) -> list[int]:
        """Returns the numbers of the active facts that the model does not answer."""
        if not book.active:
            return []
        with self.trainer.ready():
            numbered, runner = self.trainer.facts.numbered(_groups(book))
            numbers = [fact.number for fact in book.active]
            texts = numbered.checked(numbered.edits(numbers))
            texts = self.trainer.wrong(runner, texts, clearly=clearly)
            wrong = set(numbered.edits_of(texts).tolist())
        return [n for n in numbers if numbered.edit_of[n] in wrong]

    def in_base(self) -> AbstractContextManager[None]:
        """Context manager within which the model has the base's matrices."""
        return values_swapped(self.trainer.model, self.base)

    def _added_(self, groups: Sequence[Sequence[Fact]], new: Sequence[int]) -> Trained:
        trainer = self.trainer
        numbered, runner = trainer.facts.numbered(groups)
        active = numbered.edits([f.number for group in groups for f in group if f.active])
        edits = numbered.edits(new)
        return trainer.settle_(
            numbered,
            runner,
            edits,
            np.setdiff1d(active, edits),
            numbered.checked(active),
            partial(trainer.wrong, runner),
        )

    def _anew_(self, groups: Sequence[Sequence[Fact]]) -> Trained:
        self.put_(State(self.base))
        self.trainer.facts.numbered(groups)  # all that is new is recorded in one pass
        found = Trained()
        for i, group in enumerate(groups):
            found.add(self._added_(groups[: i + 1], [fact.number for fact in group]))
        return found

    def _returned_(self, before: Book, after: Book, gone: Sequence[int]) -> Trained:
        trainer, h = self.trainer, self.trainer.hparams
        # As they were trained: in the texts of their groups.
        groups = _groups(before)
        numbered = trainer.facts.texts_of(groups)
        trainer.facts.look_at_(groups[0])
        edits = numbered.edits(gone)
        first = numbered.variants.first
        texts = numbered.texts_of(edits)
        number_of_text = np.repeat(gone, np.diff(first)[edits])
        checked = np.isin(texts, numbered.checked(edits))
        with self.in_base():
            back = texts_to_return(
                trainer.model,
                trainer.facts.tokenizer,
                numbered.texts.subset(texts),
                checked.tolist(),
                how=trainer.facts.asked(),
                max_positions=context_length(trainer.model),
                world=trainer.world,
            )
            numbered, runner = trainer.facts.numbered(_groups(after), back.texts)
            first_text = len(numbered.texts) - len(back.texts)
            runner.remember_base_(first_text, h.eval_batch_size)
            goes = moments(trainer, runner, np.arange(first_text, len(numbered.texts)))
        n_edits = len(numbered.variants.first) - 1
        returning = np.arange(n_edits - len(back.texts), n_edits)
        active = numbered.edits([fact.number for fact in after.active])

        asked, kept = first_text + back.asked, numbered.checked(active)

        def not_right(texts: np.ndarray) -> np.ndarray:
            facts, others = (np.intersect1d(texts, of) for of in (kept, asked))
            found = trainer.wrong(runner, facts), not_back(runner, others, h.eval_batch_size)
            return np.concatenate(found)  # what goes comes last

        more = dict(zip(returning.tolist(), number_of_text.tolist(), strict=True))
        checked = np.concatenate([kept, asked])
        settle_ = partial(
            trainer.settle_, numbered, runner, returning, active, checked, not_right, more
        )
        stays = None if goes is None else moments(trainer, runner, numbered.texts_of(active))
        if goes is None or stays is None:
            return settle_()
        as_it_was = self.now
        remove_(trainer, self.base, goes, stays)
        wrong = not_right(checked)
        suffices = np.count_nonzero(wrong >= first_text) <= MOST_LEFT * len(asked)
        if not suffices:
            self.put_(as_it_was)
        all_right = suffices and not len(wrong)
        # Nothing is trained then; and a low-rank change is not confined.
        with nullcontext() if all_right or h.tuning == "lora" else trainer.sparing(stays):
            return settle_(wrong=wrong if suffices else None)

    def _confine_(self, book: Book) -> None:
        """Lets the trainer have what confines the change: measured on the base, once, and kept."""
        trainer = self.trainer
        if not self.sources:
            return
        facts = [book.facts[number] for number in book.first]
        texts = trainer.facts.tokenized(facts)
        file = FiltersFile.of(trainer.facts.folder, texts, self.sources, trainer.hparams)
        once = trainer.world.broadcast_from_main
        filters = once(lambda: file.load(trainer.place.parameters))
        if filters is None:
            with self.in_base():
                measured = Protection.measured(
                    trainer.model,
                    trainer.facts.tokenizer,
                    trainer.place,
                    self.sources,
                    texts,
                    trainer.hparams,
                    world=trainer.world,
                    timings={},
                    progress=trainer.facts.progress,
                ).filters
            once(lambda: file.save(measured))
            filters = measured
        trainer.filters = filters


def _groups(book: Book) -> list[list[Fact]]:
    return [[book.facts[n] for n in group] for group in book.groups]
