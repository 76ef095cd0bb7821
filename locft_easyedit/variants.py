"""Which texts stand for an edit in an epoch: its own wording, and a few of its rewordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Variants:
    """The texts of N edits, one edit after the other: the own wording first, then rewordings.

    Attributes:
        first: Where each edit's texts begin, [N + 1] int64.
        each: Rewordings that are trained beside the own wording in an epoch, at most.
        turn: Where each edit begins in the circle of its rewordings, [N] int64.
    """

    first: np.ndarray
    each: int
    turn: np.ndarray

    @classmethod
    def alone(cls, n: int) -> Variants:
        """Returns the texts of `n` edits without rewordings: text i is edit i."""
        return cls(np.arange(n + 1), 0, np.zeros(n, np.int64))

    @classmethod
    def of(cls, n_rewordings: Sequence[int], each: int, seed: int) -> Variants:
        """Returns the texts of edits with so many rewordings.

        Args:
            n_rewordings: Rewordings of each edit, N numbers.
            each: Those of an epoch.
            seed: Seed of the order.
        """
        first = np.concatenate([[0], np.cumsum(np.array(n_rewordings, np.int64) + 1)])
        turn = np.random.default_rng(seed).integers(0, 2**31, len(n_rewordings))
        return cls(first, each, turn)

    @property
    def most(self) -> int:
        """Texts of one edit in an epoch, at most."""
        return 1 + self.each

    def texts(self, batch: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the texts of a mini-batch of edits; all own wordings come first.

        An edit's rewordings take turns, so that each is trained about as often as the others.

        Args:
            batch: The edits, [B].
            epoch: The epoch, from 0.
        """
        own = self.first[batch]
        found = [own]
        n_rewordings = self.first[batch + 1] - own - 1
        for k in range(self.each):
            there = n_rewordings > k
            turn = (self.turn[batch] + epoch * self.each + k)[there] % n_rewordings[there]
            found.append(own[there] + 1 + turn)
        return np.concatenate(found)
