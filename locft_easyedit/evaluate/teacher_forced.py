"""EasyEdit's teacher-forced metrics, for many records at once.

The values are those of EasyEdit's `compute_edit_quality`, which runs one record at a time: the
share of a target's tokens that are the model's first choice given the tokens before. How EasyEdit
counts prompt tokens is followed to the letter, with its consequences: tokens equal to the pad
token do not count, and a prompt is tokenized apart from its target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RequestError, one_message
from ..forward import run_rows
from ..modes import evaluation_mode
from ..packing import lay_out, length_sorted_batches
from ..runner import can_pack, context_length, input_device
from ..tokens import TokenizedTexts

Metrics = dict[str, Any]

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


@dataclass(frozen=True)
class _Question:
    """The prompts that EasyEdit scores in one call, with their answers."""

    record: int
    part: str  # rewrite, rephrase, locality, portability
    name: str  # the locality's or portability's name
    prompts: list[str]
    answers: list[str]


def score_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    row_tokens: int = 128,
    packed: bool | None = None,
    progress: bool = False,
    description: str = "evaluation",
) -> list[Metrics]:
    """Returns EasyEdit's metrics of each record, as `compute_edit_quality` gives them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests as `make_requests` returns them: `prompt`, `target_new`, and where given
            `rephrase_prompt`, `locality` and `portability`.
        batch_size: Prompts a forward pass.
        row_tokens: Length of packed rows.
        packed: Whether to pack rows; `None` measures whether this model can be packed.
        progress: Show a progress bar.
        description: Its label.

    Returns:
        For each record `rewrite_acc`, `rephrase_acc` (lists of shares), `locality` (the predicted
        tokens, under `NAME_output`), `portability` (`NAME_acc`) and `metric_meta`.

    Raises:
        RequestError: As for `check_records`.
    """
    questions, texts, first_position = _checked(model, tokenizer, records)
    how = _Batches(texts, first_position, batch_size, row_tokens, packed)
    predicted = _predict(model, how, progress, description)

    metrics: list[Metrics] = [{"locality": {}, "portability": {}} for _ in records]
    i = 0
    for question in questions:
        members = range(i, i + len(question.prompts))
        i = members.stop
        answers = [predicted[j] for j in members]
        if question.part == "locality":
            metrics[question.record]["locality"][f"{question.name}_output"] = answers
            continue
        labels = [_labels(texts, j) for j in members]
        shares = [_share(a, b) for a, b in zip(answers, labels, strict=True)]
        if len(shares) > 1:  # EasyEdit drops answers without a token, unless there is but one
            shares = [share for share in shares if not np.isnan(share)]
        if question.part == "portability":
            metrics[question.record]["portability"][f"{question.name}_acc"] = shares
        else:
            metrics[question.record][f"{question.part}_acc"] = shares
            meta = metrics[question.record].setdefault("metric_meta", {})
            meta[question.part] = {"result_key": f"{question.part}_acc", **_META}
    return metrics


def check_records(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, Any]]
) -> None:
    """Checks that `records` can be evaluated, without running the model.

    Raises:
        RequestError: A prompt or an answer is no text or blank, their numbers differ, or one is
            beyond the model's context. All such problems in one error.
    """
    _checked(model, tokenizer, records)


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


def _questions(index: int, record: Mapping[str, Any]) -> Iterable[_Question]:
    target = record["target_new"]
    yield _question(index, "rewrite", "", record["prompt"], target)
    if record.get("rephrase_prompt") is not None:
        yield _question(index, "rephrase", "", record["rephrase_prompt"], target)
    for part in ("locality", "portability"):
        for name, fields in (record.get(part) or {}).items():
            yield _question(index, part, name, fields["prompt"], fields["ground_truth"])


def _question(index: int, part: str, name: str, prompts: Any, answers: Any) -> _Question:
    prompt_list = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    is_list = isinstance(answers, (list, tuple))
    return _Question(
        index, part, name, prompt_list, list(answers) if is_list else [answers] * len(prompt_list)
    )


def _checked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, Any]]
) -> tuple[list[_Question], TokenizedTexts, np.ndarray]:
    """Returns the questions of all records, their tokens and first positions."""
    questions = [q for i, record in enumerate(records) for q in _questions(i, record)]
    problems = [problem for question in questions for problem in _problems(question)]
    if not problems:
        texts, first_position = _tokenize(tokenizer, questions)
        limit = context_length(model)
        owners = [q for q in questions for _ in q.prompts]
        problems = [
            f"{_where(owner)} has {length} tokens; the model's context is {limit}. Shorten it."
            for owner, length in zip(owners, texts.lengths.tolist(), strict=True)
            if limit is not None and length > limit
        ]
    if problems:
        raise RequestError(one_message("The requests cannot be evaluated:", problems))
    return questions, texts, first_position


def _where(question: _Question) -> str:
    name = f" {question.name!r}" if question.name else ""
    return f"request {question.record}, {question.part}{name}"


def _problems(q: _Question) -> list[str]:
    problems = []
    if len(q.prompts) != len(q.answers):
        problems.append(
            f"{_where(q)}: {len(q.prompts)} prompts, {len(q.answers)} answers. Pair them."
        )
    return problems + [
        f"{_where(q)}: `{text!r}` must be a text that is not blank. Fill it in or drop it."
        for text in (*q.prompts, *q.answers)
        if not isinstance(text, str) or not text.strip()
    ]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[_Question]
) -> tuple[TokenizedTexts, np.ndarray]:
    """Returns all prompts with their answers, and the position of each one's first token."""
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


@dataclass(frozen=True)
class _Batches:
    """How the texts are run."""

    texts: TokenizedTexts
    first_position: np.ndarray
    batch_size: int
    row_tokens: int
    packed: bool | None


@torch.no_grad()
def _predict(
    model: PreTrainedModel, how: _Batches, progress: bool, description: str
) -> list[list[int]]:
    """Returns the model's first choice for each answer token, a list for each text."""
    texts = how.texts
    device = input_device(model)
    ids = torch.from_numpy(texts.ids).to(device)
    predicted: list[list[int]] = [[] for _ in range(len(texts))]
    with evaluation_mode(model):
        packed = can_pack(model, texts) if how.packed is None else how.packed
        with tqdm(total=len(texts), desc=description, unit="prompt", disable=not progress) as bar:
            for batch in length_sorted_batches(texts.lengths, how.batch_size):
                rows = lay_out(
                    texts,
                    batch,
                    row_tokens=how.row_tokens,
                    packed=packed,
                    first_position=how.first_position,
                ).to(device)
                logits = run_rows(model, rows, input_ids=ids[rows.gather_index])
                choices = logits.argmax(-1).tolist()  # [S]
                for owner, choice in zip(rows.owner.tolist(), choices, strict=True):
                    predicted[batch[owner]].append(choice)
                bar.update(len(batch))
    return predicted


def _labels(texts: TokenizedTexts, i: int) -> list[int]:
    start = int(texts.offsets[i] + texts.target_start[i])
    labels: list[int] = texts.ids[start : int(texts.offsets[i + 1])].tolist()
    return labels


def _share(a: Sequence[int], b: Sequence[int]) -> float:
    """Returns the share of equal entries; NaN for none at all, as numpy's mean has it."""
    return float(np.mean(np.equal(a, b))) if len(a) else float("nan")
