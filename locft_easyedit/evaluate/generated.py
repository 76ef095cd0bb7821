"""Generated metrics of the paper: greedy answers to the plain prompt, compared exactly.

Reliability is the share of edits whose answer is the new target; generalization is the same for
reworded prompts (arXiv 2509.22072, section 5; EasyEdit's protocol without a chat template).
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import RequestError
from ..modes import evaluation_mode
from ..packing import length_sorted_batches
from ..runner import context_length, input_device

MAX_NEW_TOKENS = 32
_STOPS = (".", "\n")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Returns `text` in lower case, without punctuation, articles and repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, target: str) -> bool:
    """Returns whether two answers are the same after normalisation."""
    return normalize_answer(answer) == normalize_answer(target)


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
        batch_size: Prompts generated together.
        max_new_tokens: Tokens at most.
        progress: Show a progress bar.
        description: Its label.

    Raises:
        RequestError: A prompt and its answer are beyond the model's context.
    """
    if not prompts:
        return []
    sequences = tokenizer(list(prompts), padding=False, truncation=False)["input_ids"]
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    limit = context_length(model)
    if limit is not None and lengths.max() + max_new_tokens > limit:
        i = int(lengths.argmax())
        raise RequestError(
            f"prompt {i} ({prompts[i][:60]!r}) has {lengths[i]} tokens, and with {max_new_tokens} "
            f"for the answer is beyond the model's context of {limit}. Shorten it."
        )
    ends = _end_tokens(model, tokenizer)
    stops = StoppingCriteriaList([_AtToken(_stop_table(tokenizer, model))])
    device = input_device(model)
    answers = [""] * len(sequences)
    generate: Any = model.generate  # typed as returning several kinds of object
    with (
        _plain_greedy(model, ends, max_new_tokens),
        tqdm(total=len(sequences), desc=description, unit="prompt", disable=not progress) as bar,
    ):
        for batch in length_sorted_batches(lengths, batch_size):
            width = int(lengths[batch].max())
            # Any token fills the left side: the mask hides it.
            ids = torch.full((len(batch), width), ends[0] if ends else 0)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, width - lengths[i] :] = torch.tensor(sequences[i])
                mask[row, width - lengths[i] :] = 1
            output = generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), stopping_criteria=stops
            )
            for i, row_ids in zip(batch, output[:, width:].tolist(), strict=True):
                answers[i] = _answer(tokenizer, row_ids, ends)
            bar.update(len(batch))
    return answers


def generated_metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    progress: bool = False,
    description: str = "generation",
) -> list[dict[str, Any]]:
    """Returns each record's generated answers and whether they are the new target.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests; a `rephrase_prompt` may be a text or a list of texts.
        batch_size: Prompts generated together.
        progress: Show a progress bar.
        description: Its label.

    Returns:
        For each record `reliability` (0.0 or 1.0) and `answer`; with a rephrase prompt also
        `generalization` (the share of its rewordings) and `rephrase_answers`.
    """
    rephrases = [_as_list(record.get("rephrase_prompt")) for record in records]
    prompts = [record["prompt"] for record in records] + [p for ps in rephrases for p in ps]
    answers = generate_answers(
        model,
        tokenizer,
        prompts,
        batch_size=batch_size,
        progress=progress,
        description=description,
    )
    remaining = iter(answers[len(records) :])
    metrics: list[dict[str, Any]] = []
    for record, answer, reworded in zip(records, answers, rephrases, strict=False):
        target = record["target_new"]
        entry: dict[str, Any] = {
            "reliability": float(exact_match(answer, target)),
            "answer": answer,
        }
        if reworded:
            found = [next(remaining) for _ in reworded]
            entry["generalization"] = float(np.mean([exact_match(a, target) for a in found]))
            entry["rephrase_answers"] = found
        metrics.append(entry)
    return metrics


class _AtToken(StoppingCriteria):
    """Stops a sequence after a token that completes the answer."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table  # [V] bool

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.table = self.table.to(input_ids.device)
        return self.table[input_ids[:, -1]]


def _stop_table(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> torch.Tensor:
    """Returns for each token of the vocabulary whether its text holds a stop, [V] bool."""
    n_outputs = model.get_output_embeddings().weight.shape[0]
    table = torch.zeros(max(n_outputs, len(tokenizer)), dtype=torch.bool)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    for i, text in enumerate(texts):
        table[i] = any(stop in text for stop in _STOPS)
    return table


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokenizer's EOS and those that the model's own generation settings name."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *more) if i is not None))


@contextmanager
def _plain_greedy(model: PreTrainedModel, ends: list[int], max_new_tokens: int) -> Iterator[None]:
    """Within, `model.generate` is greedy: models bring sampling and penalties of their own."""
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            bos_token_id=own.bos_token_id,
        )
        with evaluation_mode(model):
            yield
    finally:
        model.generation_config = own


def _answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: list[int]) -> str:
    """Returns the text of the generated ids up to the first stop."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    cut = min((text.find(stop) for stop in _STOPS if stop in text), default=len(text))
    return text[:cut].strip()


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
