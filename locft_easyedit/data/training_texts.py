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
from ..hparams_rules import CHAT, MOST_REWORDINGS, PLAIN
from .augment.reword import Wordings, reword_edits
from .forms import Forms
from .requests import Edit, EditSet, with_leading_space
from .tokenization import Asked, TokenizedTexts, tokenize_asked, tokenize_edits
from .variants import Variants

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingTexts:
    """The texts of N edits.

    Attributes:
        texts: All of them as tokens: each edit's own wording, the same in other forms, and then
            rewordings of it.
        variants: Which stand for an edit in an epoch.
        prompts: Of each edit its own prompt, and after it the rewordings that are trained.
        wordings: The same with all rewordings: what is to be preserved is measured with these.
        targets: What each edit is to answer.
        subjects: The subject of each edit; `None` where it is not known.
        forms: The forms that are trained.
        summary: Figures of the rewordings for JSON; `None` without any.
    """

    texts: TokenizedTexts
    variants: Variants
    prompts: list[list[str]]
    wordings: list[list[str]]
    targets: list[str]
    subjects: Sequence[str | None]
    forms: Forms
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
            hparams: `forms`, `forms_per_epoch`, `augment`, `append_eos`, `seed`.
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
        prompts, wordings = [[edit.prompt] for edit in edits], [[edit.prompt] for edit in edits]
        targets = [edit.target for edit in edits]
        in_forms = [
            (i, forms.ask(form, edit.prompt, edit.target, i))
            for i, edit in enumerate(edits)
            for form in forms.names
        ]
        made, n_given = None, sum(len(edit.rewordings) for edit in edits)
        if hparams.rewordings:
            made = reword_edits(edits, subjects, seed=hparams.seed)
        reworded = []
        for i, edit in enumerate(edits):
            more = list(dict.fromkeys([*edit.rewordings, *(made.prompts[i] if made else [])]))
            wordings[i] += more
            # More to learn is more to change: what is left out is mostly the prompt in a frame.
            for prompt in more[: max(MOST_REWORDINGS, len(edit.rewordings))]:
                reworded.append((i, Asked(prompt, with_leading_space(edit.target))))
        # The other texts of an edit are in groups, of which each takes turns by itself.
        each = [hparams.forms_per_epoch, max(hparams.rewordings, 1)]
        groups = [in_forms, reworded]
        others = [one for group in groups for one in group]
        if not others:
            variants = Variants.own_alone(len(own))
            return cls(own, variants, prompts, wordings, targets, subjects, forms)
        tokens = tokenize_asked(
            tokenizer, [asked for _, asked in others], append_end=hparams.append_eos
        )
        fits = tokens.lengths <= (max_positions or np.iinfo(np.int64).max)  # [number of others]
        edit_of = np.array([i for i, _ in others], np.int64)
        group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        counts = np.zeros((len(groups), len(edits)), np.int64)
        np.add.at(counts, (group_of[fits], edit_of[fits]), 1)
        for (i, asked), kept, group in zip(others, fits, group_of, strict=True):
            if kept and group == 1:
                prompts[i].append(asked.text)
        # Each edit's own text, then those of its groups: a stable sort brings them together.
        order = np.argsort(np.concatenate([np.arange(len(own)), edit_of[fits]]), kind="stable")
        return cls(
            _joined(own, tokens.subset(np.flatnonzero(fits))).subset(order),
            Variants.in_turns(counts, each, hparams.seed),
            prompts,
            wordings,
            targets,
            subjects,
            forms,
            _summary(forms, made, n_given, prompts, int((~fits).sum())),
        )


def trained_forms(tokenizer: PreTrainedTokenizerBase, hparams: LocFTBFHyperParams) -> Forms:
    """Returns the forms that `hparams` asks for, without `chat` where the template is broken.

    Raises:
        ModelError: `forms` names `chat`, and the tokenizer has no chat template.
    """
    names = hparams.wrapped_forms
    if CHAT in names:
        try:
            return Forms(tokenizer, names, hparams.seed)
        except ModelError as error:
            if not getattr(tokenizer, "chat_template", None):
                raise
            logger.warning("Edits are trained without the form `%s`: %s", CHAT, error)
            names = [name for name in names if name != CHAT]
    return Forms(tokenizer, names, hparams.seed)


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


def _summary(
    forms: Forms,
    made: Wordings | None,
    n_given: int,
    prompts: Sequence[Sequence[str]],
    n_too_long: int,
) -> dict[str, Any]:
    return {
        "forms": [PLAIN, *forms.names],
        "given": n_given,
        **({} if made is None else made.summary()),
        "trained": sum(map(len, prompts)) - len(prompts),
        "dropped_too_long": n_too_long,
        "edits_without_rewordings": sum(len(trained) == 1 for trained in prompts),
    }
