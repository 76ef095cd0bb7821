"""How the processes of a ledger divide up texts among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.batching import length_sorted_batches
from ..data.packing import spanned
from ..data.tokenization import TokenizedTexts
from ..distributed.world import Partition, World


def whole_batches(world: World, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns which of N texts are this rank's, ascending, if whole batches of all are dealt out.

    Rounding depends on what else is in a batch: so each has the bits that one process gives it.

    Args:
        world: The processes.
        lengths: Tokens of each text, [N].
        batch_size: Texts in a batch, the longest ones together.
    """
    own = length_sorted_batches(lengths, batch_size)[world.rank :: world.size]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *own]))


def tokens_of(texts: TokenizedTexts, some: np.ndarray) -> np.ndarray:
    """Returns the numbers of the tokens that are run of some texts, in their order."""
    return spanned(texts.input_offsets[some], texts.input_lengths[some])


def joined_partitions(parts: Sequence[Partition]) -> Partition:
    """Returns a process's parts of some sets of texts as its part of all, set after set."""
    starts = np.cumsum([0, *(len(part.position) for part in parts)])
    own = [part.own + start for part, start in zip(parts, starts, strict=False)]
    return Partition.of(parts[0].world, np.concatenate(own), int(starts[-1]))
