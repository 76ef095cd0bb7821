"""Whether edits hold where people ask: in chat and in neutral wrappers (see `wrappers`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import with_leading_space
from ..data.tokenization import CHUNK, Asked, asked_ids
from ..modeling.devices import context_length
from .answers import (
    accepted_targets,
    contains_any,
    inner_stops,
    matches_any,
    settled_answer,
)
from .divergence import BeforeEdit, Divergence
from .generated import MAX_NEW_TOKENS
from .greedy_decoder import GreedyDecoder
from .predictions import EvalConfig, Measurement, warn_not_finite
from .prompts import Metrics, Question, Questions
from .wrappers import CHAT, NAMES, Wrapper, wrappers_for

logger = logging.getLogger(__name__)

_PARTS = ("rewrite", "rephrase", "locality")


class Wrapped(Measurement):
    """Generated metrics in wrappers, of the same records before and after an edit.

    Answers are generated and compared as those to the plain prompt (see `Generated`); in chat the
    template's end of a turn ends them as well. A prompt that leaves the model's context no room for
    the answer in some wrapper is not asked in it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests, as for `TeacherForced`.
        how: How prompts are run.
        names: The wrappers that are measured, of `wrappers.NAMES`.
        numbers: The records' numbers among those of `before`; counted from 0 if `None`.
        before: What the model predicted before the edit, if another measurement may have kept it.
        max_new_tokens: Tokens of an answer, at most.

    Raises:
        RequestError: A prompt is no text or blank.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Mapping[str, Any]],
        how: EvalConfig,
        *,
        names: Sequence[str] = NAMES,
        numbers: Sequence[int] | None = None,
        before: BeforeEdit | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self.records = records
        self.questions = Questions(records, _PARTS)
        self.wrappers = wrappers_for(tokenizer, names)
        self._chat = [wrapper for wrapper in self.wrappers if wrapper.name == CHAT]
        counts, asked, stops = [], list[Asked](), list[int]()
        for i in range(len(records)):
            of_targets = inner_stops(accepted_targets(records[i]))
            n_before = len(asked)
            for question in self.questions.of(i):
                own = self._asked(question)
                asked += own
                stops += [0 if question.part == "locality" else of_targets] * len(own)
            counts.append(len(asked) - n_before)
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._fits = _fitting(model, tokenizer, asked, max_new_tokens)
        fitting = [one for one, fits in zip(asked, self._fits, strict=True) if fits]
        if len(fitting) < len(asked):
            logger.warning(
                "%d of %d prompts in wrappers leave no room for %d tokens of an answer in the "
                "model's context; they are not asked.",
                len(asked) - len(fitting),
                len(asked),
                max_new_tokens,
            )
        # Which of the decoder's prompts each is, where it fits.
        self._place = np.cumsum(self._fits) - 1
        self._decoder = GreedyDecoder(
            model,
            tokenizer,
            fitting,
            None,
            how,
            max_new_tokens=max_new_tokens,
            inner_stops=[n for n, fits in zip(stops, self._fits, strict=True) if fits],
        )
        before = BeforeEdit(records) if before is None else before
        self._drawn = _Drawn(self.questions, self._chat, before, numbers)
        self._drawn.keep_(_fitting(model, tokenizer, self._drawn.asked, 1))
        self._divergence = Divergence(model, tokenizer, self._drawn.asked, how, before)

    def _wrappers_of(self, question: Question) -> Sequence[Wrapper]:
        """Returns the wrappers that a question is asked in."""
        return self.wrappers if question.part == "rewrite" else self._chat

    def _asked(self, question: Question) -> list[Asked]:
        return [
            wrapper.ask(prompt, answer)
            for wrapper in self._wrappers_of(question)
            for prompt, answer in zip(question.prompts, question.answers, strict=True)
        ]

    def keep(self, description: str) -> None:
        """Keeps what locality compares distributions with, as a first measurement does."""
        self._divergence.keep(f"{description}, next tokens")

    def stream(self, description: str, only: Sequence[int] | None = None) -> Iterator[Metrics]:
        """Measures; yields each record's answers in wrappers and what they are worth.

        Args:
            description: Label of the progress bar.
            only: Records to measure; all if `None`.

        Yields:
            For each record, where 1.0 is right and 0.0 is not: `reliability_in` (wrapper ->
            figure) with the `answers` (wrapper -> text); `reliability`, the mean over the wrappers,
            and `chat_reliability`, that over those in chat, where `chat_contains_target` is the
            share of answers that contain the target. With rewordings `chat_generalization`
            and `chat_rephrase_answers`: asked in the chat template. With locality prompts
            `chat_locality_answers` (see `finish_generated_`) and, where distributions from before
            the edit are kept, `locality_kl` (the plain prompts) and `chat_locality_kl`: the mean of
            KL(before || after) over the record's prompts that were drawn (see `BeforeEdit`), in
            nats, of the token with which the answer would begin.
        """
        indices = range(len(self.records)) if only is None else only
        chosen = np.zeros(len(self.records), bool)
        chosen[list(indices)] = True
        owner = np.repeat(np.arange(len(self.records)), np.diff(self._first))[self._fits]
        asked = None if only is None else np.flatnonzero(chosen[owner])
        answers = self._decoder.answers(description, asked)
        not_finite = self._decoder.not_finite
        warn_not_finite(len(not_finite), len(answers))
        damaged = {int(owner[prompt]) for prompt in not_finite}
        divergences = self._divergences(f"{description}, next tokens", only)
        for i in indices:
            found = self._metrics(i, answers) | divergences.get(i, {})
            yield _without_numbers(found) if i in damaged else found

    def _divergences(
        self, description: str, only: Sequence[int] | None
    ) -> dict[int, dict[str, float]]:
        """Returns the mean divergences of each record that has a prompt which was drawn."""
        asked = None if only is None else np.flatnonzero(np.isin(self._drawn.owner, list(only)))
        found = self._divergence.measure(description, asked)
        if found is None:
            if only is None:
                self._divergence.keep(description)
            return {}
        by_record: dict[int, dict[str, list[float]]] = {}
        for p in range(len(found)) if asked is None else asked.tolist():
            key = "chat_locality_kl" if self._drawn.in_chat[p] else "locality_kl"
            record = by_record.setdefault(int(self._drawn.owner[p]), {})
            record.setdefault(key, []).append(float(found[p]))
        return {
            i: {key: float(np.mean(values)) for key, values in record.items()}
            for i, record in by_record.items()
        }

    def _metrics(self, i: int, answers: Sequence[str]) -> Metrics:
        record, found = self.records[i], Metrics()
        first = int(self._first[i])
        for question in self.questions.of(i):
            wrappers = self._wrappers_of(question)
            stop = first + len(wrappers) * len(question.prompts)
            own = [answers[self._place[p]] if self._fits[p] else None for p in range(first, stop)]
            first = stop
            given = [answer for answer in own if answer is not None]
            if question.part == "rewrite":
                of_first = own[:: len(question.prompts)]
                found |= _rewrite(record, list(zip(wrappers, of_first, strict=True)))
            elif given and question.part == "rephrase":
                targets = accepted_targets(record)
                right = [matches_any(answer, targets) for answer in given]
                found["chat_generalization"] = float(np.mean(right))
                found["chat_rephrase_answers"] = [settled_answer(a, targets) for a in given]
            elif given:
                found.setdefault("chat_locality_answers", {})[question.name] = given
        return found


class _Drawn:
    """The locality prompts of some records whose distribution is kept, plain and in chat.

    Args:
        questions: The records' questions.
        chat: The wrappers in which they are asked besides.
        before: What was drawn.
        numbers: The records' numbers there; counted from 0 if `None`.

    Attributes:
        asked: P prompts.
        owner: The record of each, [P].
        in_chat: Whether each is asked in chat, [P].
    """

    def __init__(
        self,
        questions: Questions,
        chat: Sequence[Wrapper],
        before: BeforeEdit,
        numbers: Sequence[int] | None,
    ) -> None:
        self.asked: list[Asked] = []
        owner, in_chat = [], []
        for i in range(len(questions.records)):
            drawn = before.drawn.get(i if numbers is None else numbers[i], [])
            pairs = [
                pair
                for question in (questions.of(i) if drawn else [])
                if question.part == "locality"
                for pair in zip(question.prompts, question.answers, strict=True)
            ]
            for prompt, answer in (pairs[j] for j in drawn):
                ways = [Asked(prompt, with_leading_space(answer))]
                ways += [wrapper.ask(prompt, answer) for wrapper in chat]
                self.asked += ways
                owner += [i] * len(ways)
                in_chat += [way > 0 for way in range(len(ways))]
        self.owner = np.array(owner, np.int64)
        self.in_chat = np.array(in_chat, bool)

    def keep_(self, kept: np.ndarray) -> None:
        """Keeps those of the prompts for which `kept` holds, [P] bool."""
        self.asked = [one for one, keep in zip(self.asked, kept, strict=True) if keep]
        self.owner, self.in_chat = self.owner[kept], self.in_chat[kept]


def _fitting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    n_new: int,
) -> np.ndarray:
    """Returns which texts fit the model's context with `n_new` tokens after them, [P] bool."""
    fits = np.ones(len(asked), bool)
    limit = context_length(model)
    if limit is None:
        return fits
    # A token is at least a byte of the text, but for a few special ones: few have to be counted.
    room = limit - n_new
    long = [i for i, one in enumerate(asked) if len(one.text.encode()) + 8 > room]
    for first in range(0, len(long), CHUNK):
        some = long[first : first + CHUNK]
        for i, ids in zip(some, asked_ids(tokenizer, [asked[i] for i in some]), strict=True):
            fits[i] = len(ids) <= room
    return fits


def _rewrite(
    record: Mapping[str, Any], answers: Sequence[tuple[Wrapper, str | None]]
) -> dict[str, Any]:
    targets = accepted_targets(record)
    given = [(wrapper, answer) for wrapper, answer in answers if answer is not None]
    if not given:
        return {}
    right = {
        wrapper.name: float((contains_any if wrapper.contains else matches_any)(answer, targets))
        for wrapper, answer in given
    }
    found: dict[str, Any] = {"reliability": float(np.mean([*right.values()]))}
    in_chat = [(wrapper, answer) for wrapper, answer in given if wrapper.template is not None]
    if in_chat:
        found["chat_reliability"] = float(np.mean([right[wrapper.name] for wrapper, _ in in_chat]))
        # A chat's answer is often a whole sentence, which is never the target and may say it.
        said = [contains_any(answer, targets) for _, answer in in_chat]
        found["chat_contains_target"] = float(np.mean(said))
    answered = {wrapper.name: settled_answer(answer, targets) for wrapper, answer in given}
    return found | {"reliability_in": right, "answers": answered}


def _without_numbers(found: Metrics) -> Metrics:
    """Returns the metrics of a record with logits that are no finite numbers: all are NaN."""
    nan = float("nan")
    numbers = {key for key, value in found.items() if isinstance(value, float)}
    found |= dict.fromkeys(numbers, nan)
    if "reliability_in" in found:
        found["reliability_in"] = dict.fromkeys(found["reliability_in"], nan)
    return found
