"""The edits' own prompts with other subjects put in: what an edit most easily takes with it.

"The mother tongue of Danielle Darrieux is" was to change; what is the mother tongue of others was
not. Neither the data's locality prompts nor other texts of it play a part.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Stand in where the edits have too few subjects of their own.
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
    pairs = zip(prompts, subjects, strict=True)
    usable = [i for i, (own, subject) in enumerate(pairs) if subject and subject in own[0]]
    n_without = len(prompts) - len(usable)
    if len(usable) * each > most:
        usable = sorted(draw.sample(usable, max(1, most // each)))
    known = {own[0] for own in prompts}
    found: dict[str, None] = {}
    for i in usable:
        subject = subjects[i]
        assert subject is not None
        reworded = [prompt for prompt in prompts[i][1:] if subject in prompt]
        for k in range(each):
            before = prompts[i][0] if k % 2 == 0 or not reworded else draw.choice(reworded)
            other = draw.choice(pool)
            changed = before.replace(subject, other)
            # The prompt of another edit is to be changed.
            if other != subject and changed not in known:
                found[changed] = None
    return Neighbours(list(found), n_without)
