"""What is trained, as tokens: the edits in their own wording, and their rewordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..hparams import LocFTBFHyperParams
from ..hparams_rules import MOST_REWORDINGS
from .augment.reword import Wordings, reword_edits
from .requests import Edit, EditSet
from .tokenization import TokenizedTexts, tokenize_edits


@dataclass(frozen=True, eq=False)
class TrainingTexts:
    """The texts of N edits.

    Attributes:
        texts: All of them as tokens: each edit's own wording, then its rewordings.
        variants: Which stand for an edit in an epoch.
        prompts: Of each edit its own prompt, and after it the rewordings that are trained.
        wordings: The same with all rewordings: what is to be preserved is measured with these.
        targets: What each edit is to answer.
        subjects: The subject of each edit; `None` where it is not known.
        summary: Figures of the rewordings for JSON; `None` without `augment`.
    """

    texts: TokenizedTexts
    variants: Variants
    prompts: list[list[str]]
    wordings: list[list[str]]
    targets: list[str]
    subjects: Sequence[str | None]
    summary: dict[str, Any] | None = None

    @classmethod
    def tokenize(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        subjects: Sequence[str | None],
        hparams: LocFTBFHyperParams,
        max_positions: int | None,
    ) -> TrainingTexts:
        """Returns the texts of these edits.

        Args:
            tokenizer: The model's tokenizer.
            edits: The edits.
            subjects: The subject of each; `None` where it is not known.
            hparams: `augment`, `append_eos`, `seed`.
            max_positions: The model's context in tokens; longer rewordings are left out.

        Raises:
            LocFTError: As for `tokenize_edits`, of the edits in their own wording.
        """
        eos = hparams.append_eos
        prompts = [[edit.prompt] for edit in edits]
        targets = [edit.target for edit in edits]
        own = tokenize_edits(tokenizer, edits, append_eos=eos, max_positions=max_positions)
        if not hparams.rewordings:
            return cls(
                own, Variants.without_rewordings(len(own)), prompts, prompts, targets, subjects
            )
        made = reword_edits(edits, subjects, seed=hparams.seed)
        wordings = [[edit.prompt, *more] for edit, more in zip(edits, made.prompts, strict=True)]
        # More to learn is more to change: what is left out is mostly the prompt in a frame.
        pairs = [(i, p) for i, more in enumerate(made.prompts) for p in more[:MOST_REWORDINGS]]
        other = tokenize_edits(
            tokenizer, [replace(edits[i], prompt=prompt) for i, prompt in pairs], append_eos=eos
        )
        fits = other.lengths <= (max_positions or np.iinfo(np.int64).max)  # [number of rewordings]
        for (i, prompt), kept in zip(pairs, fits, strict=True):
            if kept:
                prompts[i].append(prompt)
        # Each edit's own text, then its rewordings: a stable sort brings them together.
        edit_of = np.concatenate([np.arange(len(own)), np.array([i for i, _ in pairs], int)[fits]])
        texts = _joined(own, other.subset(np.flatnonzero(fits)))
        variants = Variants.in_turns(
            [len(trained) - 1 for trained in prompts], hparams.rewordings, hparams.seed
        )
        return cls(
            texts.subset(np.argsort(edit_of, kind="stable")),
            variants,
            prompts,
            wordings,
            targets,
            subjects,
            _summary(made, prompts, int((~fits).sum())),
        )


def subjects_of(
    requests: Sequence[Mapping[str, Any]], edits: EditSet, hparams: LocFTBFHyperParams
) -> list[str | None]:
    """Returns the subject of each edit; `None` where the request gives none, or none is needed.

    Args:
        requests: The request dictionaries; where no subject is needed none is looked for.
        edits: The edits that were made of them.
        hparams: `augment`, `preserve`.
    """
    found: list[str | None] = [None] * len(edits.edits)
    if hparams.rewordings or hparams.preserved:
        for request, i in zip(requests, edits.edit_of_request, strict=True):
            if i is None or found[i] is not None:
                continue  # of requests that repeat an edit, the first that has a subject counts
            subject = request.get("subject")
            if isinstance(subject, str):
                found[i] = subject.strip() or None
    return found


def _joined(one: TokenizedTexts, other: TokenizedTexts) -> TokenizedTexts:
    return TokenizedTexts(
        np.concatenate([one.ids, other.ids]),
        np.concatenate([one.offsets, one.offsets[-1] + other.offsets[1:]]),
        np.concatenate([one.target_start, other.target_start]),
    )


def _summary(made: Wordings, prompts: Sequence[Sequence[str]], n_too_long: int) -> dict[str, Any]:
    return {
        **made.summary(),
        "trained": sum(map(len, prompts)) - len(prompts),
        "dropped_too_long": n_too_long,
        "edits_without_rewordings": sum(len(trained) == 1 for trained in prompts),
    }


@dataclass(frozen=True, eq=False)
class Variants:
    """The texts of N edits, one edit after the other: the own wording first, then rewordings.

    Attributes:
        first: Where each edit's texts begin, [N + 1] int64.
        each: Rewordings that are trained beside the own wording in an epoch, at most.
        turn: Where each edit begins in the circle of its rewordings, [N] int64.
    """

    first: np.ndarray
    each: int
    turn: np.ndarray

    @classmethod
    def without_rewordings(cls, n: int) -> Variants:
        """Returns the texts of `n` edits without rewordings: text i is edit i."""
        return cls(np.arange(n + 1), 0, np.zeros(n, np.int64))

    @classmethod
    def in_turns(cls, n_rewordings: Sequence[int], each: int, seed: int) -> Variants:
        """Returns the texts of edits with so many rewordings.

        Args:
            n_rewordings: Rewordings of each edit, N numbers.
            each: Those of an epoch.
            seed: Seed of the order.
        """
        first = np.concatenate([[0], np.cumsum(np.array(n_rewordings, np.int64) + 1)])
        turn = np.random.default_rng(seed).integers(0, 2**31, len(n_rewordings))
        return cls(first, each, turn)

    @property
    def most(self) -> int:
        """Texts of one edit in an epoch, at most."""
        return 1 + self.each

    def texts(self, batch: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the texts of a mini-batch of edits; all own wordings come first.

        An edit's rewordings take turns, so that each is trained about as often as the others.

        Args:
            batch: The edits, [B].
            epoch: The epoch, from 0.
        """
        own = self.first[batch]
        found = [own]
        n_rewordings = self.first[batch + 1] - own - 1
        for k in range(self.each):
            there = n_rewordings > k
            turn = (self.turn[batch] + epoch * self.each + k)[there] % n_rewordings[there]
            found.append(own[there] + 1 + turn)
        return np.concatenate(found)
