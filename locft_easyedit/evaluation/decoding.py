"""Batched decoding with a cache: rows leave the batch as soon as they are done.

In half precision rows run in fixed shapes instead, and stay until their batch is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import fixed_batches, fixed_shape, in_batches, length_sorted_batches
from ..data.tokenization import TokenizedTexts
from ..modeling.devices import input_device
from ..modeling.forward import run_next
from ..modeling.modes import evaluation_mode
from ..modeling.sampling import padded_left
from ..modeling.suitability import generation_ends
from ..prefix.probes import MOST_TOLERATED, REFUSALS, TOLERANCE, relative_error
from ..prefix.runner import TextRunner
from .answers import STOPS
from .predictions import fixed_cells

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8

# Next tokens, [B], from logits [B, V], the B texts' indices and their tokens so far.
Pick = Callable[[torch.Tensor, np.ndarray, list[list[int]]], torch.Tensor]
# Whether text i is complete, with the tokens it has got.
Done = Callable[[int, list[int]], bool]


@torch.no_grad()
def decode_(
    model: PreTrainedModel,
    lengths: np.ndarray,
    begin: Callable[[int], list[int]],
    end: Callable[[int, list[int]], None],
    *,
    pick: Pick,
    done: Done,
    batch_size: int,
    description: str,
    progress: bool = False,
) -> None:
    """Appends tokens to each of N texts until it is done.

    Args:
        model: A causal language model.
        lengths: Tokens of each text, [N].
        begin: Gives text i's tokens, to be changed.
        end: Takes all tokens of text i when it is done.
        pick: Chooses next tokens.
        done: Called after each token; a text is asked for at least one.
        batch_size: Texts at a time.
        description: Label of the progress bar.
        progress: Show a progress bar.
    """
    if not len(lengths):
        return
    if cells := fixed_cells(model):
        batches = fixed_batches(lengths, np.ones_like(lengths), cells)
    else:
        batches = length_sorted_batches(lengths, batch_size)
    with evaluation_mode(model):
        longest = begin(int(batches[0][0]))
        decode_batch = _decode_cached if can_batch_cache(model, longest) else _decode_anew

        def run(batch: np.ndarray) -> None:
            grown = [begin(int(i)) for i in batch]
            decode_batch(model, batch, grown, pick, done)
            for i, ids in zip(batch, grown, strict=True):
                end(int(i), ids)

        in_batches(batches, run, description=description, progress=progress)


def _decode_cached(
    model: Any, texts: np.ndarray, grown: list[list[int]], pick: Pick, done: Done
) -> None:
    """Appends tokens to texts that are padded on the left, with a cache."""
    device, fixed = input_device(model), fixed_cells(model)
    width, n_rows = max(map(len, grown)), len(grown)
    if fixed:
        shape = fixed_shape(width, 1, fixed)
        width, n_rows = shape.columns, max(shape.rows, n_rows)
    # Any token fills the left side: the mask hides it.
    ids, mask = padded_left(grown + grown[:1] * (n_rows - len(grown)), 0, width)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    open_ = np.arange(len(grown))  # members that are not done
    rows = torch.arange(len(grown), device=device)  # and their rows in the tensors
    cache: Any = None
    while True:
        logits, cache = run_next(
            model, cache, input_ids=ids, attention_mask=mask, position_ids=positions
        )
        chosen = logits if len(rows) == len(logits) else logits[rows.to(logits.device)]
        tokens = pick(chosen, texts[open_], [grown[i] for i in open_]).to(device)  # [B]
        going = _grow_(grown, open_, tokens, texts, done)
        if not going.any():
            return
        new = ids.new_zeros(len(ids), 1)
        new[rows, 0] = tokens
        # Of texts that are done and stay, the position does: it must not leave the context.
        next_position = positions[:, -1:].clone()
        next_position[rows] += 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if cache is None:  # the model reads all of it again
            new, next_position = torch.cat([ids, new], 1), torch.cat([positions, next_position], 1)
        ids, positions = new, next_position
        if not going.all():
            kept = torch.from_numpy(np.flatnonzero(going)).to(device)
            open_, rows = open_[going], rows[kept]
            if not fixed:
                if cache is not None:
                    # Every kind of layer knows it, and brings the index to its own device.
                    cache.reorder_cache(rows)
                ids, mask, positions = ids[rows], mask[rows], positions[rows]
                rows = torch.arange(len(rows), device=device)


def _decode_anew(
    model: Any, texts: np.ndarray, grown: list[list[int]], pick: Pick, done: Done
) -> None:
    """Appends tokens to texts that are padded on the right and read whole for every token."""
    open_ = np.arange(len(grown))
    while len(open_):
        so_far = [grown[i] for i in open_]
        logits = _next_logits(model, so_far)
        open_ = open_[_grow_(grown, open_, pick(logits, texts[open_], so_far), texts, done)]


def _grow_(
    grown: list[list[int]], open_: np.ndarray, tokens: torch.Tensor, texts: np.ndarray, done: Done
) -> np.ndarray:
    """Appends a token to each open member; returns which of them go on, [B] bool."""
    for member, token in zip(open_, tokens.tolist(), strict=True):
        grown[member].append(token)
    return np.array([not done(int(texts[member]), grown[member]) for member in open_], bool)


def _next_logits(model: Any, sequences: Sequence[list[int]]) -> torch.Tensor:
    """Returns the logits after each of B texts, [B, V], without a cache."""
    # What comes last is only predicted: any token holds its place.
    texts = TokenizedTexts.from_lists([[*ids, 0] for ids in sequences], [*map(len, sequences)])
    fixed = fixed_cells(model)
    runner = TextRunner(model, texts, row_tokens=1, packed=False, prefix=None, fixed=fixed)
    return runner.logits(np.arange(len(texts)))[0]


_can_batch_cache: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def can_batch_cache(model: Any, ids: Sequence[int]) -> bool:
    """Returns whether texts that share a cache get the logits that each gets alone.

    Measured once for each model: texts of several lengths, padded on the left, of which one leaves
    the cache after a token. Says so if they do not.

    Args:
        model: A causal language model, in evaluation mode.
        ids: Tokens of some text.
    """
    if model not in _can_batch_cache:
        text = (list(ids) * _PROBE_TOKENS)[: max(len(ids), _PROBE_TOKENS)]
        sequences = [text, text[: len(text) // 2], text[1 : len(text) // 3 + 1]]
        try:
            error = _cache_error(model, sequences)
        except REFUSALS as refusal:
            logger.debug("No shared cache: %s: %s", type(refusal).__name__, refusal)
            error = float("inf")
        allowed = TOLERANCE if model.dtype == torch.float32 else MOST_TOLERATED
        _can_batch_cache[model] = error <= allowed
        if error > allowed:
            logger.warning(
                "Texts that share a cache get other answers from %s (relative error of the logits "
                "%.1e, allowed %.0e): answers are generated without a cache, which takes longer.",
                type(model).__name__,
                error,
                allowed,
            )
    return _can_batch_cache[model]


def _cache_error(model: Any, sequences: Sequence[list[int]]) -> float:
    """Returns the largest relative error of logits with a shared cache, over three tokens."""
    n_steps, errors = 3, [0.0]

    def pick(logits: torch.Tensor, texts: np.ndarray, so_far: list[list[int]]) -> torch.Tensor:
        for row, known in zip(logits, so_far, strict=True):
            inputs = torch.tensor([known], device=input_device(model))
            alone = model(input_ids=inputs, use_cache=False).logits[0, -1]
            errors.append(relative_error(row.float(), alone.float().to(row.device)))
        return torch.tensor([known[0] for known in so_far])

    def done(text: int, known: list[int]) -> bool:
        return len(known) >= len(sequences[text]) + (1 if text == 0 else n_steps)

    numbers = np.arange(len(sequences))
    _decode_cached(model, numbers, [list(ids) for ids in sequences], pick, done)
    return max(errors)


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens whose text holds a stop."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if any(stop in text for stop in STOPS))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokenizer's EOS and those that the model's own generation settings name."""
    found = (tokenizer.eos_token_id, *generation_ends(model))
    return list(dict.fromkeys(i for i in found if i is not None))
