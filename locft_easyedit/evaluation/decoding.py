"""Batched decoding with a cache: rows leave the batch as soon as they are done.

In half precision rows run in fixed shapes instead: those of a static cache, which are filled again
(see `continuous_batching`), or, for models that keep something else than keys and values, rows that
stay until their batch is done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import fixed_batches, in_batches, length_sorted_batches
from ..data.tokenization import TokenizedTexts
from ..modeling.devices import input_device
from ..modeling.forward import run_next
from ..modeling.modes import evaluation_mode
from ..modeling.suitability import generation_ends
from ..prefix.probes import MOST_TOLERATED, REFUSALS, TOLERANCE, relative_error
from ..prefix.runner import TextRunner
from .answers import STOPS
from .continuous_batching import attention_span, cache_width, decode_in_rows, decode_refilled
from .growing_texts import Beginning, Done, Pick, grow_
from .predictions import fixed_cells

logger = logging.getLogger(__name__)

# Tokens of a trial's longest text, at least.
_PROBE_TOKENS = 8
# Cells of a trial with two rows: the third text gets the row that the first one had.
_PROBE_CELLS = 32
# Columns of the widest static cache. Longer texts are seldom asked for an answer.
_WIDEST = 512
# Of the mean relative error in half precision. SmolLM2 has 0.01 to 0.03, and 0.09 to 0.6 with a
# wrong mask or position.
_HALF_TOLERANCE = 5e-2
# Columns of padding behind a text that show what rounding makes of its logits.
_PADDING = 9


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
    with evaluation_mode(model):
        cells, numbers = fixed_cells(model), np.arange(len(lengths))
        longest = begin(int(lengths.argmax()))
        if cells:
            rest = decode_refilled(
                model,
                lengths,
                begin,
                end,
                pick=pick,
                done=done,
                cells=cells,
                span=static_span(model, longest),
                description=description,
                progress=progress,
            )
            numbers = np.array([*rest], np.int64)
            # A copy: where memory runs out a batch begins anew.
            begin = lambda i: list(rest[i])  # noqa: E731
            lengths = np.array([*map(len, rest.values())], np.int64)
            batches = fixed_batches(lengths, np.ones_like(lengths), cells)
        else:
            batches = length_sorted_batches(lengths, batch_size)
        if not len(numbers):
            return
        decode_batch = _decode_cached if can_batch_cache(model, longest) else _decode_anew

        def run(batch: np.ndarray) -> None:
            texts = numbers[batch]
            grown = [begin(i) for i in texts.tolist()]
            decode_batch(model, texts, grown, pick, done)
            for i, ids in zip(texts.tolist(), grown, strict=True):
                end(i, ids)

        in_batches(batches, run, description=description, progress=progress)


def _decode_cached(
    model: Any, texts: np.ndarray, grown: list[list[int]], pick: Pick, done: Done
) -> None:
    """Appends tokens to texts that are padded on the left, with a cache."""
    fixed = fixed_cells(model)
    start = Beginning.of(model, grown, fixed)
    ids, mask, positions, device = start.ids, start.mask, start.positions, start.ids.device
    open_ = np.arange(len(grown))  # members that are not done
    rows = torch.arange(len(grown), device=device)  # and their rows in the tensors
    cache: Any = None
    while True:
        logits, cache = run_next(
            model, cache, input_ids=ids, attention_mask=mask, position_ids=positions
        )
        chosen = logits if len(rows) == len(logits) else logits[rows.to(logits.device)]
        tokens = pick(chosen, texts[open_], [grown[i] for i in open_]).to(device)  # [B]
        going = grow_(grown, open_, tokens, texts, done)
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
        open_ = open_[grow_(grown, open_, pick(logits, texts[open_], so_far), texts, done)]


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
    the cache before the others. Says so if they do not.

    Args:
        model: A causal language model, in evaluation mode.
        ids: Tokens of some text.
    """
    if model not in _can_batch_cache:
        error, allowed = _cache_error(model, ids, _decode_cached)
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


_static_span: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def static_span(model: Any, ids: Sequence[int]) -> int:
    """Returns the columns that a static cache may have whose rows are filled again; 0 for none.

    Measured once for each model, like `can_batch_cache`: three short texts in two rows of the
    widest cache that is used at all, or of as many columns as each layer sees tokens back. Some
    models take a window from the length of the cache, which shows in a wide one alone.

    Args:
        model: A causal language model, in evaluation mode.
        ids: Tokens of some text; the first few count, so that its length does not.
    """
    if model not in _static_span:
        _static_span[model] = _tried_span(model, ids[:_PROBE_TOKENS])
    return _static_span[model]


def _tried_span(model: Any, ids: Sequence[int]) -> int:
    try:
        width = int(min(attention_span(model, ids, _PROBE_CELLS), _WIDEST))
    except REFUSALS as refusal:
        logger.debug("No static cache: %s: %s", type(refusal).__name__, refusal)
        return 0
    if width < cache_width(_PROBE_TOKENS, _PROBE_CELLS):
        return 0
    decode = partial(decode_in_rows, width=width, cells=_PROBE_CELLS)
    error, allowed = _cache_error(model, ids, decode)
    if error > allowed:
        logger.debug("No static cache for %s: %.1e off.", type(model).__name__, error)
        return 0
    return width


def _cache_error(
    model: Any,
    ids: Sequence[int],
    decode: Callable[[Any, np.ndarray, list[list[int]], Pick, Done], None],
) -> tuple[float, float]:
    """Returns the relative error of a few texts' logits in `decode`, and what is allowed.

    The longest text leaves after its second token, the first one that comes of a cache. In float32
    the largest error counts. In half precision the logits of single tokens are up to 0.2 off by
    rounding alone (SmolLM2): there the mean counts, of what comes of a cache, and may be three
    times what a few columns of padding make of the same tokens. Infinity for a model that refuses.
    """
    longest = (list(ids) * _PROBE_TOKENS)[: max(len(ids), _PROBE_TOKENS)]
    n = len(longest)
    sequences = [longest, longest[: n // 2], longest[1 : n // 3 + 1]]
    n_steps, errors, rounding = 5, list[float](), list[float]()
    exact = model.dtype == torch.float32

    def logits_of(known: list[int], n_padding: int) -> torch.Tensor:
        inputs = torch.tensor([known + known[:1] * n_padding], device=input_device(model))
        logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits
        return logits[0, len(known) - 1].float()

    def pick(logits: torch.Tensor, texts: np.ndarray, so_far: list[list[int]]) -> torch.Tensor:
        for row, text, known in zip(logits, texts.tolist(), so_far, strict=True):
            if not exact and len(known) == len(sequences[text]):
                continue
            alone = logits_of(known, 0)
            errors.append(relative_error(row.float().to(alone.device), alone))
            if not exact:
                rounding.append(relative_error(logits_of(known, _PADDING), alone))
        return torch.tensor([known[0] for known in so_far])

    def done(text: int, known: list[int]) -> bool:
        return len(known) >= len(sequences[text]) + (2 if text == 0 else n_steps)

    try:
        decode(model, np.arange(len(sequences)), [list(ids) for ids in sequences], pick, done)
    except REFUSALS as refusal:
        logger.debug("No such cache: %s: %s", type(refusal).__name__, refusal)
        errors.append(math.inf)
    if exact:
        return max(errors), TOLERANCE
    allowed = max(_HALF_TOLERANCE, 3 * float(np.mean(rounding or 0.0)))
    return float(np.mean(errors)), min(allowed, MOST_TOLERATED)


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens whose text holds a stop."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if any(stop in text for stop in STOPS))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokenizer's EOS and those that the model's own generation settings name."""
    found = (tokenizer.eos_token_id, *generation_ends(model))
    return list(dict.fromkeys(i for i in found if i is not None))
