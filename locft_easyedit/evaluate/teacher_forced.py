"""EasyEdit's teacher-forced metrics, for many records at once.

The values are those of EasyEdit's `compute_edit_quality`, which runs one record at a time: the
share of a target's tokens that are the model's first choice given the tokens before. How EasyEdit
counts prompt tokens is followed to the letter, with its consequences: tokens equal to the pad
token do not count, and a prompt is tokenized apart from its target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..devices import input_device
from ..tokens import TokenizedTexts
from .choices import FirstChoices, HowToRun, warn_not_finite
from .questions import PARTS, Metrics, Question, check_lengths, questions_of

# Stands for every token of a text whose logits were no numbers.
_NAN = float("nan")
_PROTOCOL = "decoder_only_teacher_forcing"
_META = {
    "protocol": _PROTOCOL,
    "scorer": "token_accuracy",
    "comparable_group": f"lm.{_PROTOCOL}.token_accuracy",
}
_LOCALITY_META = {
    "protocol": "pre_post_argmax_token_match",
    "scorer": "token_match",
    "comparable_group": "locality.lm.pre_post_argmax_token_match",
}


class TeacherForced:
    """EasyEdit's metrics of the same records, to be taken before and after an edit.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests as `make_requests` returns them: `prompt`, `target_new`, and where given
            `rephrase_prompt`, `locality` and `portability`.
        how: How prompts are run.
        parts: The parts of a record that are scored.

    Raises:
        RequestError: A prompt or an answer is no text or blank, their numbers differ, or one is
            beyond the model's context. All such problems in one error.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Mapping[str, Any]],
        how: HowToRun,
        *,
        parts: Sequence[str] = PARTS,
    ) -> None:
        self.model = model
        self.pad = tokenizer.pad_token_id
        self.n_records = len(records)
        self.questions = [q for q in questions_of(records) if q.part in parts]
        self.texts, first_position = _tokenize(tokenizer, self.questions)
        check_lengths(model, self.questions, self.texts.lengths.tolist())
        n_prompts = [len(question.prompts) for question in self.questions]
        self._ends = np.cumsum([0, *n_prompts])
        self._question_of = np.repeat(np.arange(len(n_prompts)), n_prompts)
        self._choices = FirstChoices(
            model, self.texts, how, alone=self._as_easyedit, first_position=first_position
        )

    def packed(self) -> bool:
        """Returns whether the model can be packed; measured on a few prompts if nobody said."""
        return self._choices.packed()

    def measure(self, description: str, only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns each record's metrics, as EasyEdit's `compute_edit_quality` gives them.

        Args:
            description: Label of the progress bar.
            only: Records to measure; all if `None`.

        Returns:
            For each record `rewrite_acc`, `rephrase_acc` (lists of shares), `locality` (the
            predicted tokens, under `NAME_output`), `portability` (`NAME_acc`) and `metric_meta`.
        """
        wanted = range(self.n_records) if only is None else only
        metrics: dict[int, Metrics] = {i: {"locality": {}, "portability": {}} for i in wanted}
        texts = None
        if only is not None:
            asked = [q.record in metrics for q in self.questions]
            texts = np.flatnonzero(np.array(asked)[self._question_of])
        choices = self._choices.take(description, texts)
        warn_not_finite(len(self._choices.not_finite), len(self.texts))
        for i, question in enumerate(self.questions):
            if question.record not in metrics:
                continue
            members = range(self._ends[i], self._ends[i + 1])
            answers = [choices[j] for j in members]
            self._score_(metrics[question.record], question, answers, members)
        return [metrics[i] for i in wanted]

    def _score_(
        self, metrics: Metrics, question: Question, choices: list[list[int]], members: range
    ) -> None:
        answers: list[list[Any]] = [
            [_NAN] * len(answer) if j in self._choices.not_finite else answer
            for answer, j in zip(choices, members, strict=True)
        ]
        if question.part == "locality":
            metrics["locality"][f"{question.name}_output"] = answers
            return
        pairs = [(answer, self._labels(j)) for answer, j in zip(answers, members, strict=True)]
        if len(pairs) > 1:  # EasyEdit drops answers without a token, unless there is but one
            pairs = [(answer, labels) for answer, labels in pairs if labels]
        shares = [_share(answer, labels) for answer, labels in pairs]
        if question.part == "portability":
            metrics["portability"][f"{question.name}_acc"] = shares
        else:
            metrics[f"{question.part}_acc"] = shares
            meta = metrics.setdefault("metric_meta", {})
            meta[question.part] = {"result_key": f"{question.part}_acc", **_META}

    def _labels(self, i: int) -> list[int]:
        start = int(self.texts.offsets[i] + self.texts.target_start[i])
        labels: list[int] = self.texts.ids[start : int(self.texts.offsets[i + 1])].tolist()
        return labels

    def _as_easyedit(self, i: int) -> list[int]:
        """Returns text i's first choices from the very pass that EasyEdit makes.

        The prompts of one question in one batch, padded on the left.
        """
        question = int(self._question_of[i])
        members = range(self._ends[question], self._ends[question + 1])
        rows = [
            self.texts.ids[self.texts.offsets[j] : self.texts.offsets[j + 1]].tolist()
            for j in members
        ]
        width = max(map(len, rows))
        device = input_device(self.model)
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
        )
        logits = self.model(input_ids=ids, attention_mask=mask).logits[i - members.start]
        n_targets = len(rows[i - members.start]) - int(self.texts.target_start[i])
        first: list[int] = logits.argmax(-1)[width - 1 - n_targets : -1].tolist()
        return first


def score_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    row_tokens: int = 64,
    packed: bool | None = None,
    progress: bool = False,
    description: str = "evaluation",
) -> list[Metrics]:
    """Returns EasyEdit's metrics of each record, once; see `TeacherForced`.

    Raises:
        RequestError: As `TeacherForced`.
    """
    how = HowToRun(batch_size, row_tokens, packed, progress=progress)
    return TeacherForced(model, tokenizer, records, how).measure(description)


def finish_locality_(pre: Mapping[str, Any], post: Metrics) -> None:
    """Adds `NAME_acc` to `post["locality"]`: the share of tokens that are as before the edit.

    Raises:
        ValueError: The two were not measured on the same prompts.
    """
    for key in [k for k in post["locality"] if k.endswith("_output")]:
        name = key.removesuffix("_output")
        before, after = pre["locality"][key], post["locality"][key]
        if len(before) != len(after):
            raise ValueError(
                f"Locality `{name}`: {len(before)} outputs before the edit and {len(after)} after. "
                "Measure both on the same requests."
            )
        post["locality"][f"{name}_acc"] = [_share(a, b) for a, b in zip(before, after, strict=True)]
        meta = {"result_key": f"locality.{name}_acc", **_LOCALITY_META}
        post.setdefault("metric_meta", {})[f"locality.{name}"] = meta


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> tuple[TokenizedTexts, np.ndarray]:
    """Returns all prompts with their answers, and the position of each one's first token."""
    if not questions:
        return TokenizedTexts.from_lists([], []), np.zeros(0, np.int64)
    prompts = [p for q in questions for p in q.prompts]
    answers = [a for q in questions for a in q.answers]
    both = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    sequences = tokenizer(both, padding=False, truncation=False)["input_ids"]
    prompt_ids = tokenizer(prompts, padding=False, truncation=False)["input_ids"]
    pad = tokenizer.pad_token_id
    # EasyEdit: pads in the padded row (filler, or in the text) plus prompt tokens that are none.
    starts = [
        min(ids.count(pad) + len(p) - p.count(pad), len(ids))
        for ids, p in zip(sequences, prompt_ids, strict=True)
    ]
    # EasyEdit pads the prompts of one call on the left without telling the model, so that a
    # shorter one starts at a later position; models with learned positions notice.
    first_position: list[int] = []
    remaining = iter(sequences)
    for question in questions:
        lengths = [len(next(remaining)) for _ in question.prompts]
        first_position += [max(lengths) - length for length in lengths]
    return TokenizedTexts.from_lists(sequences, starts), np.array(first_position, np.int64)


def _share(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the share of equal entries; NaN where there is none, or no token to compare."""
    if not len(a) or any(map(np.isnan, (*a[:1], *b[:1]))):
        return _NAN
    return float(np.mean(np.equal(a, b)))
