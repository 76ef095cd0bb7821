"""Which texts stand for an edit in an epoch: its own one, and a few others that take turns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

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
