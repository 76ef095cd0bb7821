"""Sequences of many lengths in batches, with a progress bar; smaller ones where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from ..utils.progress import progress_bar

logger = logging.getLogger(__name__)


def length_sorted_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns the indices of all sequences, longest first, in batches of `batch_size`.

    Sequences of one length waste no cells; the longest first shows at once whether memory suffices.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def in_batches(
    lengths: np.ndarray,
    batch_size: int,
    run: Callable[[np.ndarray], None],
    *,
    description: str,
    unit: str = "prompt",
    progress: bool = False,
) -> None:
    """Calls `run` with the indices of each batch, longest sequences first.

    Where a GPU's memory runs out, the batch is run again in halves, as are those after it. `run`
    must therefore have no lasting effect before it has succeeded.

    Args:
        lengths: Tokens of each sequence, [N].
        batch_size: Sequences a batch.
        run: Handles one batch.
        description: Label of the progress bar.
        unit: What it counts.
        progress: Show it.
    """
    with progress_bar(total=len(lengths), desc=description, unit=unit, show=progress) as bar:
        pending = length_sorted_batches(lengths, batch_size)[::-1]
        size = batch_size
        while pending:
            batch = pending.pop()
            if len(batch) > size:
                pending += [batch[i : i + size] for i in range(0, len(batch), size)][::-1]
                continue
            try:
                run(batch)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                size = len(batch) // 2
            else:
                bar.update(len(batch))
                continue
            # Outside the handler: the exception's frames hold the tensors that have to go.
            torch.cuda.empty_cache()
            pending.append(batch)
            logger.warning(
                "%d sequences in one batch do not fit into the GPU's memory: %d from here on.",
                len(batch),
                size,
            )
