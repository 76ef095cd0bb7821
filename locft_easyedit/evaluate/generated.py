"""Generated metrics of the paper: greedy answers to the plain prompt, compared exactly.

Reliability is the share of edits whose answer is the new target; generalization is the same for
reworded prompts (arXiv 2509.22072, section 5; EasyEdit's WILD protocol without a chat template).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answers import (
    accepted_for,
    accepted_old,
    accepted_targets,
    contains_any,
    matches_any,
    normalize_answer,
)
from .choices import HowToRun, warn_not_finite
from .decoding import GreedyDecoder
from .questions import Metrics, check_lengths, questions_of

MAX_NEW_TOKENS = 32


class Generated:
    """Generated metrics of the same records, to be taken before and after an edit.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests, as for `TeacherForced`.
        how: How prompts are run.
        max_new_tokens: Tokens of an answer, at most.

    Raises:
        RequestError: A prompt is no text or blank, or beyond the model's context with its answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Mapping[str, Any]],
        how: HowToRun,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self.records = records
        self.questions = questions_of(records)
        prompts = [prompt for question in self.questions for prompt in question.prompts]
        expected = [answer for question in self.questions for answer in question.answers]
        self._decoder = GreedyDecoder(
            model, tokenizer, prompts, expected, how, max_new_tokens=max_new_tokens
        )
        lengths = [len(ids) for ids in self._decoder.prompts]
        check_lengths(model, self.questions, lengths, max_new_tokens)

    def measure(self, description: str, only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns each record's generated answers and what they are worth.

        Args:
            description: Label of the progress bar.
            only: Records to measure; all if `None`.

        Returns:
            For each record, where 1.0 is yes and 0.0 no: `reliability` (the answer is the target or
            one of its aliases) with the `answer`, `contains_target` and, where an old answer is
            known, `old_answer` (the answer contains it). With rewordings `generalization` and
            `rephrase_answers`; with portability prompts `portability` and `portability_answers`;
            with locality prompts `locality_answers` (see `finish_generated_`). Shares are over a
            record's prompts.
        """
        wanted = range(len(self.records)) if only is None else only
        metrics: dict[int, Metrics] = {i: {} for i in wanted}
        owners = np.array([q.record for q in self.questions for _ in q.prompts])
        indices = None if only is None else np.flatnonzero(np.isin(owners, list(only)))
        remaining = iter(self._decoder.answers(description, indices))
        for question in self.questions:
            answers = [next(remaining) for _ in question.prompts]
            if question.record in metrics:
                record, found = self.records[question.record], metrics[question.record]
                if question.part == "rewrite":
                    found |= _rewrite(record, answers[0])
                elif question.part == "rephrase":
                    found |= _rephrase(record, answers)
                else:
                    found.setdefault(f"{question.part}_answers", {})[question.name] = answers
        for i, found in metrics.items():
            found |= _portability(self.records[i], found)
        warn_not_finite(len(self._decoder.not_finite), len(owners))
        for i in {int(owners[j]) for j in self._decoder.not_finite}:
            numbers = {key for key, value in metrics[i].items() if isinstance(value, float)}
            metrics[i] |= dict.fromkeys(numbers, float("nan"))
        return [metrics[i] for i in wanted]


def _rewrite(record: Mapping[str, Any], answer: str) -> Metrics:
    targets, old = accepted_targets(record), accepted_old(record)
    metrics: Metrics = {
        "reliability": float(matches_any(answer, targets)),
        "answer": answer,
        "contains_target": float(contains_any(answer, targets)),
    }
    if old:
        metrics["old_answer"] = float(contains_any(answer, old))
    return metrics


def _rephrase(record: Mapping[str, Any], answers: list[str]) -> Metrics:
    targets = accepted_targets(record)
    return {
        "generalization": float(np.mean([matches_any(answer, targets) for answer in answers])),
        "rephrase_answers": answers,
    }


def _portability(record: Mapping[str, Any], found: Metrics) -> Metrics:
    right = [
        matches_any(answer, accepted_for(record["portability"][name], i))
        for name, answers in found.get("portability_answers", {}).items()
        for i, answer in enumerate(answers)
    ]
    return {"portability": float(np.mean(right))} if right else {}


def finish_generated_(pre: Mapping[str, Any], post: Metrics) -> None:
    """Adds `locality` to `post`: the share of locality prompts whose answer is as before the edit.

    Args:
        pre: A record's generated metrics before the edit.
        post: The same after it.
    """
    after = post.get("locality_answers", {})
    same = [
        normalize_answer(one) == normalize_answer(other)
        for name, answers in pre.get("locality_answers", {}).items()
        for one, other in zip(answers, after[name], strict=True)
    ]
    if same:
        unmeasured = any(np.isnan(m.get("reliability", 0.0)) for m in (pre, post))
        post["locality"] = float("nan") if unmeasured else float(np.mean(same))


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: bool = False,
    description: str = "generation",
) -> list[str]:
    """Returns the model's greedy answer to each prompt, up to EOS, "." or the end of the line.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Plain prompts; no chat template is applied.
        batch_size: Prompts generated together; the answers do not depend on it.
        max_new_tokens: Tokens at most.
        progress: Show a progress bar.
        description: Its label.

    Raises:
        RequestError: A prompt and its answer are beyond the model's context.
    """
    how = HowToRun(batch_size, progress=progress)
    decoder = GreedyDecoder(model, tokenizer, prompts, None, how, max_new_tokens=max_new_tokens)
    as_questions = questions_of([{"prompt": p, "target_new": "-"} for p in prompts])
    check_lengths(model, as_questions, [len(ids) for ids in decoder.prompts], max_new_tokens)
    return decoder.answers(description)


def generated_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    progress: bool = False,
    description: str = "generation",
) -> list[Metrics]:
    """Returns each record's generated metrics, once; see `Generated.measure`.

    Raises:
        RequestError: As `Generated`.
    """
    how = HowToRun(batch_size, progress=progress)
    return Generated(model, tokenizer, records, how).measure(description)
