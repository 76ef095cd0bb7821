"""How far an edit moved the next token's distribution on prompts that it should leave alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.packing import Rows
from ..data.tokenization import Asked, TokenizedTexts, asked_ids
from .predictions import EvalConfig, TextPasses
from .prompts import Questions

logger = logging.getLogger(__name__)

MOST_PROMPTS = 512  # of which the distribution before an edit is kept
_SEED = 0
_LEAST = -6e4  # log-probability of what is impossible: float16 holds it, and 0 times it is 0


class BeforeEdit:
    """The model's next-token distributions on locality prompts before an edit.

    At most `MOST_PROMPTS` locality prompts are drawn, with a fixed seed, among those of all
    records. Their log-probabilities are kept on the host in float16: two bytes a token of the
    vocabulary for a prompt, twice that where it is asked in chat as well. For 512 prompts and a
    vocabulary of 49,152 that is 48 MiB, or 96 MiB with chat.

    Args:
        records: All records, those of other processes as well: what is drawn does not depend on
            how they are shared out.

    Attributes:
        drawn: A record's number -> which of its locality prompts were drawn, counted over all of
            its localities in order.
        log_probabilities: Those of the prompts that this process measures, [P, V] float16; `None`
            before the first measurement.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        questions = Questions(records, parts=("locality",))
        n_prompts = int(questions.first_prompt[-1])
        chosen = np.arange(n_prompts)
        if n_prompts > MOST_PROMPTS:
            draw = np.random.default_rng(_SEED)
            chosen = np.sort(draw.choice(n_prompts, MOST_PROMPTS, replace=False))
        self.drawn: dict[int, list[int]] = {}
        for prompt in chosen.tolist():
            record = questions.record_of(prompt)
            first = int(questions.first_prompt[record])
            self.drawn.setdefault(record, []).append(prompt - first)
        self.log_probabilities: torch.Tensor | None = None


class Divergence:
    """KL(before || after), in nats, of the token with which the answer to a prompt would begin.

    The first measurement keeps what the model predicts; later ones compare with it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        asked: P prompts.
        how: How they are run.
        before: Where the distributions are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: Sequence[Asked],
        how: EvalConfig,
        before: BeforeEdit,
    ) -> None:
        self.before = before
        # The last token is only predicted: any one holds its place.
        prompts = asked_ids(tokenizer, asked)
        self._n_prompts = len(prompts)
        self._passes: TextPasses | None = None
        if prompts:
            texts = TokenizedTexts.from_lists([[*ids, 0] for ids in prompts], [*map(len, prompts)])
            self._passes = TextPasses(model, texts, how)

    def keep(self, description: str) -> None:
        """Keeps what the model predicts now, unless something is kept already."""
        if self._passes is None or self.before.log_probabilities is not None:
            return

        def take(logits: torch.Tensor, rows: Rows, texts: np.ndarray) -> None:
            kept = self.before.log_probabilities
            if kept is None:
                kept = torch.empty(self._n_prompts, logits.shape[-1], dtype=torch.float16)
                self.before.log_probabilities = kept
            kept[torch.from_numpy(texts[rows.owner.cpu().numpy()])] = _compact(logits).cpu()

        self._passes.run(take, description)

    def measure(self, description: str, only: np.ndarray | None = None) -> np.ndarray | None:
        """Returns the divergence of each prompt, [P] float64; `None` if nothing was kept.

        NaN where logits were no finite numbers before or after, and for prompts that were not
        asked for. Rounding to float16 moves a divergence by some 0.1% of its size, and one below
        1e-3 by up to 1e-5; a model that has not changed gives 0.

        Args:
            description: Label of the progress bar.
            only: Indices of the prompts that are asked for.
        """
        kept = self.before.log_probabilities
        if self._passes is None or kept is None:
            return None
        found = np.full(self._n_prompts, np.nan)
        if only is not None and not len(only):
            return found
        same_shape = True

        def take(logits: torch.Tensor, rows: Rows, texts: np.ndarray) -> None:
            nonlocal same_shape
            prompts = texts[rows.owner.cpu().numpy()]
            if kept.shape != (self._n_prompts, logits.shape[-1]):
                same_shape = False
                return
            then = F.log_softmax(kept[torch.from_numpy(prompts)].to(logits.device).float(), -1)
            now = F.log_softmax(_compact(logits).float(), -1)
            # The least value keeps what is impossible in both from giving NaN.
            terms = then.exp() * (then.clamp(min=_LEAST) - now.clamp(min=_LEAST))
            found[prompts] = terms.double().sum(-1).clamp(min=0).cpu().numpy()

        self._passes.run(take, description, only)
        if not same_shape:
            logger.warning(
                "No divergence is measured: the model before the edit has another vocabulary or "
                "chat template."
            )
            return None
        return found


def _compact(logits: torch.Tensor) -> torch.Tensor:
    """Returns the log-probabilities of logits [S, V], float16; rows of NaN if one is no number."""
    return F.log_softmax(logits.float(), -1).clamp(min=_LEAST).half()
