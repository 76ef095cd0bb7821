"""Which texts stand for an edit in an epoch: its own one, and a few others that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Variants:
    """The texts of N edits, one edit after the other: the own one first, then G groups of others.

    Attributes:
        first: Where each edit's texts begin, [N + 1] int64.
        counts: Texts of each edit in each group, [G, N] int64.
        each: Texts of each group that are trained beside the own one in an epoch, at most, [G].
        turn: Where each edit begins in the circle of each group, [G, N] int64.
    """

    first: np.ndarray
    counts: np.ndarray
    each: Sequence[int]
    turn: np.ndarray

    @classmethod
    def own_alone(cls, n: int) -> Variants:
        """Returns the texts of `n` edits that have no others: text i is edit i."""
        return cls(np.arange(n + 1), np.zeros((0, n), np.int64), (), np.zeros((0, n), np.int64))

    @classmethod
    def in_turns(cls, counts: np.ndarray, each: Sequence[int], seed: int) -> Variants:
        """Returns the texts of edits with so many others.

        Args:
            counts: Texts of each edit in each group, [G, N].
            each: Those of each group in an epoch, G numbers.
            seed: Seed of the order.
        """
        first = np.concatenate([[0], np.cumsum(counts.sum(axis=0) + 1)])
        turn = np.random.default_rng(seed).integers(0, 2**31, counts.shape)
        return cls(first, counts, tuple(each), turn)

    @property
    def most(self) -> int:
        """Texts of one edit in an epoch, at most."""
        most = self.counts.max(axis=1, initial=0)  # [G]
        return 1 + int(np.minimum(most, self.each).sum())

    def texts(self, batch: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the texts of a mini-batch of edits; all own ones come first.

        The others of a group take turns, so that each is trained about as often.

        Args:
            batch: The edits, [B].
            epoch: The epoch, from 0.
        """
        begin = self.first[batch]
        found = [begin]
        begin = begin + 1
        for counts, each, turn in zip(self.counts, self.each, self.turn, strict=True):
            n_others = counts[batch]
            for k in range(each):
                there = n_others > k
                nth = (turn[batch] + epoch * each + k)[there] % n_others[there]
                found.append(begin[there] + nth)
            begin = begin + n_others
        return np.concatenate(found)
