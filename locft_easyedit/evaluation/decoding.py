"""Batched decoding with a cache: rows leave the batch as soon as they are done.

`GreedyDecoder` gives each prompt the answer that it would get alone. In float32, where the two best
tokens are so close that rounding could decide, that prompt is run alone, without a cache. In half
precision rows run in fixed shapes instead, and stay until their batch is done.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import fixed_batches, fixed_shape, in_batches, length_sorted_batches
from ..data.tokenization import CHUNK, Asked, GrowingTexts, TokenizedTexts, asked_ids, ids_of
from ..modeling.devices import input_device
from ..modeling.forward import run_next
from ..modeling.modes import evaluation_mode
from ..modeling.sampling import padded_left
from ..modeling.suitability import generation_ends
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import MOST_TOLERATED, REFUSALS, TOLERANCE, relative_error
from ..utils.progress import progress_bar
from .answers import STOPS, up_to_stop
from .predictions import (
    ArgmaxPredictions,
    ArgmaxPredictor,
    EvalConfig,
    Wrapper,
    in_fixed_shapes,
    too_close,
)

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
    if in_fixed_shapes(model):
        batches = fixed_batches(lengths, np.ones_like(lengths))
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
    device, fixed = input_device(model), in_fixed_shapes(model)
    width, n_rows = max(map(len, grown)), len(grown)
    if fixed:
        shape = fixed_shape(width, 1)
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
    fixed = in_fixed_shapes(model)
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


class GreedyDecoder:
    """Greedy answers to a fixed set of prompts, to be taken before and after an edit.

    An answer that is expected (an edit's target, say) is checked in one forward pass over prompt
    and answer, as a draft in speculative decoding is. Only where the model's own first choice
    differs is the rest generated token by token. The answers are those of plain greedy decoding.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Plain prompts; or texts with the answers that are expected of them (`Asked`), which
            may be those of a chat, and whose own end ends an answer as well as the model's.
        drafts: The answer that is expected of each plain prompt.
        how: How prompts are run.
        max_new_tokens: Tokens of an answer, at most.
        still_open: Says of prompt i whether the rest of an answer that begins so is wanted; `None`
            wants all answers whole.
        inner_stops: How many stops the answer to each prompt may have before it ends at one; 0 if
            `None`.

    Attributes:
        not_finite: Prompts for which the last measurement met logits that are NaN or infinite;
            their answers are meaningless.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str] | Sequence[Asked],
        drafts: Sequence[str] | None,
        how: EvalConfig,
        *,
        max_new_tokens: int,
        still_open: Callable[[int, str], bool] | None = None,
        inner_stops: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.how = how
        self._still_open = still_open
        self._inner_stops = inner_stops or [0] * len(prompts)
        self.max_new_tokens = max_new_tokens
        self.ends = end_tokens(model, tokenizer)
        self.stops = stop_tokens(tokenizer)
        self.not_finite: set[int] = set()
        asked = [prompt for prompt in prompts if isinstance(prompt, Asked)]
        self._own_ends = [one.end for one in asked] or [None] * len(prompts)
        self._texts = self._tokenized(prompts, drafts)
        self._choices = ArgmaxPredictor(model, self._texts, how)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt, [N]."""
        return self._texts.target_start

    def _tokenized(self, prompts: Sequence[Any], drafts: Sequence[str] | None) -> TokenizedTexts:
        """Returns each prompt with its draft and an end token after it: at least one token."""
        growing = GrowingTexts()
        for first in range(0, len(prompts), CHUNK):
            part = prompts[first : first + CHUNK]
            if drafts is None:
                alone = asked_ids(self.tokenizer, part)
                whole = [replace(one, text=one.text + one.answer) for one in part]
                both = asked_ids(self.tokenizer, whole)
            else:
                alone = ids_of(self.tokenizer, part)
                expected = drafts[first : first + CHUNK]
                texts = [f"{p} {d.strip()}" for p, d in zip(part, expected, strict=True)]
                both = ids_of(self.tokenizer, texts)
            for i, (ids, with_answer) in enumerate(zip(alone, both, strict=True), first):
                growing.add(ids + self._draft(i, ids, with_answer), len(ids))
        return growing.finished()

    def _draft(self, i: int, prompt: list[int], whole: list[int]) -> list[int]:
        """Returns the tokens of prompt i's expected answer, with an end token: at least one.

        Args:
            i: Number of the prompt.
            prompt: Its tokens.
            whole: Those of prompt and answer.
        """
        own = self._own_ends[i]
        end = self.ends[:1] or [0] if own is None else [own]
        # Where a token reaches over the end of the prompt there is no draft to be had.
        follows = whole[: len(prompt)] == prompt
        draft = [t for t in whole[len(prompt) :] if not self._ends(i, t)] if follows else []
        return (draft + end)[: self.max_new_tokens]

    def _ends(self, i: int, token: int) -> bool:
        """Returns whether a token ends the answer to prompt i."""
        return token in self.ends or token == self._own_ends[i]

    def answers(self, description: str, only: np.ndarray | None = None) -> list[str]:
        """Returns the answer to each prompt, up to its end token or a stop ("." or a line's end).

        Args:
            description: Label of the progress bar.
            only: Indices of the prompts that are asked; the others' answers are empty.
        """
        indices = range(len(self._texts)) if only is None else only.tolist()
        if self.how.wrapper is not None:
            return self._through(self.how.wrapper, indices, description)
        chosen = self._choices.take(description, only)
        self.not_finite = set(self._choices.not_finite)
        description = f"{description}, word by word"
        answers = [""] * len(self._texts)
        open_, lengths = array("q"), array("q")
        for i in indices:
            if i in self.not_finite:
                continue
            ids = self._begun(i, chosen)
            if self._complete(i, ids):
                answers[i] = self._text(i, ids)
            else:
                open_.append(i)
                lengths.append(len(ids))

        def done(j: int, ids: list[int]) -> bool:
            if ids[-1] < 0:
                self.not_finite.add(open_[j])
            return ids[-1] < 0 or self._complete(open_[j], ids)

        def end(j: int, ids: list[int]) -> None:
            if open_[j] not in self.not_finite:
                answers[open_[j]] = self._text(open_[j], ids)

        if self.how.stream is not None:
            sequences = [self._begun(i, chosen) for i in open_]
            self._stream_out_(sequences, done, description)
            for j, ids in enumerate(sequences):
                end(j, ids)
        else:
            decode_(
                self.model,
                np.array(lengths, np.int64),
                lambda j: self._begun(open_[j], chosen),
                end,
                pick=self._pick,
                done=done,
                batch_size=self.how.batch_size,
                description=description,
                progress=self.how.progress and only is None and bool(open_),
            )
        return answers

    def _through(self, wrapper: Wrapper, indices: Sequence[int], description: str) -> list[str]:
        """Returns the answers that what is around the model gives, one after the other."""
        answers = [""] * len(self._texts)
        with evaluation_mode(self.model):
            for i in progress_bar(indices, desc=description, show=self.how.progress):
                first = int(self._texts.offsets[i])
                ids = self._texts.ids[first : first + int(self.prompt_lengths[i])].tolist()
                whole = wrapper.generate(ids, self.max_new_tokens, partial(self._complete, i))
                answers[i] = self._text(i, whole)
        return answers

    def _begun(self, i: int, chosen: ArgmaxPredictions) -> list[int]:
        """Returns prompt i with as much of its answer as the draft has shown."""
        first = int(self._texts.offsets[i])
        prompt: list[int] = self._texts.ids[first : first + int(self.prompt_lengths[i])].tolist()
        return prompt + self._accepted(i, chosen[i])

    def _stream_out_(self, sequences: list[list[int]], done: Done, description: str) -> None:
        """Appends a token to every open sequence in each pass over frozen layers on disk."""
        open_ = list(range(len(sequences)))
        while open_:
            # What comes last is only predicted: any token holds its place.
            texts = TokenizedTexts.from_lists(
                [[*sequences[i], 0] for i in open_], [len(sequences[i]) for i in open_]
            )
            choices = ArgmaxPredictor(self.model, texts, self.how)
            taken = choices.take(description)
            for k, i in enumerate(open_):
                sequences[i].append(-1 if k in choices.not_finite else taken[k][0])
            choices.close()
            open_ = [i for i in open_ if not done(i, sequences[i])]

    def _accepted(self, i: int, choices: list[int]) -> list[int]:
        """Returns the first choices as far as they followed from the draft."""
        draft = self._texts.target(i)
        agreed = next((k for k, c in enumerate(choices) if c != draft[k]), len(choices) - 1)
        answer = choices[: agreed + 1]
        for k, token in enumerate(answer):
            if self._ends(i, token) or self._stops(i, answer[: k + 1]):
                return answer[: k + 1]
        return answer

    def _alone(self, ids: list[int]) -> int:
        """Returns the first choice after one text, run by itself."""
        inputs = torch.tensor([ids], device=input_device(self.model))
        return int(self.model(input_ids=inputs, use_cache=False).logits[0, -1].argmax())

    def _pick(
        self, logits: torch.Tensor, texts: np.ndarray, sequences: list[list[int]]
    ) -> torch.Tensor:
        best = logits.topk(2, dim=-1)
        tokens = best.indices[:, 0].clone()
        if in_fixed_shapes(self.model):
            near = torch.zeros_like(tokens, dtype=torch.bool)
        else:
            near = too_close(best.values, self.model)
        for row in near.nonzero().flatten().tolist():
            tokens[row] = self._alone(sequences[row])
        return torch.where(torch.isfinite(best.values[:, 0]), tokens, -1)

    def _complete(self, i: int, ids: list[int]) -> bool:
        n_new = len(ids) - int(self.prompt_lengths[i])
        if n_new <= 0:
            return False
        if n_new >= self.max_new_tokens or self._ends(i, ids[-1]):
            return True
        if self._stops(i, ids[int(self.prompt_lengths[i]) :]):
            return True
        return self._still_open is not None and not self._still_open(i, self._text(i, ids))

    def _text(self, i: int, ids: list[int]) -> str:
        """Returns the answer in the ids of prompt i and what follows, up to the first stop."""
        ids = ids[int(self.prompt_lengths[i]) :]
        end = next((k for k, token in enumerate(ids) if self._ends(i, token)), len(ids))
        text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
        return up_to_stop(text, self._inner_stops[i])

    def _stops(self, i: int, answer: list[int]) -> bool:
        """Returns whether the last token of what was answered to prompt i holds its last stop."""
        if answer[-1] not in self.stops:
            return False
        if not self._inner_stops[i]:
            return True
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        return sum(map(text.count, STOPS)) > self._inner_stops[i]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens whose text holds a stop."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if any(stop in text for stop in STOPS))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokenizer's EOS and those that the model's own generation settings name."""
    found = (tokenizer.eos_token_id, *generation_ends(model))
    return list(dict.fromkeys(i for i in found if i is not None))
