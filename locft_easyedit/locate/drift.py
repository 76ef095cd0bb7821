"""How far an edit moves the model on text that has nothing to do with it."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from ..modes import evaluation_mode
from ..runner import TextRunner
from ..tokens import TokenizedTexts

_AT_ONCE = 8  # passages a forward pass


class Drift:
    """The model's next-token distributions on a text, before an edit and after it.

    They are recorded when this is made: 4 bytes a token of the text and of the vocabulary, on the
    host.

    Args:
        model: The model, not edited yet.
        texts: The text; every token from `target_start` on is predicted.
        packed: Whether rows are packed.
        row_tokens: Length of packed rows.
    """

    def __init__(
        self, model: PreTrainedModel, texts: TokenizedTexts, *, packed: bool, row_tokens: int = 64
    ) -> None:
        self._runner = TextRunner(model, texts, row_tokens=row_tokens, packed=packed, prefix=None)
        self._before = [log_p.cpu() for log_p in self._distributions()]

    def measure(self) -> float:
        """Returns the mean KL divergence of the distributions now from those before, in nats.

        NaN if the model's logits are no finite numbers.
        """
        total, n_tokens = 0.0, 0
        for before, after in zip(self._before, self._distributions(), strict=True):
            before = before.to(after.device)
            total += float((before.exp() * (before - after)).sum(dtype=torch.float64))
            n_tokens += len(before)
        return max(total / n_tokens, 0.0) if np.isfinite(total) else float("nan")

    @torch.no_grad()
    def _distributions(self) -> list[torch.Tensor]:
        """Returns log probabilities at the predicted tokens, [S, V] float32 a batch."""
        found = []
        with evaluation_mode(self._runner.model), self._runner.ready():
            for start in range(0, len(self._runner.texts), _AT_ONCE):
                batch = np.arange(start, min(start + _AT_ONCE, len(self._runner.texts)))
                logits, _ = self._runner.logits(batch)
                found.append(torch.log_softmax(logits.float(), dim=-1))
        return found
