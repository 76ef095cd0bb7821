"""Sequences of many lengths in batches, with a progress bar; smaller ones where memory runs out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..utils.memory import is_out_of_memory
from ..utils.progress import progress_bar

logger = logging.getLogger(__name__)

# Of a fixed shape: what columns are a multiple of, and the fewest that the number of rows is for.
_COLUMNS, _FEW_COLUMNS = 8, 16
# All its cells, by the device: 512 keep a CPU busy. On a GPU that has not been measured.
_CELLS, _CELLS_GPU = 512, 4096
# Tokens of a pass that gives hidden states alone: large products, small activations.
_TOKENS = 8192


def length_sorted_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns the indices of all sequences, longest first, in batches of `batch_size`.

    Sequences of one length waste no cells; the longest first shows at once whether memory suffices.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def fixed_batches(lengths: np.ndarray, scored: np.ndarray, cells: int) -> list[np.ndarray]:
    """Returns the indices of all sequences in batches that run in one of few fixed shapes.

    In which shape a sequence runs depends on nothing but itself (see `fixed_shape`).

    Args:
        lengths: Tokens of each sequence that are run, [N].
        scored: Positions of each whose logits are wanted, [N].
        cells: As for `fixed_shape`.
    """
    both = zip(lengths.tolist(), scored.tolist(), strict=True)
    shapes = [fixed_shape(*pair, cells) for pair in both]
    members: dict[FixedShape, list[int]] = {}
    for i, shape in enumerate(shapes):
        members.setdefault(shape, []).append(i)
    return [
        np.array(members[shape][first : first + shape.rows])
        for shape in sorted(members, key=lambda shape: (-shape.columns, -shape.scored))
        for first in range(0, len(members[shape]), shape.rows)
    ]


def cells_of(device: str) -> int:
    """Returns the cells of fixed shapes on a kind of device (`cpu`, `cuda`)."""
    return _CELLS_GPU if device == "cuda" else _CELLS


def sequences_a_pass(tokens: float) -> int:
    """Returns how many sequences, of so many tokens in the mean, give their states in one pass."""
    return max(1, int(_TOKENS / max(1.0, tokens)))


@dataclass(frozen=True)
class FixedShape:
    """A shape in which rows run whatever is in them: `rows` of `columns`, `scored` in each."""

    rows: int
    columns: int
    scored: int


def fixed_shape(length: int, scored: int, cells: int) -> FixedShape:
    """Returns the shape in which a sequence runs where rounding must not depend on the others.

    In half precision the last bits of a logit, and with them the choice between two tokens that
    are close, follow from how the products of matrices are divided up. That depends on their
    shape, and not on what other rows hold. Few shapes waste few rows.

    Args:
        length: Tokens of the sequence that are run.
        scored: Positions of it whose logits are wanted.
        cells: Cells of a shape, about as many as keep the device busy.
    """
    columns = -(-max(length, 1) // _COLUMNS) * _COLUMNS
    rows = min(most_rows(cells), max(1, cells // columns))
    return FixedShape(
        rows, columns, _COLUMNS * 2 ** max(0, math.ceil(math.log2(max(scored, 1) / _COLUMNS)))
    )


def most_rows(cells: int) -> int:
    """Returns the rows of the fixed shape that has most of them."""
    return max(1, cells // _FEW_COLUMNS)


def in_batches(
    batches: Sequence[np.ndarray],
    run: Callable[[np.ndarray], None],
    *,
    description: str,
    unit: str = "prompt",
    progress: bool = False,
) -> None:
    """Calls `run` with the indices of each batch.

    Where memory runs out, the batch is run again in halves, as are those after it. `run`
    must therefore have no lasting effect before it has succeeded.

    Args:
        batches: Indices of sequences, those that take most memory first.
        run: Handles one batch.
        description: Label of the progress bar.
        unit: What it counts.
        progress: Show it.
    """
    n_texts = sum(map(len, batches))
    with progress_bar(total=n_texts, desc=description, unit=unit, show=progress) as bar:
        pending = list(batches)[::-1]
        size = max(map(len, batches), default=1)
        while pending:
            batch = pending.pop()
            if len(batch) > size:
                pending += [batch[i : i + size] for i in range(0, len(batch), size)][::-1]
                continue
            try:
                run(batch)
            except Exception as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                size = len(batch) // 2
            else:
                bar.update(len(batch))
                continue
            # Outside the handler: the exception's frames hold the tensors that have to go.
            torch.cuda.empty_cache()
            pending.append(batch)
            logger.warning(
                "%d sequences in one batch do not fit into memory: %d from here on.",
                len(batch),
                size,
            )
