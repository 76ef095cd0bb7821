"""Texts that grow by a token at a time: what all ways of decoding have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.batching import fixed_shape
from ..modeling.devices import input_device
from ..modeling.forward import run_next
from ..modeling.sampling import padded_left

# Next tokens, [B], from logits [B, V], the B texts' indices and their tokens so far.
Pick = Callable[[torch.Tensor, np.ndarray, list[list[int]]], torch.Tensor]
# Whether text i is complete, with the tokens it has got.
Done = Callable[[int, list[int]], bool]


@dataclass(frozen=True)
class Beginning:
    """Texts as a model reads them first: padded on the left, so that all end in one column.

    Attributes:
        ids: Tokens, [R, T]; where a shape is fixed, R may be more than the texts.
        mask: Which of them are real, [R, T].
        positions: [R, T].
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, model: Any, grown: list[list[int]], fixed: int) -> Beginning:
        """Returns B texts, in a shape that their lengths determine where `fixed` has its cells."""
        width, n_rows = max(map(len, grown)), len(grown)
        if fixed:
            shape = fixed_shape(width, 1, fixed)
            width, n_rows = shape.columns, max(shape.rows, n_rows)
        # Any token fills the left side: the mask hides it.
        ids, mask = padded_left(grown + grown[:1] * (n_rows - len(grown)), 0, width)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        device = input_device(model)
        return cls(ids.to(device), mask.to(device), positions.to(device))

    def run(self, model: Any, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Returns the logits after the last column, [R, V], and the cache (see `run_next`)."""
        return run_next(
            model,
            cache,
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
        )


def grow_(
    grown: list[list[int]], open_: np.ndarray, tokens: torch.Tensor, texts: np.ndarray, done: Done
) -> np.ndarray:
    """Appends a token to each open member; returns which of them go on, [B] bool.

    Args:
        grown: The members' tokens, changed in place.
        open_: The members that get one, [B].
        tokens: What they get, [B].
        texts: The number of each member's text.
        done: Whether a text is complete.
    """
    for member, token in zip(open_, tokens.tolist(), strict=True):
        grown[member].append(token)
    return np.array([not done(int(texts[member]), grown[member]) for member in open_], bool)
