"""Several stores of hidden states as one: those of texts that were recorded at different times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .store import StateStore


class JoinedStore(StateStore):
    """States of all tokens of some stores, one store after the other; these stay their makers'.

    Args:
        parts: The stores: same width, precision and device.
    """

    def __init__(self, parts: Sequence[StateStore]) -> None:
        first = parts[0]
        self.device, self.dtype, self.width = first.device, first.dtype, first.width
        self.parts = list(parts)
        self._edges = np.cumsum([0, *(part.n_tokens for part in parts)])
        self.n_tokens = int(self._edges[-1])
        self.file = next((part.file for part in parts if part.reads_disk), None)

    def get(self, where: torch.Tensor) -> torch.Tensor:
        """Returns the states of tokens, [..., W], on the store's device.

        Args:
            where: Numbers of the tokens on the host, any shape.
        """
        flat = where.reshape(-1)
        found = torch.empty(len(flat), self.width, dtype=self.dtype, device=self.device)
        owner = np.searchsorted(self._edges, flat.numpy(), side="right") - 1
        for i in np.unique(owner).tolist():
            cells = torch.from_numpy(np.flatnonzero(owner == i))
            states = self.parts[i].get(flat[cells] - int(self._edges[i]))
            found[cells.to(self.device)] = states
        return found.view(*where.shape, self.width)

    def close(self) -> None:
        """Does nothing: what is joined belongs to others."""
