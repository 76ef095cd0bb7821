"""Generated metrics of the paper: greedy answers to the plain prompt, compared exactly.

Reliability is the share of edits whose answer is the new target; generalization is the same for
reworded prompts (arXiv 2509.22072, section 5; EasyEdit's WILD protocol without a chat template).
There every answer ends at its first "."; here one that has a target with a "." in it may go on to a
later one, for else it could not be right. Both figures are given where a target has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answers import (
    Verdicts,
    accepted_answers,
    accepted_old,
    accepted_targets,
    contains_any,
    inner_stops,
    matches_any,
    matches_at_first_stop,
    normalize_answer,
    settled_answer,
)
from .greedy_decoder import GreedyDecoder
from .predictions import EvalConfig, Measurement, warn_not_finite
from .prompts import Metrics, Questions, check_lengths

MAX_NEW_TOKENS = 32  # of an answer
_MEASURES = {"rewrite": "reliability", "rephrase": "generalization"}


class Generated(Measurement):
    """Generated metrics of the same records, to be taken before and after an edit.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests, as for `TeacherForced`.
        how: How prompts are run.
        before: Each record's metrics before the edit, where only what counts is wanted: an answer
            that cannot count any more is not generated to its end, and no answers are given.

    Raises:
        RequestError: A prompt is no text or blank, or beyond the model's context with its answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Mapping[str, Any]],
        how: EvalConfig,
        *,
        before: Sequence[Metrics] | None = None,
    ) -> None:
        self.records = records
        self.questions = Questions(records)
        prompts = [prompt for question in self.questions for prompt in question.prompts]
        expected = [answer for question in self.questions for answer in question.answers]
        self._verdicts = None if before is None else Verdicts(self.questions, records, before)
        self._decoder = GreedyDecoder(
            model,
            tokenizer,
            prompts,
            expected if self._verdicts is None else self._verdicts.drafts,
            how,
            max_new_tokens=MAX_NEW_TOKENS,
            still_open=None if self._verdicts is None else self._verdicts.open,
            inner_stops=[
                inner_stops(texts)
                for i, record in enumerate(records)
                for question in self.questions.of(i)
                for texts in accepted_answers(question, record)
            ],
        )
        self._dotted = any(inner_stops(accepted_targets(record)) for record in records)
        check_lengths(model, self.questions, self._decoder.prompt_lengths, MAX_NEW_TOKENS)

    def stream(self, description: str, only: Sequence[int] | None = None) -> Iterator[Metrics]:
        """Measures; yields each record's generated answers and what they are worth.

        Yields:
            For each record, where 1.0 is yes and 0.0 no: `reliability` (the answer is the target or
            one of its aliases) with the `answer`, `contains_target` and, where an old answer is
            known, `old_answer` (the answer contains it). With rewordings `generalization` and
            `rephrase_answers`; with portability prompts `portability` and `portability_answers`;
            with locality prompts `locality_answers` (see `finish_generated_`). Shares are over a
            record's prompts. Where any record's target has a "." in it, all have
            `reliability_at_first_stop` and `generalization_at_first_stop`, as the paper counts.
        """
        asked = None if only is None else self.questions.prompts_of(only)
        answers = self._decoder.answers(description, asked)
        not_finite = self._decoder.not_finite
        warn_not_finite(len(not_finite), len(answers))
        damaged = {self.questions.record_of(prompt) for prompt in not_finite}
        for i in range(len(self.records)) if only is None else only:
            found = self._metrics(i, answers)
            if i in damaged:
                numbers = {key for key, value in found.items() if isinstance(value, float)}
                found |= dict.fromkeys(numbers, float("nan"))
            yield found

    def _metrics(self, i: int, answers: Sequence[str]) -> Metrics:
        found, in_portability = Metrics(), []
        first = int(self.questions.first_prompt[i])
        for question in self.questions.of(i):
            own = list(answers[first : first + len(question.prompts)])
            first += len(own)
            if question.part == "locality":
                found.setdefault("locality_answers", {})[question.name] = own
                continue
            accepted = accepted_answers(question, self.records[i])
            right = [matches_any(a, texts) for a, texts in zip(own, accepted, strict=True)]
            if self._dotted and question.part in _MEASURES:
                plain = [matches_at_first_stop(a, t) for a, t in zip(own, accepted, strict=True)]
                found[f"{_MEASURES[question.part]}_at_first_stop"] = float(np.mean(plain))
            settled = [settled_answer(a, texts) for a, texts in zip(own, accepted, strict=True)]
            if question.part == "rewrite":
                found |= {
                    "reliability": float(right[0]),
                    "answer": settled[0],
                    "contains_target": float(contains_any(own[0], accepted[0])),
                }
                if old := accepted_old(self.records[i]):
                    found["old_answer"] = float(contains_any(own[0], old))
            elif question.part == "rephrase":
                found |= {"generalization": float(np.mean(right)), "rephrase_answers": settled}
            else:
                found.setdefault("portability_answers", {})[question.name] = settled
                in_portability += right
        if in_portability:
            found["portability"] = float(np.mean(in_portability))
        if self._verdicts is not None:  # these would need answers that are complete
            for key in ("answer", "contains_target", "old_answer", "rephrase_answers"):
                found.pop(key, None)
        return found


def finish_generated_(pre: Mapping[str, Any], post: Metrics, prefix: str = "") -> None:
    """Adds `locality` to `post`: the share of locality prompts whose answer is as before the edit.

    Args:
        pre: A record's generated metrics before the edit.
        post: The same after it.
        prefix: What the keys of the answers and of the share begin with.

    Raises:
        KeyError: `post` was not measured on a locality of `pre`.
        ValueError: The two were not measured on the same prompts.
    """
    after = post.get(f"{prefix}locality_answers", {})
    same = [
        normalize_answer(one) == normalize_answer(other)
        for name, answers in pre.get(f"{prefix}locality_answers", {}).items()
        for one, other in zip(answers, after[name], strict=True)
    ]
    if same:
        unmeasured = any(np.isnan(m.get("reliability", 0.0)) for m in (pre, post))
        post[f"{prefix}locality"] = float("nan") if unmeasured else float(np.mean(same))
