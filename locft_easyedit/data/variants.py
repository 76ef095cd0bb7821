"""Which texts stand for an edit in an epoch: its own one, and a few others that take turns.

Beside those of a mini-batch others can be replayed, which are to stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .packing import spanned

_TURNS = 2**31


@dataclass(frozen=True, eq=False)
class Variants:
    """The texts of N edits, one edit after the other: the own one first, then its others.

    Attributes:
        first: Where each edit's texts begin, [N + 1] int64.
        each: Others of an edit that are trained beside its own text in an epoch, in the mean and at
            most: of 0.5, one in every second epoch.
        turn: Which other each edit begins with, and when, [N] int64 below 2**31.
    """

    first: np.ndarray
    each: float
    turn: np.ndarray

    @classmethod
    def own_alone(cls, n: int) -> Variants:
        """Returns the texts of `n` edits that have no others: text i is edit i."""
        return cls(np.arange(n + 1), 0, np.zeros(n, np.int64))

    @classmethod
    def in_turns(cls, counts: np.ndarray, each: float, seed: int) -> Variants:
        """Returns the texts of edits with so many others.

        Args:
            counts: Others of each edit, [N].
            each: Those that are trained in an epoch, in the mean.
            seed: Seed of the order.
        """
        first = np.concatenate([[0], np.cumsum(counts + 1)])
        turn = np.random.default_rng(seed).integers(0, _TURNS, len(counts))
        return cls(first, each, turn)

    @property
    def most(self) -> int:
        """Texts of one edit in an epoch, at most."""
        return 1 + min(int((np.diff(self.first) - 1).max(initial=0)), math.ceil(self.each))

    def texts(self, batch: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the texts of a mini-batch of edits; all own ones come first.

        The others of an edit take turns, so that each is trained about as often.

        Args:
            batch: The edits, [B].
            epoch: The epoch, from 0.
        """
        own = self.first[batch]
        n_others = self.first[batch + 1] - own - 1
        # How many were trained before this epoch, and after it; a part of one counts when it is
        # whole, which edits reach at different times.
        begun = self.turn[batch] / _TURNS
        before, after = (
            np.floor(begun + self.each * k).astype(np.int64) for k in (epoch, epoch + 1)
        )
        now = np.minimum(after - before, n_others)
        found = [own]
        for k in range(now.max(initial=0)):
            there = now > k
            nth = (self.turn[batch] + before + k)[there] % n_others[there]
            found.append(own[there] + 1 + nth)
        return np.concatenate(found)

    def edits_of(self, texts: np.ndarray) -> np.ndarray:
        """Returns the edits that these texts stand for, each once, ascending."""
        return np.unique(np.searchsorted(self.first, texts, side="right") - 1)

    def first_texts(self, edits: np.ndarray, most: int = _TURNS) -> np.ndarray:
        """Returns the first texts of each edit: its own one, and others up to `most` in all.

        Args:
            edits: The edits, [B].
            most: Texts of an edit, at most.
        """
        counts = np.minimum(np.diff(self.first)[edits], most)
        return spanned(self.first[edits], counts)


@dataclass(frozen=True, eq=False)
class Replayed(Variants):
    """The texts of edits, which mini-batches of some of them share with as many others.

    Attributes:
        pool: The others, [P]: those of a mini-batch are drawn from them at random.
        seed: Seed of the draw.
    """

    pool: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    seed: int = 0

    @classmethod
    def of(cls, variants: Variants, each: float, pool: np.ndarray, seed: int) -> Replayed:
        """Returns the texts of `variants`, with so many others in an epoch, and this pool."""
        return cls(variants.first, each, variants.turn, pool, seed)

    @property
    def most(self) -> int:
        """Texts that come with one edit in an epoch, at most."""
        return super().most * (2 if len(self.pool) else 1)

    def texts(self, batch: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the texts of a mini-batch, and those of as many others.

        What is drawn depends on the epoch and the mini-batch alone.

        Args:
            batch: The edits, [B].
            epoch: The epoch, from 0.
        """
        n = min(len(batch), len(self.pool))
        if n:
            draw = np.random.default_rng([self.seed, epoch, int(batch[0])])
            batch = np.concatenate([batch, draw.choice(self.pool, n, replace=False)])
        return super().texts(batch, epoch)
