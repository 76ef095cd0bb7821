"""Small changes of a prompt's surface: contractions, first letters, articles, its end."""

from __future__ import annotations

import re

from .english import SLOT, SMALL_WORDS, capital, small

_CONTRACTED = (("What is ", "What's "), ("Who is ", "Who's "), ("Where is ", "Where's "))


def surface_changes(masked: str) -> list[str]:
    """Returns a prompt with one small change each, in a fixed order.

    Args:
        masked: The prompt, with `english.SLOT` where its subject stands.
    """
    changed = [
        small(masked),
        capital(masked) if masked.split(" ", 1)[0] in SMALL_WORDS else masked,
        masked.rstrip(" ?,:"),
        masked.strip(),
        " ".join(masked.split()),
        capital(re.sub(rf"\b[Tt]he (?={SLOT})", "", masked)),
        re.sub(r"(?<=\b(?:is|as)) (?:an?|the)$", "", masked),
        re.sub(r"\bthe name of (?=the )", "", masked),
    ]
    for full, short in _CONTRACTED:
        if masked.startswith(full):
            changed.append(short + masked[len(full) :])
        elif masked.startswith(short):
            changed.append(full + masked[len(short) :])
    return [text for text in dict.fromkeys(changed) if text != masked and text.strip()]
