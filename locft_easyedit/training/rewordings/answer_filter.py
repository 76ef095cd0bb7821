"""Whether a model takes a rewording for the same question: it must answer both alike.

What is compared is the model before the edit with itself: where a rewording asks for something
else, the next token is another one. No rephrase prompt of the data takes part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.batching import in_batches
from ...data.tokenization import GrowingTexts, unended_ids
from ...hparams import LocFTBFHyperParams
from ...modeling.devices import context_length
from ...modeling.modes import evaluation_mode
from ...prefix.runner import TextRunner
from ...prefix.shortcuts import can_pack

# Nats; mean of both directions of the KL divergence between next-token distributions.
MOST_NATS = 1.0


class AnswerFilter:
    """Compares what a model says next after a prompt and after rewordings of it.

    Args:
        model: The model, before the edit.
        tokenizer: Its tokenizer.
        hparams: `eval_batch_size`, `row_tokens`, `packing`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hparams: LocFTBFHyperParams,
    ) -> None:
        self._model, self._tokenizer, self._hparams = model, tokenizer, hparams
        self._packed: bool | None = None if hparams.packing else False

    def divergences(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Returns how far each rewording's next-token distribution is from its prompt's, in nats.

        The mean of the KL divergence in both directions; infinite where a text has no token, or
        more than the model's context.

        Args:
            groups: Prompts, each with its rewordings.
        """
        wanted = [text for prompt, texts in groups if texts for text in (prompt, *texts)]
        logs = self._log_probabilities(list(dict.fromkeys(wanted)))
        return [
            [_symmetric(logs.get(prompt), logs.get(text)) for text in texts]
            for prompt, texts in groups
        ]

    def _log_probabilities(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns the log-probabilities of the token after each text, [V] float32 on the host."""
        most = context_length(self._model) or math.inf
        growing, usable = GrowingTexts(), []
        for text, ids in zip(texts, unended_ids(self._tokenizer, texts), strict=True):
            if 0 < len(ids) < most:
                # The last token is only a label: which one it is changes nothing.
                growing.add([*ids, ids[-1]], len(ids))
                usable.append(text)
        if not usable:
            return {}
        tokens, h = growing.finished(), self._hparams
        found: dict[str, torch.Tensor] = {}
        with evaluation_mode(self._model), torch.no_grad():
            if self._packed is None:
                self._packed = can_pack(self._model, tokens)
            runner = TextRunner(
                self._model, tokens, row_tokens=h.row_tokens, packed=self._packed, prefix=None
            )

            def run(batch: np.ndarray) -> None:
                logits, _ = runner.logits(batch)  # [B, V]
                logs = logits.float().log_softmax(-1).cpu()
                found.update((usable[i], one) for i, one in zip(batch, logs, strict=True))

            with runner.running():
                in_batches(tokens.lengths, h.eval_batch_size, run, description="judging")
        return found


def _symmetric(own: torch.Tensor | None, other: torch.Tensor | None) -> float:
    """Returns half of KL(own, other) + KL(other, own), in nats."""
    if own is None or other is None:
        return math.inf
    # Tokens that are impossible for both would give 0 * (inf - inf).
    terms = (own.exp() - other.exp()) * (own - other)
    return float(terms.nan_to_num(nan=0.0, posinf=math.inf).sum() / 2)
