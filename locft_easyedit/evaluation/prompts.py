"""The questions that EasyEdit's evaluation asks of a record, checked and tokenized."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..errors import RequestError, one_message
from ..modeling.devices import context_length
from ..utils.parsing import encodable, shown

Metrics = dict[str, Any]
PARTS = ("rewrite", "rephrase", "locality", "portability")


@dataclass(frozen=True, slots=True)
class Question:
    """The prompts that EasyEdit scores in one call, with their answers.

    Attributes:
        record: Index of the record.
        part: `rewrite`, `rephrase`, `locality` or `portability`.
        name: The locality's or portability's name; empty for the other parts.
        prompts: One or more prompts.
        answers: The answer to each.
    """

    record: int
    part: str
    name: str
    prompts: list[str]
    answers: list[str]

    @property
    def where(self) -> str:
        """The question's place, for a message."""
        name = f" {shown(self.name)}" if self.name else ""
        return f"request {self.record}, {self.part}{name}"


class Questions:
    """The questions of all records, record after record; made from them whenever they are wanted.

    Args:
        records: The records.
        parts: The parts of a record that are asked about.

    Attributes:
        first_prompt: Number of each record's first prompt among all prompts, [N + 1].

    Raises:
        RequestError: A prompt or an answer is no text or blank, or their numbers differ. All such
            problems in one error.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], parts: Sequence[str] = PARTS) -> None:
        self.records = records
        self.parts = parts
        first_prompt, problems = array("q", [0]), []
        for i, record in enumerate(records):
            if shape := _shape_problems(i, record):
                problems += shape
                continue
            questions = list(_questions(i, record))
            problems += [problem for question in questions for problem in _problems(question)]
            n_prompts = sum(len(q.prompts) for q in questions if q.part in parts)
            first_prompt.append(first_prompt[-1] + n_prompts)
        if problems:
            raise RequestError(one_message("The requests cannot be evaluated:", problems))
        self.first_prompt = np.frombuffer(first_prompt, np.int64)

    def __iter__(self) -> Iterator[Question]:
        for i in range(len(self.records)):
            yield from self.of(i)

    def of(self, record: int) -> list[Question]:
        """Returns the questions of one record."""
        return [q for q in _questions(record, self.records[record]) if q.part in self.parts]

    def record_of(self, prompt: int) -> int:
        """Returns the record that a prompt belongs to."""
        return int(np.searchsorted(self.first_prompt, prompt, side="right")) - 1

    def prompts_of(self, records: Sequence[int]) -> np.ndarray:
        """Returns the numbers of all prompts of some records, in order, each once."""
        chosen = np.zeros(len(self.records), bool)
        chosen[list(records)] = True
        return np.flatnonzero(np.repeat(chosen, np.diff(self.first_prompt)))


def check_lengths(
    model: PreTrainedModel, questions: Iterable[Question], lengths: np.ndarray, n_new: int = 0
) -> None:
    """Checks that every prompt fits the model's context.

    Args:
        model: The model.
        questions: The questions.
        lengths: Tokens of each prompt of each question, in order, [P].
        n_new: Tokens that are generated after it.

    Raises:
        RequestError: One does not.
    """
    limit = context_length(model)
    if limit is None or not (lengths + n_new > limit).any():
        return
    owners = [question for question in questions for _ in question.prompts]
    answer = f" and {n_new} for the answer" if n_new else ""
    problems = [
        f"{owner.where} has {length} tokens{answer}; the model's context is {limit}. Shorten it."
        for owner, length in zip(owners, lengths.tolist(), strict=True)
        if length + n_new > limit
    ]
    raise RequestError(one_message("The requests cannot be evaluated:", problems))


def _shape_problems(index: int, record: Any) -> list[str]:
    """Returns what keeps the questions of a record from being found at all."""
    if not isinstance(record, Mapping):
        return [f"request {index} is a {type(record).__name__}, not a dictionary."]
    where = f"request {index}"
    problems = [
        f"{where} has no `{k}`. Add it." for k in ("prompt", "target_new") if k not in record
    ]
    for part in ("locality", "portability"):
        entries = record.get(part) or {}
        if not isinstance(entries, Mapping):
            problems.append(f"{where}: `{part}` is a {type(entries).__name__}, not a dictionary.")
            continue
        problems += [
            f"{where}, {part} {shown(name)} needs `prompt` and `ground_truth`. Add them."
            for name, fields in entries.items()
            if not isinstance(fields, Mapping) or not {"prompt", "ground_truth"} <= set(fields)
        ]
    return problems


def _questions(index: int, record: Mapping[str, Any]) -> Iterable[Question]:
    target = record["target_new"]
    yield _question(index, "rewrite", "", record["prompt"], target)
    if record.get("rephrase_prompt") is not None:
        yield _question(index, "rephrase", "", record["rephrase_prompt"], target)
    for part in ("locality", "portability"):
        for name, fields in (record.get(part) or {}).items():
            yield _question(index, part, name, fields["prompt"], fields["ground_truth"])


def _question(index: int, part: str, name: str, prompts: Any, answers: Any) -> Question:
    prompt_list = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    is_list = isinstance(answers, (list, tuple))
    return Question(
        index, part, name, prompt_list, list(answers) if is_list else [answers] * len(prompt_list)
    )


def _problems(question: Question) -> list[str]:
    problems = []
    if len(question.prompts) != len(question.answers):
        problems.append(
            f"{question.where}: {len(question.prompts)} prompts, {len(question.answers)} answers. "
            "Pair them."
        )
    return problems + [
        f"{question.where}: `{shown(text)}` must be a text that is not blank and holds no lone "
        "surrogate. Fill it in or drop it."
        for text in (*question.prompts, *question.answers)
        if not isinstance(text, str) or not text.strip() or not encodable(text)
    ]
