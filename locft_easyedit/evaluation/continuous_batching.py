"""Continuous batching: rows of a static key-value cache, filled again as their texts are done.

A step costs nearly the same for one row as for many, as the model's weights have to be read, and
answers end at different lengths. So a text that is done makes room for the next one. All shapes
stay as they are, and follow from a text's own length: in half precision, where rounding decides
many a choice, an answer is then the same whatever else is asked.

Orca (Yu et al., OSDI 2022) has this scheduling by iterations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..data.batching import fixed_batches, fixed_shape, most_rows
from ..errors import ModelError
from ..modeling.forward import run_next
from ..utils.memory import is_out_of_memory
from ..utils.progress import progress_bar
from .growing_texts import Beginning, Done, Pick, grow_

logger = logging.getLogger(__name__)

# Columns of a static cache: a multiple of these, with room for so many new tokens at least.
_COLUMNS, _ROOM = 64, 32
# Of a GPU's memory, what a cache may take.
_MEMORY_SHARE = 1 / 16


def decode_refilled(
    model: Any,
    lengths: np.ndarray,
    begin: Callable[[int], list[int]],
    end: Callable[[int, list[int]], None],
    *,
    pick: Pick,
    done: Done,
    cells: int,
    span: float,
    description: str = "",
    progress: bool = False,
) -> dict[int, list[int]]:
    """Appends tokens to each of N texts until it is done, in rows that are filled again.

    A text that its cache has no column left for is read again, in a wider one. So is what was
    written so far where memory runs out; fewer rows run from then on.

    Args:
        model: A causal language model, in evaluation mode.
        lengths: As for `decode_`, like what follows: tokens of each text, [N].
        begin: Gives text i's tokens, to be changed.
        end: Takes all tokens of text i when it is done.
        pick: Chooses next tokens.
        done: Called after each token.
        cells: As for `fixed_shape`.
        span: Columns of a cache, at most (see `attention_span`).
        description: Label of the progress bar.
        progress: Show a progress bar.

    Returns:
        The texts that are not done, with their tokens: no cache of `span` columns holds them.

    Raises:
        ModelError: The model's cache is not one of attention over all tokens.
    """
    widths = [cache_width(length, cells) for length in lengths.tolist()]
    rest = {i: begin(i) for i, width in enumerate(widths) if width > span}
    # The lengths of the texts that are not done, and the tokens of those that have begun.
    left = {i: length for i, length in enumerate(lengths.tolist()) if i not in rest}
    begun: dict[int, list[int]] = {}
    allowed: dict[int, int] = {}  # rows of a cache, by its width, where memory ran out

    def start(i: int) -> list[int]:
        if i not in begun:
            begun[i] = begin(i)
        return begun[i]

    with progress_bar(total=len(left), desc=description, unit="prompt", show=progress) as bar:

        def ended(i: int) -> None:
            end(i, begun.pop(i))
            del left[i]
            bar.update()

        while left:
            for width, batches in _by_width(left, cells):
                rows = _Rows(
                    model,
                    allowed.get(width, most_rows(cells)),
                    width,
                    cells,
                    pick,
                    done,
                    ended,
                )
                n_rows = 0
                try:
                    rows.run(batches, start)
                except Exception as error:
                    n_rows = rows.n_rows
                    if n_rows == 1 or not is_out_of_memory(error):
                        raise
                if n_rows:
                    # Outside the handler: the exception's frames hold the tensors that have to go.
                    del rows
                    torch.cuda.empty_cache()
                    allowed[width] = n_rows // 2
                    logger.warning(
                        "%d rows of a key-value cache do not fit into memory: %d from here on.",
                        n_rows,
                        n_rows // 2,
                    )
            left |= {i: len(ids) for i, ids in begun.items()}
            for i in [i for i in begun if cache_width(left[i], cells) > span]:
                rest[i] = begun.pop(i)
                del left[i]
    return rest


def decode_in_rows(
    model: Any,
    texts: np.ndarray,
    grown: list[list[int]],
    pick: Pick,
    done: Done,
    *,
    width: int,
    cells: int,
) -> None:
    """Appends tokens to a few texts in one cache of a given width, until they are done.

    Args:
        model: As for `decode_refilled`, like what follows.
        texts: The texts' numbers, from 0 on, [B].
        grown: Their tokens, changed in place.
        pick: Chooses next tokens.
        done: Called after each token.
        width: Columns of the cache; texts without a column left are not done.
        cells: As for `fixed_shape`.

    Raises:
        ModelError: The model's cache is not one of attention over all tokens.
    """
    lengths = np.array([*map(len, grown)], np.int64)
    batches = fixed_batches(lengths, np.ones_like(lengths), cells)
    rows = _Rows(model, most_rows(cells), width, cells, pick, done, lambda _: None)
    rows.run([texts[batch] for batch in batches], lambda i: grown[i])


def cache_width(length: int, cells: int) -> int:
    """Returns the columns of the cache in which a text of so many tokens grows."""
    return -(-(fixed_shape(length, 1, cells).columns + _ROOM) // _COLUMNS) * _COLUMNS


def attention_span(model: Any, ids: Sequence[int], cells: int) -> float:
    """Returns how many tokens back each layer of a model sees, at least: infinity for all.

    Raises:
        ModelError: A layer keeps something else than keys and values of all these tokens.
    """
    beginning = Beginning.of(model, [list(ids)], cells)
    layers = _layers(beginning.run(model)[1], beginning)
    return min(
        (one.sliding_window for one in layers if isinstance(one, DynamicSlidingWindowLayer)),
        default=math.inf,
    )


def _by_width(left: dict[int, int], cells: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yields the widths of caches, the widest first, and the batches of texts for each."""
    numbers, lengths = (np.array([*values], np.int64) for values in (left, left.values()))
    batches = fixed_batches(lengths, np.ones_like(lengths), cells)
    for width, of_width in groupby(batches, lambda batch: cache_width(lengths[batch[0]], cells)):
        yield width, [numbers[batch] for batch in of_width]


def _affordable(n_rows: int, row_bytes: int, device: torch.device) -> int:
    """Returns how many rows a cache may have, at most `n_rows`.

    Of a GPU's memory, not of what is free of it: before and after an edit the shapes are the same.
    """
    if device.type == "cuda":
        allowed = torch.cuda.get_device_properties(device).total_memory * _MEMORY_SHARE
        while n_rows > 1 and n_rows * row_bytes > allowed:
            n_rows //= 2
    return n_rows


def _layers(cache: Any, beginning: Beginning) -> Sequence[Any]:
    """Returns what a first pass has left of each layer, [R, H, T, D] each of keys and values."""
    layers = getattr(cache, "layers", None) or [None]
    for layer in layers:
        known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not known or layer.keys.shape[::2][:2] != beginning.ids.shape:
            raise ModelError(
                f"{type(layer).__name__} does not keep keys and values of all tokens. Decode "
                "without a static cache."
            )
    return layers


class _Layer(DynamicLayer):
    """Keys and values of one layer, [R, H, W, D]: each row has a column for its next ones.

    Args:
        like: What a first pass has left, [any, H, any, D].
        n_rows: R.
        width: W.
        columns: The column of each row, [R], to be changed in place.
    """

    def __init__(self, like: Any, n_rows: int, width: int, columns: torch.Tensor) -> None:
        super().__init__()
        self._states = [
            states.new_zeros((n_rows, states.shape[1], width, states.shape[3]))
            for states in (like.keys, like.values)
        ]
        self.keys, self.values = self._states
        self.device, self.is_initialized = like.keys.device, True
        self._rows, self._columns = torch.arange(n_rows, device=self.device), columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the states of each row's new token, [R, H, 1, D], where they belong."""
        columns = self._columns.to(self.device)
        for states, new in zip(self._states, (key_states, value_states), strict=True):
            states[self._rows, :, columns] = new[:, :, 0]
        keys, values = self._states
        return keys, values

    def take(self, given: Any, members: torch.Tensor, rows: torch.Tensor) -> None:
        """Copies the states of some members of a first pass, [B], into rows, [B]."""
        members, rows = members.to(self.device), rows.to(self.device)
        for states, new in zip(self._states, (given.keys, given.values), strict=True):
            # What a former text has left is masked, but NaN and infinity would come through.
            states[rows, :, new.shape[2] :] = 0
            states[rows, :, : new.shape[2]] = new[members]


@dataclass
class _Read:
    """Texts that have been read, and wait for rows.

    Attributes:
        beginning: What they were read in.
        layers: What that left of each layer.
        texts: Of those that wait the row of `beginning`, the number and the tokens.
    """

    beginning: Beginning
    layers: Sequence[Any]
    texts: list[tuple[int, int, list[int]]]


class _Rows:
    """The rows of one static cache, and the texts in them.

    Args:
        model: As for `decode_refilled`, like what follows.
        n_rows: R, if the device's memory allows it.
        width: W, the cache's columns.
        end: Called with the number of each text that is done.

    Attributes:
        n_rows: R; from the first pass on that which the device's memory allows.
    """

    def __init__(
        self,
        model: Any,
        n_rows: int,
        width: int,
        cells: int,
        pick: Pick,
        done: Done,
        end: Callable[[int], None],
    ) -> None:
        self._model, self._cells = model, cells
        self._pick, self._done, self._end = pick, done, end
        self.n_rows, self._width = n_rows, width
        # The number of each row's text; -1 where there is none. None is there before a first pass.
        self._texts = np.full(0, -1)
        self._read: _Read | None = None
        self._cache: Cache | None = None

    def run(self, batches: Sequence[np.ndarray], begin: Callable[[int], list[int]]) -> None:
        """Decodes batches of texts, each of which is read in one pass, as far as columns go."""
        queue = list(batches)[::-1]
        while queue or self._read is not None or (self._texts >= 0).any():
            free = np.flatnonzero(self._texts < 0)
            if self._read is not None and len(free):
                self._take(self._read, free)
            elif queue and (len(free) or self._cache is None):
                self._first_pass(queue.pop(), begin)
            else:
                self._step()

    def _first_pass(self, batch: np.ndarray, begin: Callable[[int], list[int]]) -> None:
        """Reads texts and appends their first tokens; those that go on wait for rows."""
        grown = [begin(i) for i in batch.tolist()]
        beginning = Beginning.of(self._model, grown, self._cells)
        logits, cache = beginning.run(self._model)
        layers = _layers(cache, beginning)
        if self._cache is None:
            self._set_up(layers, beginning.ids.device)
        members = np.arange(len(batch))
        tokens = self._pick(logits[: len(batch)], batch, grown)
        going = grow_(grown, members, tokens, batch, self._done)
        for i in batch[~going].tolist():
            self._end(i)
        texts = [(member, int(batch[member]), grown[member]) for member in members[going].tolist()]
        self._read = _Read(beginning, layers, texts) if texts else None

    def _set_up(self, layers: Sequence[Any], device: torch.device) -> None:
        dtype, n_columns = self._model.dtype, layers[0].keys.shape[0] * layers[0].keys.shape[2]
        held = sum(states.nbytes for one in layers for states in (one.keys, one.values))
        n_rows = _affordable(self.n_rows, held // n_columns * self._width, device)
        self.n_rows = n_rows
        self._texts = np.full(n_rows, -1)
        self._columns = np.zeros(n_rows, np.int64)  # where each text's next states go
        self._grown: list[list[int]] = [[]] * n_rows
        self._next = torch.zeros(n_rows, dtype=torch.long, device=device)
        # Added to the scores of attention. A row without a text sees its first column.
        self._hidden = torch.finfo(dtype).min
        self._mask = torch.full(
            (n_rows, 1, 1, self._width), self._hidden, dtype=dtype, device=device
        )
        self._mask[..., 0] = 0
        self._layers = [_Layer(like, n_rows, self._width, self._next) for like in layers]
        self._cache = Cache([*self._layers])

    def _take(self, read: _Read, free: np.ndarray) -> None:
        """Gives as many of the texts that have been read rows as there are free ones, [F]."""
        texts = read.texts[: len(free)]
        free = free[: len(texts)]
        rows, members = torch.from_numpy(free), torch.tensor([member for member, *_ in texts])
        for own, given in zip(self._layers, read.layers, strict=True):
            own.take(given, members, rows)
        device = self._mask.device
        real = read.beginning.mask[members.to(device)]  # [B, T]
        shown = self._mask.new_full((len(texts), self._width), self._hidden)
        shown[:, : real.shape[1]].masked_fill_(real.bool(), 0)
        self._mask[rows.to(device), 0, 0] = shown
        self._columns[free] = real.shape[1]
        for row, (_, i, ids) in zip(free.tolist(), texts, strict=True):
            self._texts[row], self._grown[row] = i, ids
        del read.texts[: len(texts)]
        if not read.texts:
            self._read = None

    def _step(self) -> None:
        """Appends a token to each text."""
        open_ = np.flatnonzero(self._texts >= 0)
        ids, positions = np.zeros((2, len(self._texts), 1), np.int64)
        for row in open_.tolist():
            ids[row], positions[row] = self._grown[row][-1], len(self._grown[row]) - 1
        device = self._mask.device
        self._next.copy_(torch.from_numpy(self._columns))
        rows = torch.from_numpy(open_).to(device)
        self._mask[rows, 0, 0, self._next[rows]] = 0
        logits, _ = run_next(
            self._model,
            self._cache,
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=self._mask,
            position_ids=torch.from_numpy(positions).to(device),
        )
        so_far = [self._grown[row] for row in open_.tolist()]
        tokens = self._pick(logits[rows.to(logits.device)], self._texts[open_], so_far)
        going = grow_(self._grown, open_, tokens, self._texts, self._done)
        self._columns[open_] += 1
        for i in self._texts[open_[~going]].tolist():
            self._end(i)
        # A text that has no column left goes as well: it is not done.
        going &= self._columns[open_] < self._width
        self._texts[open_[~going]], self._columns[open_[~going]] = -1, 0
