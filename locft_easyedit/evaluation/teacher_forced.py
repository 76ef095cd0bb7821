"""EasyEdit's teacher-forced metrics, for many records at once.

The values are those of EasyEdit's `compute_edit_quality`, which runs one record at a time: the
share of a target's tokens that are the model's first choice given the tokens before. How EasyEdit
counts prompt tokens is followed to the letter, with its consequences: tokens equal to the pad
token do not count, and a prompt is tokenized apart from its target.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import CHUNK, GrowingTexts, TokenizedTexts, ids_of
from ..modeling.devices import input_device
from .predictions import (
    ArgmaxPredictions,
    ArgmaxPredictor,
    EvalConfig,
    Measurement,
    warn_not_finite,
)
from .prompts import PARTS, Metrics, Question, Questions, check_lengths

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


class TeacherForced(Measurement):
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
        how: EvalConfig,
        *,
        parts: Sequence[str] = PARTS,
    ) -> None:
        self.model = model
        self.pad = tokenizer.pad_token_id
        self.n_records = len(records)
        self.questions = Questions(records, parts)
        self.texts, first_position = _tokenize(tokenizer, self.questions)
        check_lengths(model, self.questions, self.texts.lengths)
        self._choices = ArgmaxPredictor(
            model, self.texts, how, alone=self._as_easyedit, first_position=first_position
        )

    def packed(self) -> bool:
        """Returns whether the model can be packed; measured on a few prompts if not given."""
        return self._choices.packed()

    def stream(self, description: str, only: Sequence[int] | None = None) -> Iterator[Metrics]:
        """Measures; yields each record's metrics as EasyEdit's `compute_edit_quality` gives them.

        Yields:
            For each record `rewrite_acc`, `rephrase_acc` (lists of shares), `locality` (the
            predicted tokens, under `NAME_output`), `portability` (`NAME_acc`) and `metric_meta`.
        """
        texts = None if only is None else self.questions.prompts_of(only)
        choices = self._choices.take(description, texts)
        warn_not_finite(len(self._choices.not_finite), len(self.texts))
        for i in range(self.n_records) if only is None else only:
            yield self._metrics(i, choices)

    def _metrics(self, record: int, choices: ArgmaxPredictions) -> Metrics:
        metrics: Metrics = {"locality": {}, "portability": {}}
        first = int(self.questions.first_prompt[record])
        for question in self.questions.of(record):
            members = range(first, first + len(question.prompts))
            self._score_(metrics, question, [choices[j] for j in members], members)
            first = members.stop
        return metrics

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
        pairs = [(answer, self.texts.target(j)) for answer, j in zip(answers, members, strict=True)]
        if len(pairs) > 1:  # EasyEdit drops answers without a token, unless there is but one
            pairs = [(answer, labels) for answer, labels in pairs if labels]
        shares = [_share(answer, labels) for answer, labels in pairs]
        if question.part == "portability":
            metrics["portability"][f"{question.name}_acc"] = shares
        else:
            metrics[f"{question.part}_acc"] = shares
            meta = metrics.setdefault("metric_meta", {})
            meta[question.part] = {"result_key": f"{question.part}_acc", **_META}

    def _as_easyedit(self, i: int) -> list[int]:
        """Returns text i's first choices from the very pass that EasyEdit makes.

        The prompts of one question in one batch, padded on the left.
        """
        members = self._asked_with(i)
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
        return logits.argmax(-1)[width - 1 - n_targets : -1].tolist()

    def _asked_with(self, i: int) -> range:
        """Returns the prompts of the question that prompt i belongs to."""
        record = self.questions.record_of(i)
        stop = int(self.questions.first_prompt[record])
        for question in self.questions.of(record):
            start, stop = stop, stop + len(question.prompts)
            if i < stop:
                return range(start, stop)
        raise IndexError(i)


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
    tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> tuple[TokenizedTexts, np.ndarray | None]:
    """Returns all prompts with their answers, and the position of each one's first token.

    The positions are `None` if all are 0.
    """
    growing, pad = GrowingTexts(), tokenizer.pad_token_id
    first_position: list[np.ndarray] = []
    remaining = iter(questions)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        prompts = [p for q in chunk for p in q.prompts]
        answers = [a for q in chunk for a in q.answers]
        both = ids_of(tokenizer, [f"{p} {a}" for p, a in zip(prompts, answers, strict=True)])
        for ids, alone in zip(both, ids_of(tokenizer, prompts), strict=True):
            # EasyEdit: pads in the padded row (filler, or in the text) plus prompt tokens that are
            # none.
            growing.add(ids, min(ids.count(pad) + len(alone) - alone.count(pad), len(ids)))
        # EasyEdit pads the prompts of one call on the left without telling the model, so that a
        # shorter one starts at a later position; models with learned positions notice.
        lengths = np.array([len(ids) for ids in both], np.int64)
        n_prompts = np.array([len(q.prompts) for q in chunk if q.prompts], np.int64)
        if len(n_prompts):
            widest = np.maximum.reduceat(lengths, np.cumsum(n_prompts) - n_prompts)
            first_position.append(np.repeat(widest, n_prompts) - lengths)
    if not any(positions.any() for positions in first_position):
        return growing.finished(), None
    return growing.finished(), np.concatenate(first_position)


def _share(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the share of equal entries; NaN where there is none, or no token to compare."""
    if not len(a) or any(map(np.isnan, (*a[:1], *b[:1]))):
        return _NAN
    return float(np.mean(np.equal(a, b)))
