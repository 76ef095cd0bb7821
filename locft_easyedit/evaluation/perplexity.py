"""EasyEdit's perplexities, for many records at once: its `eval_metric` values `ppl` and `ood_ppl`.

`ppl` is the perplexity of the target after the prompt; `ood_ppl` gives the share of the prompt's
own tokens that the model predicts with a probability above 0.8. How EasyEdit masks is followed to
the letter: the first tokens, as many as the prompt has that are not the pad token, and every pad
token do not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.packing import Rows
from ..data.tokenization import GrowingTexts, TokenizedTexts
from .predictions import EvalConfig, Measurement, TextPasses
from .prompts import Metrics, Question, Questions

PERPLEXITIES = ("ppl", "ood_ppl")
_LONGEST = 1024  # EasyEdit cuts texts there
_SURE = 0.8
_META = {
    "ppl": {
        "protocol": "teacher_forcing_ppl",
        "scorer": "perplexity",
        "comparable_group": "lm.teacher_forcing.perplexity",
    },
    "ood_ppl": {
        "protocol": "ood_ppl_threshold",
        "scorer": "thresholded_token_ratio",
        "comparable_group": "lm.ood_ppl.thresholded_token_ratio",
    },
}


class Perplexity(Measurement):
    """Perplexities of the same records, to be taken before and after an edit.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        records: Requests, as for `TeacherForced`.
        how: How prompts are run.
        metric: `ppl` or `ood_ppl`.

    Raises:
        RequestError: A prompt or an answer is no text or blank, or their numbers differ.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Mapping[str, Any]],
        how: EvalConfig,
        *,
        metric: str = "ppl",
    ) -> None:
        self.tokenizer = tokenizer
        self.metric = metric
        self.n_records = len(records)
        self.questions = list(Questions(records, ("rewrite", "rephrase")))
        self._counts: list[np.ndarray] = []  # which predicted tokens count, an array for each text
        self._ends = np.cumsum([0, *(len(q.prompts) for q in self.questions)])
        if how.stream is None:
            how = replace(how, frozen=None)  # all layers run, and no states are kept
        self._passes = TextPasses(model, self._tokenize(), replace(how, tail=None))

    def stream(self, description: str, only: Sequence[int] | None = None) -> Iterator[Metrics]:
        """Measures; yields for each record `rewrite_ppl` and `rephrase_ppl`, or `ood_acc`.

        `metric_meta` is there as well.
        """
        wanted = range(self.n_records) if only is None else only
        metrics: dict[int, Metrics] = {i: {"metric_meta": {}} for i in wanted}
        asked = [i for i, question in enumerate(self.questions) if question.record in metrics]
        members = {i: range(self._ends[i], self._ends[i + 1]) for i in asked}
        texts = None if only is None else np.array([j for i in asked for j in members[i]], np.int64)
        losses = self._token_losses(description, texts)
        for i in asked:
            question, entry = self.questions[i], metrics[self.questions[i].record]
            nll = np.concatenate([losses[j] for j in members[i]])
            counts = np.concatenate([self._counts[j] for j in members[i]])
            key = f"{question.part}_ppl" if self.metric == "ppl" else "ood_acc"
            entry[key] = _value(self.metric, nll, counts)
            entry["metric_meta"][question.part] = {"result_key": key, **_META[self.metric]}
        yield from (metrics[i] for i in wanted)

    def _tokenize(self) -> TokenizedTexts:
        """Returns the texts of all questions, and notes which of their tokens count."""
        all_rows = iter(self._ids([text for q in self.questions for text in self._whole(q)]))
        all_prompts = iter(self._ids([prompt for q in self.questions for prompt in q.prompts]))
        pad, texts = self.tokenizer.pad_token_id, GrowingTexts()
        for question in self.questions:
            rows = list(itertools.islice(all_rows, len(question.prompts)))
            several = len(question.prompts) > 1
            if several:
                # A list of prompts is one padded batch there, in which pads are attended to: texts
                # that begin (or end) with pad tokens.
                rows = self._ids(self._whole(question), padding=True)
            for ids in rows:
                prompt = next(all_prompts)
                ids = ids[:_LONGEST]
                n_left_out = 0 if self.metric == "ood_ppl" else len(prompt) - prompt.count(pad)
                # The first token of all has no predecessor that could predict it.
                start = min(1 if several else max(1, n_left_out), len(ids))
                texts.add(ids, start)
                counts = np.array(ids[start:], np.int64) != pad
                self._counts.append(counts & (np.arange(start, len(ids)) >= n_left_out))
        return texts.finished()

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, **options)["input_ids"]

    def _whole(self, question: Question) -> list[str]:
        if self.metric == "ood_ppl":
            return list(question.prompts)
        return [f"{p} {a}" for p, a in zip(question.prompts, question.answers, strict=True)]

    def _token_losses(self, description: str, only: np.ndarray | None) -> dict[int, np.ndarray]:
        """Returns the negative log-likelihood of each predicted token of the texts, by text."""
        losses: dict[int, np.ndarray] = {}
        ids = torch.from_numpy(self._passes.texts.ids)

        def note(logits: torch.Tensor, rows: Rows, texts: np.ndarray) -> None:
            labels = ids[rows.label_index.cpu()].to(logits.device)
            nll = F.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy()  # [S]
            owner = rows.owner.cpu().numpy()
            for member, text in enumerate(texts):
                losses[int(text)] = nll[owner == member]

        self._passes.run(note, description, only)
        return losses


def _value(metric: str, nll: np.ndarray, counts: np.ndarray) -> float:
    """Returns the metric of tokens with these negative log-likelihoods; some do not count."""
    if metric == "ppl":
        return float(np.exp(np.float32(nll[counts].mean()))) if counts.any() else float("nan")
    # Tokens that do not count have a loss of 0 there, and so count as sure.
    return float(np.mean(np.where(counts, nll, 0.0) < -math.log(_SURE)))
