"""Facts as tokens, group after group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.tokenization import TokenizedTexts
from ..data.variants import Variants


def joined_texts(parts: Sequence[TokenizedTexts]) -> TokenizedTexts:
    """Returns the texts of all parts, one part after the other."""
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return TokenizedTexts(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([[0], *offsets]).astype(np.int64),
        np.concatenate([part.target_start for part in parts]),
    )


def joined_variants(parts: Sequence[Variants]) -> Variants:
    """Returns the variants of the edits of all parts, one part after the other.

    A part whose edits have no other texts may know of none that are trained beside them.
    """
    starts = np.cumsum([0, *(part.first[-1] for part in parts)])
    first = [part.first[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Variants(
        np.concatenate([[0], *first]).astype(np.int64),
        max(part.each for part in parts),
        np.concatenate([part.turn for part in parts]),
    )


@dataclass(frozen=True, eq=False)
class Numbered:
    """The edits of some groups of facts, by the facts' numbers.

    Attributes:
        texts: Their texts.
        variants: Which stand for an edit.
        edit_of: A fact's number -> its edit.
        n_forms: Texts of a prompt, the plain one included.
    """

    texts: TokenizedTexts
    variants: Variants
    edit_of: Mapping[int, int]
    n_forms: int = 1

    def edits(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns the edits of these facts, [N]."""
        return np.array([self.edit_of[n] for n in numbers], np.int64)

    def checked(self, edits: np.ndarray) -> np.ndarray:
        """Returns the texts by which these edits are checked: the own one, and that of each form.

        Rewordings are not: some are no good English, and the model may well be right there.
        """
        return self.variants.first_texts(edits, self.n_forms)

    def texts_of(self, edits: np.ndarray) -> np.ndarray:
        """Returns all texts that stand for these edits."""
        return self.variants.first_texts(edits)

    def edits_of(self, texts: np.ndarray) -> np.ndarray:
        """Returns the edits that these texts stand for, each once, ascending."""
        return self.variants.edits_of(texts)
