"""The edits' own prompts with other subjects put in: what an edit most easily takes with it.

"The mother tongue of Danielle Darrieux is" was to change; what is the mother tongue of others was
not. Neither the data's locality prompts nor other texts of it play a part.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...utils.text import as_word

# What tells a name from others: "USS Bermuda (1861)", "Dune (film)"; not "Dune (and when)".
_IN_PARENTHESES = r" \((?:[A-Z0-9][^()]*|\w+)\)"
# Stand in where the edits have too few subjects of their own, or each has the same prompt.
_OTHERS = (
    "Paris",
    "Marie Curie",
    "Japan",
    "the Nile",
    "William Shakespeare",
    "Mount Everest",
    "Toyota",
    "the Moon",
    "Harvard University",
    "The Beatles",
    "Albert Einstein",
    "Brazil",
    "the Eiffel Tower",
    "Romeo and Juliet",
    "New York City",
    "Microsoft",
)
_FEWEST = 16  # subjects to draw from


@dataclass(frozen=True)
class Neighbours:
    """Prompts that an edit must not take with it.

    Attributes:
        prompts: The prompts.
        n_without_subject: Edits whose subject is not known, or not in the prompt: they have none.
    """

    prompts: list[str]
    n_without_subject: int


def neighbours_of(
    prompts: Sequence[Sequence[str]],
    subjects: Sequence[str | None],
    *,
    each: int,
    most: int,
    seed: int,
) -> Neighbours:
    """Returns prompts of the edits with other subjects put in; the same for the same arguments.

    Args:
        prompts: For each edit its prompt, and its rewordings after it.
        subjects: The subject of each edit; `None` if it is not known.
        each: Prompts for an edit: one half from its own prompt, one from its rewordings.
        most: Prompts at most; of more edits than they suffice for, some are drawn.
        seed: Seed of the drawing.
    """
    pool = sorted({s.strip() for s in subjects if s and s.strip()})
    if len(pool) < _FEWEST:
        pool += [other for other in _OTHERS if other not in pool]
    draw = random.Random(seed)
    words = [_word(subject) for subject in subjects]
    usable = [
        i
        for i, (own, word) in enumerate(zip(prompts, words, strict=True))
        if word is not None and word.search(own[0])
    ]
    n_without = len(prompts) - len(usable)
    if len(usable) * each > most:
        usable = sorted(draw.sample(usable, max(1, most // each)))
    known = {prompt for own in prompts for prompt in own}
    found: dict[str, None] = {}
    for i in usable:
        word = words[i]
        assert word is not None
        reworded = [prompt for prompt in prompts[i][1:] if word.search(prompt)]
        for k in range(each):
            before = prompts[i][0] if k % 2 == 0 or not reworded else draw.choice(reworded)
            # What another edit may train is to be changed, and all may be of one relation.
            changed = (_put(other, word, before) for other in map(draw.choice, (pool, _OTHERS)))
            found.update(dict.fromkeys([text for text in changed if text not in known][:1]))
    return Neighbours(list(found), n_without)


def _put(other: str, word: re.Pattern[str], prompt: str) -> str:
    """Returns the prompt with another subject in place of its own."""
    return word.sub(lambda _: other, prompt)


def _word(subject: str | None) -> re.Pattern[str] | None:
    """Returns what finds a subject where it is not a part of another word."""
    name = (subject or "").strip()
    return re.compile(f"{as_word(name)}(?:{_IN_PARENTHESES})?") if name else None
