"""Which rewordings are dropped for what they say, before any model looks at them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...data.requests import gives_away
from .instruction import is_question

SAME, SUBJECT, TARGET, FORM, LONG = REASONS = ("same", "subject", "target", "form", "long")
_SENTENCE_ENDS = (".", "!", "。", "！", "।")
_MOST_TIMES, _MOST_MORE = 3, 60  # the prompt's length, and characters beside


def objection(
    text: str, prompt: str, subject: str | None, targets: Iterable[str], others: Sequence[str] = ()
) -> str | None:
    """Returns why a rewording is dropped; `None` if nothing speaks against it.

    `same`: it is the prompt or one of `others`, but for case and spaces. `subject`: it lacks the
    subject that the prompt has. `target`: it holds a target that the prompt does not hold. `form`:
    it makes a question of a statement or the reverse, or ends a sentence that the prompt leaves
    open. `long`: it is several times as long as the prompt.

    Args:
        text: The rewording.
        prompt: The prompt.
        subject: Its subject; `None`, or one that the prompt lacks, asks for nothing.
        targets: What the prompt's edits are to answer.
        others: Rewordings that are kept already.
    """
    if _plain(text) in {_plain(other) for other in (prompt, *others)}:
        return SAME
    if subject and subject in prompt and subject not in text:
        return SUBJECT
    if any(gives_away(text, prompt, target) for target in targets):
        return TARGET
    finished = text.endswith(_SENTENCE_ENDS) and not prompt.rstrip().endswith(_SENTENCE_ENDS)
    if is_question(text) != is_question(prompt) or finished:
        return FORM
    return LONG if len(text) > _MOST_TIMES * len(prompt) + _MOST_MORE else None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
