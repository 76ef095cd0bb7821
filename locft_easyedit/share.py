"""Which edits are a process's own, of those that several train together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import World


@dataclass(eq=False)
class Partition:
    """A rank's part of the edits.

    Attributes:
        world: Whose.
        own: Indices of its edits, ascending.
        position: Where each of all edits is among `own`; -1 if it is another rank's, [N].
    """

    world: World
    own: np.ndarray
    position: np.ndarray

    @classmethod
    def in_world(cls, world: World, sizes: np.ndarray) -> Partition:
        """Returns this rank's part of edits of these sizes, [N]."""
        own = world.partition(sizes)
        position = np.full(len(sizes), -1, np.int64)
        position[own] = np.arange(len(own))
        return cls(world, own, position)

    def of(self, batch: np.ndarray) -> np.ndarray:
        """Returns which of the own edits are in a mini-batch of all, in its order."""
        positions = self.position[batch]
        return positions[positions >= 0]
