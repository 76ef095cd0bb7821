"""One number for a place: whether edits are learned, generalize, and leave the rest alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.tokenization import TokenizedTexts
from ..errors import DataError
from ..modeling.modes import evaluation_mode
from ..prefix.runner import TextRunner
from ..utils.parsing import text_of

# Less than a few edits can tell from nothing; of places that all fail in one respect, the others
# still decide.
_FLOOR = 0.01

_MOST_BYTES = 2**26
_WORDS = 1500  # of the text that are used: its distributions stay in memory
_WORDS_A_PASSAGE = 150

_AT_ONCE = 8  # passages a forward pass


def score(reliability: float, reworded: float, drift: float) -> float:
    """Returns the harmonic mean of reliability, generalization and stability, 0 to 1.

    As the "score" of Meng et al. ("Locating and Editing Factual Associations in GPT", NeurIPS
    2022) it is low if any of the three is. Stability is exp(-drift). A part counts as 0.01 at
    least; what is no finite number makes the score 0.

    Args:
        reliability: Share of the edits that are learned.
        reworded: Share of the edits' rewordings that are answered with the target.
        drift: KL divergence of the next-token distribution on unrelated text, in nats a token.
    """
    if not all(math.isfinite(part) for part in (reliability, reworded, drift)) or drift < 0:
        return 0.0
    parts = (reliability, reworded, math.exp(-drift))
    return len(parts) / sum(1 / max(part, _FLOOR) for part in parts)


def read_passages(path: str | Path) -> list[str]:
    """Returns the beginning of a text file, in passages of at most 150 words.

    Args:
        path: Plain text in UTF-8; blank lines divide passages. The first 1,500 words count.

    Raises:
        DataError: The file is missing, no UTF-8 text, or holds no words.
    """
    words_left, passages = _WORDS, []
    for block in text_of(Path(path), DataError, most=_MOST_BYTES).split("\n\n"):
        words = block.split()[:words_left]
        words_left -= len(words)
        for start in range(0, len(words), _WORDS_A_PASSAGE):
            passages.append(" ".join(words[start : start + _WORDS_A_PASSAGE]))
    if not passages:
        raise DataError(f"`text={path}` holds no words. Give a file with plain text.")
    return passages


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
        with evaluation_mode(self._runner.model), self._runner.running():
            for start in range(0, len(self._runner.texts), _AT_ONCE):
                batch = np.arange(start, min(start + _AT_ONCE, len(self._runner.texts)))
                logits, _ = self._runner.logits(batch)
                found.append(torch.log_softmax(logits.float(), dim=-1))
        return found
