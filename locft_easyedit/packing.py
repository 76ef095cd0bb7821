"""Which tokens run in which row: several short sequences in one row, or one in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .tokens import TokenizedTexts


@dataclass(frozen=True)
class Rows:
    """One batch laid out in R rows of L columns. All tensors are int64 unless noted.

    Attributes:
        token_index: Where each cell's token lies in the flat ids, [R, L]; -1 in filler cells,
            to which nothing that counts ever attends.
        position_ids: Position of each token within its own sequence, [R, L].
        attention_mask: [R, L] of 0 and 1, or `None` for packed rows, which transformers masks
            block by block where the positions start again.
        scored: Cells (flat, in R * L) whose logits predict a target token, [S].
        label_index: Where the predicted tokens lie in the flat ids, [S].
        owner: To which sequence of the batch each scored cell belongs, [S].
    """

    token_index: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    scored: torch.Tensor
    label_index: torch.Tensor
    owner: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """Which cells hold a token, [R, L] bool."""
        return self.token_index >= 0

    @property
    def gather_index(self) -> torch.Tensor:
        """`token_index` with any valid index in the filler cells, [R, L]."""
        return self.token_index.clamp(min=0)

    def to(self, device: torch.device) -> Rows:
        """Returns the rows on `device`."""
        moved: dict[str, Any] = {}
        for name, tensor in vars(self).items():
            if tensor is not None and device.type == "cuda":
                tensor = tensor.pin_memory()  # a copy from pageable memory would wait for the GPU
            moved[name] = None if tensor is None else tensor.to(device, non_blocking=True)
        return Rows(**moved)


def lay_out(
    texts: TokenizedTexts,
    indices: Sequence[int] | np.ndarray,
    *,
    row_tokens: int,
    packed: bool,
    first_position: np.ndarray | None = None,
) -> Rows:
    """Lays out the sequences `indices` of `texts` in rows.

    Rows of bounded length cost less than one long row: attention grows with the square of a row.

    Args:
        texts: The token sequences.
        indices: The batch, B indices into `texts`.
        row_tokens: Packed rows hold at most this many tokens, or one longer sequence.
        packed: Several sequences a row; else one a row, padded on the right.
        first_position: Position of each sequence's first token, [N]; 0 if not given.
    """
    lengths = texts.lengths[indices]
    starts = np.zeros(len(indices), np.int64) if first_position is None else first_position[indices]
    bins = _first_fit(lengths, starts, row_tokens) if packed else [[i] for i in range(len(indices))]
    n_columns = max(int(lengths[members].sum()) for members in bins)

    shape = (len(bins), n_columns)
    token_index = np.full(shape, -1, np.int64)
    # Constant positions never count up by one, so that each filler cell is a block of its own.
    positions = np.zeros(shape, np.int64)
    scored, labels, owner = [], [], []
    for row, members in enumerate(bins):
        column = 0
        for member in members:
            first, length = int(texts.offsets[indices[member]]), int(lengths[member])
            cells = slice(column, column + length)
            token_index[row, cells] = np.arange(first, first + length)
            positions[row, cells] = np.arange(starts[member], starts[member] + length)
            targets = np.arange(int(texts.target_start[indices[member]]), length)
            # The logits at one position predict the token at the next.
            scored.append(row * n_columns + column + targets - 1)
            labels.append(first + targets)
            owner.append(np.full(len(targets), member))
            column += length
    # Scored cells come in the batch's order, whatever the packing did.
    by_owner = np.argsort([int(o[0]) if len(o) else -1 for o in owner], kind="stable")
    ordered = [np.concatenate([part[i] for i in by_owner]) for part in (scored, labels, owner)]
    if not packed:
        # Filler repeats the last position: counting on could leave a learned table of positions.
        positions[:] = np.minimum(np.arange(n_columns), lengths[:, None] - 1) + starts[:, None]
    return Rows(
        torch.from_numpy(token_index),
        torch.from_numpy(positions),
        None if packed else torch.from_numpy((token_index >= 0).astype(np.int64)),
        *(torch.from_numpy(part.astype(np.int64)) for part in ordered),
    )


def _first_fit(lengths: np.ndarray, starts: np.ndarray, row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: returns the members of each row."""
    capacity = max(row_tokens, int(lengths.max()))
    rows: list[list[int]] = []
    free: list[int] = []
    next_position: list[int] = []  # the position that would continue the row's last sequence
    for i in np.argsort(-lengths, kind="stable").tolist():
        length, start = int(lengths[i]), int(starts[i])
        for row, space in enumerate(free):
            # A sequence whose first position continued the one before would be taken for its end.
            if length <= space and next_position[row] != start:
                break
        else:
            row = len(rows)
            rows.append([])
            free.append(capacity)
            next_position.append(-1)
        rows[row].append(i)
        free[row] -= length
        next_position[row] = start + length
    return rows
