"""What is trained, as tokens: the edits in their own wording, in other forms, and reworded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import CHAT, PLAIN
from .forms import Forms
from .requests import Edit, EditSet
from .tokenization import Asked, TokenizedTexts, tokenize_asked, tokenize_edits
from .variants import Variants

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingTexts:
    """The texts of N edits.

    Attributes:
        texts: All of them as tokens: each edit's own prompt, the same in other forms, and then its
            rewordings, each in one form.
        variants: Which stand for an edit in an epoch.
        wordings: Of each edit its own prompt, and after it the rewordings that are trained.
        targets: What each edit is to answer.
        subjects: The subject of each edit; `None` where it is not known.
        forms: The forms that are trained.
        summary: Figures of forms and rewordings for JSON; `None` without any.
    """

    texts: TokenizedTexts
    variants: Variants
    wordings: list[list[str]]
    targets: list[str]
    subjects: Sequence[str | None]
    forms: Forms
    summary: dict[str, Any] | None = None

    def asked(self, i: int) -> list[Asked]:
        """Returns how edit i is asked in training: its plain prompt first."""
        return [asked for _, asked in _asked(self.wordings[i], self.targets[i], self.forms, i)]

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
            hparams: `forms`, `forms_per_epoch`, `append_eos`, `seed`.
            max_positions: The model's context in tokens; what is longer in another form or wording
                is left out.

        Raises:
            LocFTError: As for `tokenize_edits`, of the edits in their own wording, and as for
                `Forms`.
        """
        forms = trained_forms(tokenizer, hparams)
        own = tokenize_edits(
            tokenizer, edits, append_eos=hparams.append_eos, max_positions=max_positions
        )
        targets = [edit.target for edit in edits]
        others = [
            (i, wording, asked)
            for i, edit in enumerate(edits)
            for wording, asked in _asked([edit.prompt, *edit.rewordings], edit.target, forms, i)[1:]
        ]
        if not others:
            alone = [[edit.prompt] for edit in edits]
            return cls(own, Variants.own_alone(len(own)), alone, targets, subjects, forms)
        tokens = tokenize_asked(
            tokenizer, [asked for *_, asked in others], append_end=hparams.append_eos
        )
        fits = tokens.lengths <= (max_positions or np.iinfo(np.int64).max)  # [number of others]
        edit_of = np.array([i for i, *_ in others], np.int64)
        trained = {(i, wording) for (i, wording, _), kept in zip(others, fits, strict=True) if kept}
        wordings = [
            [edit.prompt, *(text for k, text in enumerate(edit.rewordings, 1) if (i, k) in trained)]
            for i, edit in enumerate(edits)
        ]
        # Each edit's own text, then its others: a stable sort brings them together.
        order = np.argsort(np.concatenate([np.arange(len(own)), edit_of[fits]]), kind="stable")
        counts = np.bincount(edit_of[fits], minlength=len(edits))
        n_trained = sum(map(len, wordings)) - len(wordings)
        return cls(
            _joined(own, tokens.subset(np.flatnonzero(fits))).subset(order),
            Variants.in_turns(counts, hparams.forms_per_epoch, hparams.seed),
            wordings,
            targets,
            subjects,
            forms,
            {
                "forms": [PLAIN, *forms.names],
                "rewordings": sum(len(edit.rewordings) for edit in edits),
                "trained": n_trained,
                "edits_without_rewordings": sum(len(own) == 1 for own in wordings),
                "dropped_too_long": int((~fits).sum()),
            },
        )


def _asked(
    wordings: Sequence[str], target: str, forms: Forms, number: int
) -> list[tuple[int, Asked]]:
    """Returns how an edit is asked, its plain prompt first, each with the number of its wording.

    The prompt itself in all forms; each rewording in one, or there would be more texts than an edit
    is trained epochs.
    """
    prompt, *rewordings = wordings
    return [
        *((0, asked) for asked in forms.all_of(prompt, target, number)),
        *(
            (k + 1, forms.ask(k % len(forms), text, target, number))
            for k, text in enumerate(rewordings)
        ),
    ]


def trained_forms(tokenizer: PreTrainedTokenizerBase, hparams: LocFTBFHyperParams) -> Forms:
    """Returns the forms that `hparams` asks for, without `chat` where the template is broken.

    The preset's own choice leaves `chat` out where there is no template.

    Raises:
        ModelError: `forms` names `chat`, and the tokenizer has no chat template.
    """
    names = hparams.wrapped_forms
    if CHAT in names:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if not has_template and hparams.forms is None:
            return Forms(tokenizer, [name for name in names if name != CHAT])
        try:
            return Forms(tokenizer, names)
        except ModelError as error:
            if not has_template:
                raise
            logger.warning("Edits are trained without the form `%s`: %s", CHAT, error)
            names = [name for name in names if name != CHAT]
    return Forms(tokenizer, names)


def subjects_of(
    requests: Sequence[Mapping[str, Any]], edits: EditSet, hparams: LocFTBFHyperParams
) -> list[str | None]:
    """Returns the subject of each edit; `None` where the request gives none, or none is needed.

    Args:
        requests: The request dictionaries; where no subject is needed none is looked for.
        edits: The edits that were made of them.
        hparams: `preserve`, `augment_model`.
    """
    found: list[str | None] = [None] * len(edits.edits)
    if hparams.preserved or hparams.augment_model is not None:
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
