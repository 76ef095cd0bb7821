"""A user's own text, in passages, for the drift."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from ..reading import text_of

_MOST_BYTES = 2**26
_WORDS = 1500  # of the text that are used: its distributions stay in memory
_WORDS_A_PASSAGE = 150


def read_passages(path: str | Path) -> list[str]:
    """Returns the beginning of a text file, in passages of at most 150 words.

    Args:
        path: Plain text in UTF-8; blank lines divide passages. The first 1,500 words count.

    Raises:
        DataError: The file is missing, no UTF-8 text, or holds no words.
    """
    words_left, passages = _WORDS, []
    for block in text_of(Path(path), DataError, most=_MOST_BYTES).split("\n\n"):
        words = block.split()[:words_left]
        words_left -= len(words)
        for start in range(0, len(words), _WORDS_A_PASSAGE):
            passages.append(" ".join(words[start : start + _WORDS_A_PASSAGE]))
    if not passages:
        raise DataError(f"`text={path}` holds no words. Give a file with plain text.")
    return passages
