"""Text of the model's own that `preserve` measures on."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...data.tokenization import ids_of, unended_ids
from ...errors import ModelError
from ...modeling.sampling import TextKind, TextSampler, first_token
from ...utils.progress import progress_bar
from .moment_cache import cache_errors

logger = logging.getLogger(__name__)

# Questions and beginnings of statements, which text from BOS on seldom has.
OPENINGS = (
    "Question:", "Q:", "Who", "What", "When", "Where", "Which", "How", "In what year",
    "The name of the", "The", "In",
)  # fmt: skip
_DOCUMENTS = 128  # of each kind, at least
_BATCH = 32
_DOCUMENT_TOKENS, _OPENED_TOKENS = 128, 32
_ASKED_EACH, _ASKED_TOKENS = 7, 24  # of each beginning of `asked`, in a round
_TIMED = 16  # forward passes before it is said how long all will take
# A model that ends nearly every text at once would otherwise be sampled without end.
_MOST_ROUNDS = 10  # times what is expected

_QUESTION = "Question: "
_QUESTIONS = (
    "What", "What is the", "What is the name of the", "Which", "Who is the", "Who was the",
    "Who wrote", "Where is", "Where was", "When did", "When was the", "In what year", "How many",
    "How old",
)  # fmt: skip
_STATEMENTS = (
    "The", "The name of the", "The capital of", "The author of", "The language of", "The company",
    "In", "He was", "She is", "It is", "Fact: The",
)  # fmt: skip
# What a model is given to go on with.
BEGINNINGS = (*(_QUESTION + begun for begun in _QUESTIONS), *_STATEMENTS)

_FEWEST_WORDS = 4  # a shorter prompt asks for nothing
_SENTENCE_ENDS = re.compile(r"[\n?.!]")
# An answer may follow.
_LEADS_TO_AN_ANSWER = re.compile(r"\b(?:is|was|are|were|in|by|on|from|of|called|named)(?= )")


@dataclass(frozen=True)
class SampledText:
    """What a model writes.

    Attributes:
        documents: Begun with BOS, at most 128 tokens; none is blank.
        opened: Begun with `OPENINGS` in turn, which go on with at most 32 tokens.
        asked: Begun with each of `asked.BEGINNINGS` 7 times a round, with at most 24 tokens more.
    """

    documents: list[str]
    opened: list[str]
    asked: list[str]


def sampled_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    *,
    cache: Path | None,
    seed: int = 0,
    progress: bool,
) -> SampledText:
    """Returns text sampled from the model: at least 128 documents and as many opened ones.

    Round by round (see `TextSampler`), a batch of each kind, until documents and opened ones have
    `n_tokens`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        n_tokens: Tokens of documents and opened ones at least.
        cache: A folder where each round is kept; `None` keeps nothing.
        seed: Seed of the sampling.
        progress: Show a progress bar.

    Raises:
        ModelError: There is no token to begin with, or the model hardly writes anything.
        OutputError: A round cannot be kept.
    """
    asked, n_asked = unended_ids(tokenizer, BEGINNINGS), _ASKED_EACH * len(BEGINNINGS)
    kinds = [
        TextKind("documents", [[first_token(tokenizer)]], _BATCH, _DOCUMENT_TOKENS),
        TextKind("opened", unended_ids(tokenizer, OPENINGS), _BATCH, _OPENED_TOKENS),
        TextKind("asked", asked, n_asked, _ASKED_TOKENS),
    ]
    expected = max(_DOCUMENTS, -(-n_tokens // (_DOCUMENT_TOKENS + _OPENED_TOKENS)))
    of_a_round, rounds = sum(kind.n_tokens for kind in kinds), -(-expected // _BATCH)
    # It moves with every forward pass: a round takes minutes.
    bar = progress_bar(
        desc="sampling text, once per model",
        total=rounds * of_a_round,
        unit="token a text",
        show=progress,
    )
    pace = _Pace(bar, cache)
    sampler = TextSampler(
        model, tokenizer, kinds, cache=cache, seed=seed, cache_errors=cache_errors,
        on_step=pace.step if progress else None,
    )  # fmt: skip
    text = SampledText([], [], [])
    found = 0
    most = _MOST_ROUNDS * rounds
    with bar:
        for number in range(most):
            new = sampler.round(number)
            documents = [document for document in new["documents"] if document.strip()]
            text.documents.extend(documents)
            text.opened.extend(new["opened"])
            text.asked.extend(new["asked"])
            found += sum(map(len, ids_of(tokenizer, [*documents, *new["opened"]])))
            # A round is done sooner where it is kept, or where all its texts have ended.
            bar.total = max(rounds, number + 1) * of_a_round
            bar.update((number + 1) * of_a_round - bar.n)
            if min(len(text.documents), len(text.opened)) >= _DOCUMENTS and found >= n_tokens:
                return text
    raise ModelError(
        f"The model hardly writes anything by itself: {len(text.documents)} documents that are not "
        f"blank, and {found} tokens of {n_tokens}, in {most * _BATCH} tries. Put a text file in "
        "place of `sampled`."
    )


class _Pace:
    """Tells a bar of forward passes and, once, the user how long all of them will take.

    Args:
        bar: A progress bar of forward passes.
        cache: Where text is kept; `None` keeps nothing.
    """

    def __init__(self, bar: Any, cache: Path | None) -> None:
        self._bar, self._cache = bar, cache
        self._begun, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        """Counts a forward pass."""
        self._bar.update()
        self._steps += 1
        if self._steps == _TIMED:
            minutes = (time.perf_counter() - self._begun) / _TIMED * self._bar.total / 60
            kept = f"kept in {self._cache}" if self._cache else "not kept (`preserve_dir`)"
            logger.info(
                "To leave the rest alone, text is sampled once per model and %s: about %s.",
                kept,
                f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute or less",
            )


def asked_prompts(texts: Iterable[str]) -> list[str]:
    """Returns the prompts that texts begin with, distinct, in the order of the texts.

    A question comes in three forms: with its question mark, with "Answer:" on a line of its own,
    and as one types it into a search box. A statement ends at its last word that an answer may
    follow. Texts without a question or a statement of four words give none.

    Args:
        texts: Begun with `BEGINNINGS`; questions and statements in any order.
    """
    return list(dict.fromkeys(prompt for text in texts for prompt in _prompts(text)))


def _prompts(text: str) -> Iterator[str]:
    first = _SENTENCE_ENDS.split(text.removeprefix(_QUESTION), maxsplit=1)[0].strip()
    if text.startswith(_QUESTION):
        if _is_long(first):
            yield f"{first}?"
            yield f"{_QUESTION}{first}?\nAnswer:"
            yield first.lower()
        return
    ends = [match.end() for match in _LEADS_TO_AN_ANSWER.finditer(first)]
    if ends and _is_long(first[: ends[-1]]):
        yield first[: ends[-1]]


def _is_long(text: str) -> bool:
    return len(text.split()) >= _FEWEST_WORDS
