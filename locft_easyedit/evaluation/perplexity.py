"""EasyEdit's perplexities, for many records at once: its `eval_metric` values `ppl` and `ood_ppl`.

`ppl` is the perplexity of the target after the prompt; `ood_ppl` gives the share of the prompt's
own tokens that the model predicts with a probability above 0.8. How EasyEdit masks is followed to
the letter: the first tokens, as many as the prompt has that are not the pad token, and every pad
token do not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import in_batches
from ..data.tokenization import TokenizedTexts
from ..modeling.modes import evaluation_mode
from ..prefix.frozen_prefix import FrozenPrefix, Layout
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import can_pack
from .predictions import EvalConfig
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


class Perplexity:
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
        self.model = model
        self.tokenizer = tokenizer
        self.how = how
        self.metric = metric
        self.n_records = len(records)
        self.questions = list(Questions(records, ("rewrite", "rephrase")))
        self._counts: list[np.ndarray] = []  # which predicted tokens count, an array for each text
        self._ends = np.cumsum([0, *(len(q.prompts) for q in self.questions)])
        self.texts = self._tokenize()
        self._prefix: FrozenPrefix | None = None
        if how.stream is not None and how.frozen is not None and len(self.texts):
            n_tokens = int(self.texts.input_offsets[-1])
            self._prefix = FrozenPrefix(model, how.frozen, n_tokens, how.budget)
            layout = Layout(self.texts, how.row_tokens, self._packed())
            how.stream.record(self._prefix, layout)

    @torch.no_grad()
    def measure(self, description: str, only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns for each record `rewrite_ppl` and `rephrase_ppl`, or `ood_acc`; `metric_meta`.

        Args:
            description: Label of the progress bar.
            only: Records to measure; all if `None`.
        """
        wanted = range(self.n_records) if only is None else only
        metrics: dict[int, Metrics] = {i: {"metric_meta": {}} for i in wanted}
        asked = [i for i, question in enumerate(self.questions) if question.record in metrics]
        members = {i: range(self._ends[i], self._ends[i + 1]) for i in asked}
        texts = np.array([j for i in asked for j in members[i]], np.int64)
        with evaluation_mode(self.model):
            progress = self.how.progress and only is None
            losses = self._token_losses(texts, description, progress)
        for i in asked:
            question, entry = self.questions[i], metrics[self.questions[i].record]
            nll = np.concatenate([losses[j] for j in members[i]])
            counts = np.concatenate([self._counts[j] for j in members[i]])
            key = f"{question.part}_ppl" if self.metric == "ppl" else "ood_acc"
            entry[key] = _value(self.metric, nll, counts)
            entry["metric_meta"][question.part] = {"result_key": key, **_META[self.metric]}
        return [metrics[i] for i in wanted]

    def _tokenize(self) -> TokenizedTexts:
        """Returns the texts of all questions, and notes which of their tokens count."""
        single = [q for q in self.questions if len(q.prompts) == 1]
        known = {
            id(question): ([text], [prompt])
            for question, text, prompt in zip(
                single,
                self._ids([self._whole(q)[0] for q in single]),
                self._ids([q.prompts[0] for q in single]),
                strict=True,
            )
        }
        pad, sequences, starts = self.tokenizer.pad_token_id, [], []
        for question in self.questions:
            # A list of prompts is one padded batch there, in which pads are attended to: texts
            # that begin (or end) with pad tokens.
            several = len(question.prompts) > 1
            rows, prompts = (
                (self._ids(self._whole(question), padding=True), self._ids(question.prompts))
                if several
                else known[id(question)]
            )
            for ids, prompt in zip(rows, prompts, strict=True):
                ids = ids[:_LONGEST]
                n_left_out = 0 if self.metric == "ood_ppl" else len(prompt) - prompt.count(pad)
                # The first token of all has no predecessor that could predict it.
                start = min(1 if several else max(1, n_left_out), len(ids))
                sequences.append(ids)
                starts.append(start)
                counts = np.array(ids[start:], np.int64) != pad
                self._counts.append(counts & (np.arange(start, len(ids)) >= n_left_out))
        return TokenizedTexts.from_lists(sequences, starts)

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), truncation=True, **options)["input_ids"]
        return ids

    def _whole(self, question: Question) -> list[str]:
        if self.metric == "ood_ppl":
            return list(question.prompts)
        return [f"{p} {a}" for p, a in zip(question.prompts, question.answers, strict=True)]

    def _packed(self) -> bool:
        if self.how.packed is not None:
            return self.how.packed
        return bool(len(self.texts)) and can_pack(self.model, self.texts)

    def _token_losses(
        self, texts: np.ndarray, description: str, progress: bool
    ) -> dict[int, np.ndarray]:
        """Returns the negative log-likelihood of each predicted token of the texts, by text."""
        losses: dict[int, np.ndarray] = {}
        if not len(texts):
            return losses
        runner = TextRunner(
            self.model,
            self.texts,
            row_tokens=self.how.row_tokens,
            packed=self._packed(),
            prefix=self._prefix,
        )

        def run(batch: np.ndarray) -> None:
            logits, rows = runner.logits(texts[batch])
            labels = runner.ids[rows.label_index].to(logits.device)
            nll = F.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy()  # [S]
            owner = rows.owner.cpu().numpy()
            for member, text in enumerate(texts[batch]):
                losses[int(text)] = nll[owner == member]

        with runner.running():
            in_batches(
                self.texts.lengths[texts],
                self.how.batch_size,
                run,
                description=description,
                progress=progress,
            )
        return losses


def _value(metric: str, nll: np.ndarray, counts: np.ndarray) -> float:
    """Returns the metric of tokens with these negative log-likelihoods; some do not count."""
    if metric == "ppl":
        return float(np.exp(np.float32(nll[counts].mean()))) if counts.any() else float("nan")
    # Tokens that do not count have a loss of 0 there, and so count as sure.
    return float(np.mean(np.where(counts, nll, 0.0) < -math.log(_SURE)))
