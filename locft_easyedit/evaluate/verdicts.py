"""When the verdict on an answer is settled before the answer is complete.

Most wrong answers show it in their first word. Where nobody reads the answers, the rest need not
be generated: what counts and what does not stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import accepted_for, accepted_targets, normalize_answer
from .questions import Metrics, Question, Questions

_PART_OF_ARTICLE = re.compile(r"\bth?\W*$", re.IGNORECASE)
_CUT_CHARACTER = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class Verdicts:
    """What the answer to each prompt is compared with, word by word.

    Args:
        questions: The questions.
        records: The records they are of.
        before: Each record's metrics before the edit: locality compares with the answers there.

    Raises:
        ValueError: The answers before the edit are not there for every locality prompt.
    """

    def __init__(
        self,
        questions: Questions,
        records: Sequence[Mapping[str, Any]],
        before: Sequence[Metrics],
    ) -> None:
        if len(before) != len(records):
            raise ValueError(f"{len(records)} records, {len(before)} measured before the edit.")
        accepted = [
            texts
            for i, record in enumerate(records)
            for question in questions.of(i)
            for texts in _accepted(question, record, before[i])
        ]
        self.drafts = [texts[0] for texts in accepted]
        self._accepted = [{_squeezed(text) for text in texts} for texts in accepted]

    def open(self, prompt: int, text: str) -> bool:
        """Returns whether an answer that begins with `text` may still count.

        Args:
            prompt: Number of the prompt.
            text: The answer so far; the last word may be a part of one.
        """
        if text.endswith(_CUT_CHARACTER):
            return True
        # "th" may become an article, which does not count.
        begun = {_squeezed(text), _squeezed(_PART_OF_ARTICLE.sub("", text))}
        return any(full.startswith(tuple(begun)) for full in self._accepted[prompt])


def _accepted(question: Question, record: Mapping[str, Any], before: Metrics) -> list[list[str]]:
    """Returns, for each prompt of a question, the answers that count."""
    if question.part in ("rewrite", "rephrase"):
        return [accepted_targets(record) for _ in question.prompts]
    if question.part == "portability":
        entry = record["portability"][question.name]
        return [accepted_for(entry, i) for i in range(len(question.prompts))]
    found = before.get("generated", {}).get("locality_answers", {}).get(question.name)
    if found is None or len(found) != len(question.prompts):
        raise ValueError(f"{question.where}: its answers before the edit are missing.")
    return [[answer] for answer in found]


def _squeezed(text: str) -> str:
    """Returns the normalised text without spaces.

    The beginning of an answer gives the beginning of what the whole gives: a tokenizer may yet
    take a space away, and a sigma that ends the text may not end its word.
    """
    return normalize_answer(text).replace(" ", "").replace("ς", "σ")
