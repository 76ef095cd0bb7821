"""Finding a name in a text where it is not a part of another word, in any script."""

from __future__ import annotations

import re

# Scripts without spaces between words, or with endings right behind a name: Thai, Lao, Tibetan,
# Burmese, Khmer, kana, CJK ideographs and Hangul. There the next letter may be another word's.
_UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u30ff\u3130-\u318f\u31f0-\u31ff"
    r"\u3400-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff"
)
_SPACED_LETTER = rf"[^\W{_UNSPACED}]"
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")


def as_word(name: str) -> str:
    """Returns a regular expression that finds a name where it is a word of its own.

    "Paris" is none in "Parisian". Next to letters of a script that puts no spaces between words the
    name stands for itself, as it does in "Appleの本社" and "法国的首都".
    """
    before = "" if _UNSPACED_LETTER.match(name[0]) else rf"(?<!{_SPACED_LETTER})"
    after = "" if _UNSPACED_LETTER.match(name[-1]) else rf"(?!{_SPACED_LETTER})"
    return before + re.escape(name) + after
