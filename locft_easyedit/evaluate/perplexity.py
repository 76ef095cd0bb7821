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

from ..batches import in_batches
from ..devices import input_device
from ..modes import evaluation_mode
from ..runner import TextRunner
from ..shortcuts import can_pack
from ..tokens import TokenizedTexts
from .choices import HowToRun
from .questions import Metrics, Question, Questions

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
        how: HowToRun,
        *,
        metric: str = "ppl",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.how = how
        self.metric = metric
        self.n_records = len(records)
        self.questions = list(Questions(records, ("rewrite", "rephrase")))

    @torch.no_grad()
    def measure(self, description: str, only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns for each record `rewrite_ppl` and `rephrase_ppl`, or `ood_acc`; `metric_meta`.

        Args:
            description: Label of the progress bar.
            only: Records to measure; all if `None`.
        """
        wanted = range(self.n_records) if only is None else only
        metrics: dict[int, Metrics] = {i: {"metric_meta": {}} for i in wanted}
        questions = [q for q in self.questions if q.record in metrics]
        single = [q for q in questions if len(q.prompts) == 1]
        with evaluation_mode(self.model):
            progress = self.how.progress and only is None
            batched = self._batched(single, description, progress)
            values = dict(zip(map(id, single), batched, strict=True))
            for question in questions:
                # A list of prompts is one padded batch there, in which pads are attended to.
                value = values[id(question)] if id(question) in values else self._padded(question)
                key = f"{question.part}_ppl" if self.metric == "ppl" else "ood_acc"
                entry = metrics[question.record]
                entry[key] = value
                entry["metric_meta"][question.part] = {"result_key": key, **_META[self.metric]}
        return [metrics[i] for i in wanted]

    def _texts(self, question: Question) -> list[str]:
        if self.metric == "ood_ppl":
            return list(question.prompts)
        return [f"{p} {a}" for p, a in zip(question.prompts, question.answers, strict=True)]

    def _batched(
        self, questions: Sequence[Question], description: str, progress: bool
    ) -> list[float]:
        """Returns the values of questions with one prompt."""
        if not questions:
            return []
        pad = self.tokenizer.pad_token_id
        sequences = self.tokenizer([self._texts(q)[0] for q in questions], truncation=True)
        ids = [s[:_LONGEST] for s in sequences["input_ids"]]
        prompts = self.tokenizer([q.prompts[0] for q in questions], truncation=True)["input_ids"]
        # The first token of all has no predecessor that could predict it.
        starts = [
            1 if self.metric == "ood_ppl" else min(max(1, len(p) - p.count(pad)), len(s))
            for p, s in zip(prompts, ids, strict=True)
        ]
        texts = TokenizedTexts.from_lists(ids, starts)
        losses = self._token_losses(texts, description, progress)
        values = []
        for i, nll in enumerate(losses):
            counts = texts.ids[texts.offsets[i] + starts[i] : texts.offsets[i + 1]] != pad
            values.append(_value(self.metric, nll, counts))
        return values

    def _token_losses(
        self, texts: TokenizedTexts, description: str, progress: bool
    ) -> list[np.ndarray]:
        """Returns the negative log-likelihood of each predicted token, an array for each text."""
        packed = can_pack(self.model, texts) if self.how.packed is None else self.how.packed
        runner = TextRunner(
            self.model, texts, row_tokens=self.how.row_tokens, packed=packed, prefix=None
        )
        losses = [np.zeros(0)] * len(texts)

        def run(batch: np.ndarray) -> None:
            logits, rows = runner.logits(batch)
            labels = runner.ids[rows.label_index].to(logits.device)
            nll = F.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy()  # [S]
            owner = rows.owner.cpu().numpy()
            for member, text in enumerate(batch):
                losses[text] = nll[owner == member]

        in_batches(
            texts.lengths,
            self.how.batch_size,
            run,
            description=description,
            progress=progress,
        )
        return losses

    def _padded(self, question: Question) -> float:
        """Returns the value of several prompts, from the very pass that EasyEdit makes."""
        pad = self.tokenizer.pad_token_id
        batch = self.tokenizer(
            self._texts(question), return_tensors="pt", padding=True, truncation=True
        )
        ids = batch["input_ids"][:, :_LONGEST]
        counts = ids != pad
        if self.metric == "ppl":
            for row, prompt in enumerate(
                self.tokenizer(question.prompts, truncation=True)["input_ids"]
            ):
                counts[row, : len(prompt) - prompt.count(pad)] = False
        logits = self.model(input_ids=ids.to(input_device(self.model))).logits.float().cpu()
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return _value(self.metric, nll.numpy(), counts[:, 1:].flatten().numpy())


def _value(metric: str, nll: np.ndarray, counts: np.ndarray) -> float:
    """Returns the metric of tokens with these negative log-likelihoods; some do not count."""
    if metric == "ppl":
        return float(np.exp(np.float32(nll[counts].mean()))) if counts.any() else float("nan")
    # Tokens that do not count have a loss of 0 there, and so count as sure.
    return float(np.mean(np.where(counts, nll, 0.0) < -math.log(_SURE)))
