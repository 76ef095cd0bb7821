"""Prompts that a model asks itself: questions and beginnings of statements, up to the answer.

What an edit moves on prompts that have nothing to do with it, it moves mostly at their last token,
where an answer begins. Among all tokens of ordinary text such places are few, so they are sampled
for themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

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
