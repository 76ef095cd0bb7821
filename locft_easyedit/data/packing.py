"""Which tokens run in which row: several short sequences in one row, or one in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .batching import fixed_shape
from .tokenization import TokenizedTexts


@dataclass(frozen=True)
class Rows:
    """One batch laid out in R rows of L columns. All tensors are int64 unless noted.

    Attributes:
        token_index: Where each cell's token lies in the flat ids, [R, L]; -1 in filler cells,
            to which nothing that counts ever attends.
        state_index: Where each cell's hidden state lies in a store of all states, [R, L]; -1 in
            filler cells. Another number, because the last token of a sequence is never run.
        position_ids: Position of each token within its own sequence, [R, L].
        attention_mask: [R, L] of 0 and 1; `None` for packed rows, which a model masks block by
            block where the positions start again; or what it is given instead, [R, 1, L, L] or one
            such mask for each type of layer.
        scored: Cells (flat, in R * L) whose logits predict a target token, [S]. In rows of a
            fixed shape there are more, of which the first S count.
        label_index: Where the predicted tokens lie in the flat ids, [S].
        owner: To which sequence of the batch each scored cell belongs, [S].
    """

    token_index: torch.Tensor
    state_index: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None
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

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: moved(one) for key, one in value.items()}
            if value is not None and device.type == "cuda":
                value = value.pin_memory()  # a copy from pageable memory would wait for the GPU
            return None if value is None else value.to(device, non_blocking=True)

        return Rows(**{name: moved(value) for name, value in vars(self).items()})

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields all tensors."""
        for value in vars(self).values():
            if isinstance(value, dict):
                yield from value.values()
            elif value is not None:
                yield value


def lay_out(
    texts: TokenizedTexts,
    indices: Sequence[int] | np.ndarray,
    *,
    row_tokens: int,
    packed: bool,
    first_position: np.ndarray | None = None,
    fixed: int = 0,
) -> Rows:
    """Lays out the sequences `indices` of `texts` in rows, each without its last token.

    Nothing attends to a sequence's last token and its logits predict nothing: it is only a label.
    Rows of bounded length cost less than one long row: attention grows with the square of a row.

    Args:
        texts: The token sequences.
        indices: The batch, B indices into `texts`.
        row_tokens: Packed rows hold at most this many tokens, or one longer sequence.
        packed: Several sequences a row; else one a row, padded on the right.
        first_position: Position of each sequence's first token, [N]; 0 if not given.
        fixed: Give rows that are not packed the fixed shape, of so many cells, of the sequences
            (see `fixed_shape`): more rows, which repeat the first, and more columns; 0 does not.
    """
    indices = np.asarray(indices, np.int64)
    n_scored = (texts.lengths - texts.target_start)[indices]
    shape = None
    if fixed and not packed:
        shape = fixed_shape(int(texts.input_lengths[indices].max()), int(n_scored.max()), fixed)
        more = max(0, shape.rows - len(indices))
        indices = np.concatenate([indices, np.repeat(indices[:1], more)])
        n_scored = np.concatenate([n_scored, np.zeros(more, np.int64)])
    lengths = texts.input_lengths[indices]  # [B]
    starts = np.zeros(len(indices), np.int64) if first_position is None else first_position[indices]
    bins = first_fit(lengths, starts, row_tokens) if packed else [[i] for i in range(len(indices))]
    row, column = np.zeros_like(lengths), np.zeros_like(lengths)
    for number, members in enumerate(bins):
        row[members] = number
        column[members] = np.cumsum([0, *lengths[members[:-1]]])
    n_columns = int((column + lengths).max()) if shape is None else shape.columns

    cell_shape = (len(bins), n_columns)
    member = np.repeat(np.arange(len(indices)), lengths)  # of each real cell
    within = count_up(lengths)
    first_cell = row * n_columns + column
    cells = first_cell[member] + within
    token_index = np.full(cell_shape, -1, np.int64)
    token_index.flat[cells] = texts.offsets[indices][member] + within
    state_index = np.full(cell_shape, -1, np.int64)
    state_index.flat[cells] = texts.input_offsets[indices][member] + within
    if packed:
        # Constant positions never count up by one, so that each filler cell is a block of its own.
        positions = np.zeros(cell_shape, np.int64)
        positions.flat[cells] = starts[member] + within
    else:
        # Filler repeats the last position: counting on could leave a learned table of positions.
        positions = np.minimum(np.arange(n_columns), lengths[:, None] - 1) + starts[:, None]
    first_target = texts.target_start[indices]
    owner = np.repeat(np.arange(len(indices)), n_scored)
    target = first_target[owner] + count_up(n_scored)
    scored = first_cell[owner] + target - 1  # logits at one position predict the token at the next
    if shape is not None:
        more = max(0, len(indices) * shape.scored - len(scored))
        scored = np.concatenate([scored, np.zeros(more, np.int64)])
    parts = (
        scored,
        texts.offsets[indices][owner] + target,
        owner,
    )
    return Rows(
        torch.from_numpy(token_index),
        torch.from_numpy(state_index),
        torch.from_numpy(positions),
        None if packed else torch.from_numpy((token_index >= 0).astype(np.int64)),
        *(torch.from_numpy(part) for part in parts),
    )


def count_up(counts: np.ndarray) -> np.ndarray:
    """Returns 0, 1, ..., counts[0] - 1, 0, 1, ..., counts[1] - 1 and so on."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def spanned(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the numbers in spans: starts[0] and counts[0] - 1 more, then those of the next."""
    return np.repeat(starts, counts) + count_up(counts)


def first_fit(lengths: np.ndarray, starts: np.ndarray, row_tokens: int) -> list[list[int]]:
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
