"""From texts to token ids, with the exact place where the target begins."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError, RequestError, one_message
from .requests import Edit, with_leading_space

CHUNK = 4096  # texts a tokenizer call: bounds the memory of 100,000 edits


@dataclass(frozen=True)
class TokenizedTexts:
    """N token sequences in one flat array.

    Attributes:
        ids: Token ids, [T] int64.
        offsets: Sequence i is `ids[offsets[i]:offsets[i + 1]]`, [N + 1] int64.
        target_start: Index of the first target token within its sequence, [N] int64. Every token
            from there to the end of the sequence is predicted.
    """

    ids: np.ndarray
    offsets: np.ndarray
    target_start: np.ndarray

    def __len__(self) -> int:
        return len(self.target_start)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, [N]."""
        return np.diff(self.offsets)

    @cached_property
    def input_lengths(self) -> np.ndarray:
        """Tokens of each sequence that a model has to read, [N]: the last is only predicted."""
        return np.maximum(self.lengths - 1, 1)

    @cached_property
    def target_lengths(self) -> np.ndarray:
        """Tokens of each target, with its end, [N]."""
        return self.lengths - self.target_start

    @cached_property
    def input_offsets(self) -> np.ndarray:
        """Where each sequence begins among all tokens that are read, [N + 1]."""
        return np.concatenate([[0], np.cumsum(self.input_lengths)])

    def target(self, i: int) -> list[int]:
        """Returns the target's tokens of sequence i."""
        start = int(self.offsets[i] + self.target_start[i])
        ids: list[int] = self.ids[start : int(self.offsets[i + 1])].tolist()
        return ids

    def subset(self, indices: np.ndarray) -> TokenizedTexts:
        """Returns the sequences `indices`, in that order."""
        lengths = self.lengths[indices]
        ends = np.cumsum(lengths)
        first = self.offsets[:-1][indices] - (ends - lengths)  # of each, less where it will begin
        cells = np.repeat(first, lengths) + np.arange(int(lengths.sum()))
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        return TokenizedTexts(self.ids[cells], offsets, self.target_start[indices])

    @classmethod
    def from_lists(
        cls, sequences: Sequence[Sequence[int]], target_start: Sequence[int]
    ) -> TokenizedTexts:
        """Returns the flat form of `sequences`."""
        growing = GrowingTexts()
        for ids, start in zip(sequences, target_start, strict=True):
            growing.add(ids, start)
        return growing.finished()


@dataclass(frozen=True, slots=True)
class Asked:
    """A text that asks, and what is to follow it.

    Attributes:
        text: What the model reads.
        answer: What it is to write after it, with the white space between them.
        special_tokens: Whether the tokenizer adds its special tokens (a BOS, say); a chat template
            has put them into the text.
        end: The token after the answer; `None` is the end of sequence.
    """

    text: str
    answer: str
    special_tokens: bool = True
    end: int | None = None


class GrowingTexts:
    """Token sequences that come one after the other: eight bytes a token, where a list takes 40."""

    def __init__(self) -> None:
        self._ids = array("q")
        self._offsets = array("q", [0])
        self._target_start = array("q")

    def add(self, ids: Sequence[int], target_start: int) -> None:
        """Appends a sequence; see `TokenizedTexts`."""
        self._ids.extend(ids)
        self._offsets.append(len(self._ids))
        self._target_start.append(target_start)

    def finished(self) -> TokenizedTexts:
        """Returns all sequences, without a copy; nothing can be added any more."""
        columns = (self._ids, self._offsets, self._target_start)
        return TokenizedTexts(
            *(np.frombuffer(c, np.int64) if c else np.zeros(0, np.int64) for c in columns)
        )


def ids_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool = True
) -> list[list[int]]:
    """Returns the ids of each text with the tokenizer's own special tokens, and nothing else.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        special_tokens: Whether the tokenizer adds them; in the text of a chat they stand already.
    """
    if not texts:
        return []
    found: list[list[int]] = tokenizer(
        list(texts),
        padding=False,
        truncation=False,
        return_attention_mask=False,
        add_special_tokens=special_tokens,
    )["input_ids"]
    return found


def asked_ids(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]) -> list[list[int]]:
    """Returns the ids of each text up to where its answer begins."""
    plain = unended_ids(tokenizer, [one.text for one in asked if one.special_tokens])
    chat = ids_of(
        tokenizer, [one.text for one in asked if not one.special_tokens], special_tokens=False
    )
    rest = iter(plain), iter(chat)
    return [next(rest[not one.special_tokens]) for one in asked]


def unended_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of texts that something is to follow: as `ids_of`, with no EOS at the end."""
    eos = tokenizer.eos_token_id
    return [
        ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids for ids in ids_of(tokenizer, texts)
    ]


def tokenize_edits(
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    *,
    append_eos: bool = True,
    max_positions: int | None = None,
) -> TokenizedTexts:
    """Returns the edits as token ids: prompt, target with one leading space, end of sequence.

    Args:
        tokenizer: The model's tokenizer.
        edits: What to train.
        append_eos: Append the end-of-sequence token unless the tokenizer did.
        max_positions: The model's context in tokens; `None` is unbounded.

    Raises:
        ModelError: `append_eos` and the tokenizer has no EOS token.
        RequestError: An edit is longer than the context, or its target has no token.
    """
    asked = [Asked(edit.prompt, with_leading_space(edit.target)) for edit in edits]
    texts = tokenize_asked(tokenizer, asked, append_end=append_eos)
    # The first token of all has no predecessor that could predict it.
    ends = texts.offsets[1:] - 1
    ended = texts.lengths > 0
    ended[ended] = texts.ids[ends[ended]] == tokenizer.eos_token_id
    n_text = texts.lengths - ended
    too_long = texts.lengths > (max_positions or np.iinfo(np.int64).max)
    problems = []
    unusable = np.flatnonzero(too_long | (texts.target_start <= 0) | (texts.target_start >= n_text))
    for i in unusable.tolist():
        if too_long[i]:
            problems.append(
                f"{_named(edits[i])} has {texts.lengths[i]} tokens; the model's context is "
                f"{max_positions}. Shorten it."
            )
        else:
            problems.append(
                f"{_named(edits[i])}: no token of the target can be predicted. Change its text."
            )
    if problems:
        raise RequestError(one_message("The requests cannot be trained:", problems))
    return texts


def tokenize_asked(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], *, append_end: bool = True
) -> TokenizedTexts:
    """Returns texts with their answers as token ids.

    Text and answer are tokenized together. A token that reaches from the text into the answer
    counts as answer. No padding takes part, so nothing depends on the pad token.

    Args:
        tokenizer: The model's tokenizer.
        asked: The texts and their answers.
        append_end: Append the token that ends each unless the tokenizer did.

    Raises:
        ModelError: `append_end`, a text ends with the end of sequence, and there is no EOS token.
    """
    eos = tokenizer.eos_token_id
    if append_end and eos is None and any(one.end is None for one in asked):
        raise ModelError(
            "`append_eos=True` needs an end-of-sequence token, and the tokenizer has none. "
            "Set `tokenizer.eos_token` or `append_eos: false`."
        )
    growing = GrowingTexts()
    for first in range(0, len(asked), CHUNK):
        chunk = asked[first : first + CHUNK]
        split: list[tuple[list[int], int]] = [([], 0)] * len(chunk)
        for special in (True, False):
            of_kind = [i for i, one in enumerate(chunk) if one.special_tokens == special]
            if of_kind:
                texts = [chunk[i].text for i in of_kind]
                whole = [chunk[i].text + chunk[i].answer for i in of_kind]
                for i, pair in zip(of_kind, _split(tokenizer, texts, whole, special), strict=True):
                    split[i] = pair
        for one, (ids, start) in zip(chunk, split, strict=True):
            end = eos if one.end is None else one.end
            growing.add([*ids, end] if append_end and ids[-1:] != [end] else ids, start)
    return growing.finished()


def _named(edit: Edit) -> str:
    return f"request {edit.request} ({_shortened(edit.prompt)} -> {_shortened(edit.target)})"


def _shortened(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _split(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[str], special: bool
) -> list[tuple[list[int], int]]:
    """Returns the ids of each text, and the index of the first token that goes past its prompt."""
    if tokenizer.is_fast:
        batch = tokenizer(
            texts,
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            add_special_tokens=special,
        )
        return [
            (ids, next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids)))
            for prompt, ids, spans in zip(
                prompts, batch["input_ids"], batch["offset_mapping"], strict=True
            )
        ]
    options: dict[str, Any] = {"padding": False, "truncation": False, "add_special_tokens": special}
    full = tokenizer(texts, **options)["input_ids"]
    alone = tokenizer(prompts, **options)["input_ids"]
    return [
        (ids, _boundary_by_decoding(tokenizer, prompt, ids, prompt_ids))
        for prompt, ids, prompt_ids in zip(prompts, full, alone, strict=True)
    ]


def _boundary_by_decoding(
    tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], prompt_ids: list[int]
) -> int:
    """Returns where the target begins, for tokenizers that give no character offsets.

    If the prompt's own tokens begin the text, the target follows them. Where the segmentation
    differs, tokens belong to the prompt as long as what they decode to is still a part of it.
    """
    if prompt_ids[-1:] == [tokenizer.eos_token_id] and ids[-1:] == prompt_ids[-1:]:
        prompt_ids = prompt_ids[:-1]  # an EOS that the tokenizer puts after every text
    if ids[: len(prompt_ids)] == prompt_ids:
        return len(prompt_ids)
    start = 0
    while start < min(len(ids), len(prompt_ids)) and ids[start] == prompt_ids[start]:
        start += 1

    def within_prompt(n_tokens: int) -> bool:
        text = str(
            tokenizer.decode(
                ids[:n_tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        return prompt.lstrip().startswith(text.lstrip())

    while start < len(ids) and within_prompt(start + 1):
        start += 1
    return start
