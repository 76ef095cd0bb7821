"""Facts as tokens, group after group, and mini-batches of new facts with old ones beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..data.packing import spanned
from ..data.tokenization import TokenizedTexts
from ..data.variants import Variants


@dataclass(frozen=True, eq=False)
class Replayed(Variants):
    """The texts of edits, which mini-batches of some of them share with as many others.

    Attributes:
        pool: The others, [P]: those of a mini-batch are drawn from them at random.
        seed: Seed of the draw.
    """

    pool: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    seed: int = 0

    @classmethod
    def of(cls, variants: Variants, each: float, pool: np.ndarray, seed: int) -> Replayed:
        """Returns the texts of `variants`, with so many others in an epoch, and this pool."""
        return cls(variants.first, each, variants.turn, pool, seed)

    @property
    def most(self) -> int:
        """Texts that come with one edit in an epoch, at most."""
        return super().most * (2 if len(self.pool) else 1)

    def texts(self, batch: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the texts of a mini-batch, and those of as many others.

        What is drawn depends on the epoch and the mini-batch alone.

        Args:
            batch: The edits, [B].
            epoch: The epoch, from 0.
        """
        n = min(len(batch), len(self.pool))
        if n:
            draw = np.random.default_rng([self.seed, epoch, int(batch[0])])
            batch = np.concatenate([batch, draw.choice(self.pool, n, replace=False)])
        return super().texts(batch, epoch)


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
        n_texts = np.minimum(np.diff(self.variants.first)[edits], self.n_forms)
        return spanned(self.variants.first[edits], n_texts)

    def texts_of(self, edits: np.ndarray) -> np.ndarray:
        """Returns all texts that stand for these edits."""
        n_texts = np.diff(self.variants.first)[edits]
        return spanned(self.variants.first[edits], n_texts)

    def edits_of(self, texts: np.ndarray) -> np.ndarray:
        """Returns the edits that these texts stand for, each once, ascending."""
        return np.unique(np.searchsorted(self.variants.first, texts, side="right") - 1)
