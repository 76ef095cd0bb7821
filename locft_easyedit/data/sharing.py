"""Texts that begin alike, laid out so that what they share runs once.

A row is then a tree: each token attends to those on the way from its text's first token to itself,
which a mask says. Nothing that a token attends to is another than in its text alone, so that logits
and gradients are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .packing import Rows, count_up, first_fit
from .tokenization import TokenizedTexts

# Texts that share fewer tokens with the one before may lie in another row, which then is fuller.
_WORTH_A_ROW = 4


@dataclass(frozen=True, eq=False)
class _Tree:
    """Texts of a row in an order in which those that begin alike follow one another.

    Attributes:
        members: Their numbers in the batch.
        shared: How many tokens each shares with the one before.
        size: Tokens that are left.
    """

    members: list[int]
    shared: list[int]
    size: int


def lay_out_shared(
    texts: TokenizedTexts,
    indices: Sequence[int] | np.ndarray,
    *,
    row_tokens: int,
    at_most: float = math.inf,
) -> Rows | None:
    """Lays out the sequences `indices` of `texts` in rows, each without its last token.

    As `lay_out` in packed rows; but cells of beginnings that sequences of a row have in common are
    there once, and the rows' `attention_mask` is [R, 1, L, L] bool: who attends to whom.

    Args:
        texts: The token sequences.
        indices: The batch, B indices into `texts`.
        row_tokens: Rows hold at most twice as many tokens, in which more beginnings meet, or one
            longer sequence.
        at_most: Cells of all rows, fillers included; `None` is returned where they would be more.
    """
    indices = np.asarray(indices, np.int64)
    lengths = texts.input_lengths[indices]  # [B]
    capacity = max(2 * row_tokens, int(lengths.max()))
    trees = _trees(_padded(texts, indices, lengths), lengths, capacity)
    sizes = np.array([tree.size for tree in trees], np.int64)
    rows = first_fit(sizes, np.zeros_like(sizes), capacity)
    n_columns = max(int(sizes[row].sum()) for row in rows)
    if len(rows) * n_columns > at_most:
        return None

    shape = (len(rows), n_columns)
    token_index, state_index = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    positions = np.zeros(shape, np.int64)
    attends = np.zeros((*shape, n_columns), bool)
    attends[:, np.arange(n_columns), np.arange(n_columns)] = True  # filler must attend to something
    cells_of: list[np.ndarray] = [np.zeros(0, np.int64)] * len(indices)
    for number, row in enumerate(rows):
        used = 0
        for tree in (trees[i] for i in row):
            columns = np.zeros(0, np.int64)
            for member, shared in zip(tree.members, tree.shared, strict=True):
                length = int(lengths[member])
                new = np.arange(used, used + length - shared)
                columns = np.concatenate([columns[:shared], new])
                used += length - shared
                within = np.arange(shared, length)
                token_index[number, new] = texts.offsets[indices[member]] + within
                state_index[number, new] = texts.input_offsets[indices[member]] + within
                positions[number, new] = within
                attends[number, columns[:, None], columns] |= np.tri(length, dtype=bool)
                cells_of[member] = number * n_columns + columns

    n_scored = (texts.lengths - texts.target_start)[indices]
    owner = np.repeat(np.arange(len(indices)), n_scored)
    target = texts.target_start[indices][owner] + count_up(n_scored)
    # Logits at one position predict the token at the next.
    scored = np.array([cells_of[i][t - 1] for i, t in zip(owner, target, strict=True)], np.int64)
    parts = (
        token_index,
        state_index,
        positions,
        attends[:, None],
        scored,
        texts.offsets[indices][owner] + target,
        owner,
    )
    return Rows(*(torch.from_numpy(part) for part in parts))


def _padded(texts: TokenizedTexts, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the tokens of each sequence but its last, [B, most], -1 where there is none."""
    ids = np.full((len(indices), int(lengths.max())), -1, np.int64)
    member, within = np.repeat(np.arange(len(indices)), lengths), count_up(lengths)
    ids[member, within] = texts.ids[texts.offsets[indices][member] + within]
    return ids


def _trees(ids: np.ndarray, lengths: np.ndarray, capacity: int) -> list[_Tree]:
    """Returns trees of at most `capacity` tokens, or of one sequence."""
    order = np.lexsort(ids.T[::-1])
    ids = ids[order]
    same = (ids[1:] == ids[:-1]) & (ids[1:] >= 0)
    common = [0, *np.cumprod(same, axis=1).sum(axis=1).tolist()]
    trees: list[_Tree] = []
    for member, shared in zip(order.tolist(), common, strict=True):
        length, tree = int(lengths[member]), trees[-1] if trees else None
        fits = tree is not None and tree.size + length - shared <= capacity
        if tree is None or not fits or shared < min(_WORTH_A_ROW, length):
            trees.append(_Tree([member], [0], length))
        else:
            tree.members.append(member)
            tree.shared.append(shared)
            trees[-1] = _Tree(tree.members, tree.shared, tree.size + length - shared)
    return trees
