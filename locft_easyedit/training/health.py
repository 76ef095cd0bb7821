"""Whether an edit has hurt the model: a fixed text's perplexity, and how far the matrices moved.

An edit can be learned perfectly and leave a model that can do nothing else. The perplexity of
ordinary text shows it early and costs almost nothing (Yang et al., "The Butterfly Effect of Model
Editing", Findings of ACL 2024); so does the growth of the edited matrices' norms (Gupta et al.,
"Model Editing at Scale leads to Gradual and Catastrophic Forgetting", Findings of ACL 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import TokenizedTexts, ids_of
from ..errors import RankError
from ..modeling.devices import context_length
from ..prefix.frozen_prefix import FrozenPrefix, Layout
from ..prefix.prepare import kept_file
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import Shortcuts
from ..prefix.store import Budget
from ..prefix.streaming import FrozenStream
from .health_report import HealthReport, damages
from .weight_norms import change_of

logger = logging.getLogger(__name__)

_TEXT = Path(__file__).with_name("health_text.txt")
_FEWEST_TOKENS = 50  # predicted ones; fewer say little

T = TypeVar("T")


class HealthCheck:
    """The fixed text, ready to be run before and after an edit.

    Where the frozen layers' states can be kept they are recorded once, so that a measurement runs
    the upper layers alone, and a model whose frozen layers lie on disk is not read again. Nothing
    that goes wrong here ends an edit: the report says what.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        shortcuts: What leaves its logits as they are.
        row_tokens: Length of packed rows.
        kept: As for `prepare_runner`: where the states stay for a later run.
        stream: What records the states, at its next pass, if the frozen layers are on disk.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shortcuts: Shortcuts,
        *,
        row_tokens: int = 64,
        kept: tuple[str, Iterable[str]] | None = None,
        stream: FrozenStream | None = None,
    ) -> None:
        self.model = model
        self.not_measured = ""
        self.perplexity_before: float | None = None
        self._warned = False
        self._runner: TextRunner | None = None
        texts, self.not_measured = health_texts(model, tokenizer)
        if self.not_measured:
            return
        prefix = None
        if shortcuts.cuts:
            # A budget of its own: what a user allows is for the edits, and this is next to nothing.
            n_tokens = int(texts.input_offsets[-1])
            cut = shortcuts.cuts[0]
            file = kept_file(kept, model, cut, texts, shortcuts.packed, stream)
            prefix = FrozenPrefix(model, cut, n_tokens, Budget(), file)
            if not prefix.reuse() and stream is not None:
                stream.record(prefix, Layout(texts, row_tokens, shortcuts.packed))
        self._runner = TextRunner(
            model,
            texts,
            row_tokens=row_tokens,
            packed=shortcuts.packed,
            prefix=prefix,
            tail=shortcuts.tail,
            head=shortcuts.head,
        )

    def __enter__(self) -> HealthCheck:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def before(self) -> None:
        """Measures the perplexity before an edit, unless that was done."""
        prefix = None if self._runner is None else self._runner.prefix
        if prefix is not None and prefix.source is not None and not prefix.complete:
            # The edits' own states came from an earlier run, and nothing else has asked for a pass.
            self.not_measured = "the frozen layers would have to be read from disk for it alone"
        if self.perplexity_before is None and not self.not_measured:
            self.perplexity_before = self._perplexity()

    def after(
        self,
        original: Mapping[str, torch.Tensor],
        new: Mapping[str, torch.Tensor],
        *,
        lr: float,
        perplexity: bool = True,
    ) -> HealthReport:
        """Measures the model as it is now; logs a warning, once, if it looks damaged.

        Args:
            original: The trained parameters' values before the edit, by name.
            new: Their values now.
            lr: The learning rate, for the warning.
            perplexity: Measure the text's perplexity; the norms are compared in any case.
        """
        before, after = (self.perplexity_before, None) if perplexity else (None, None)
        if before is not None:
            after = self._perplexity()
        changes = self._safely(lambda: {name: change_of(original[name], new[name]) for name in new})
        matrices = changes or {}
        why_not = self.not_measured if perplexity else "only the norms were compared"
        warnings = damages(before, after, matrices, _vocabulary(self.model))
        report = HealthReport(before, after, matrices, bool(warnings), warnings, why_not)
        if warnings and not self._warned:
            self._warned = True  # of hundreds of edits that are made alone, the first will do
            logger.warning(
                "The edited model looks damaged: %s. Lower `lr` (now %g), allow fewer epochs "
                "(`num_steps`) or choose another layer. The edit can be undone: with `locft delta "
                "revert`, or `result.restore_(model)` in Python.",
                "; ".join(warnings),
                lr,
            )
        return report

    def close(self) -> None:
        """Gives back what the recorded states take."""
        prefix = self._runner.prefix if self._runner is not None else None
        if prefix is not None and prefix.complete:
            prefix.store.close()
        self._runner = None

    def _perplexity(self) -> float | None:
        """Returns the text's perplexity; `None` where it cannot be run."""
        return self._safely(self._measured)

    def _safely(self, measure: Callable[[], T]) -> T | None:
        """Returns what `measure` does; `None`, and why in `not_measured`, where it fails."""
        try:
            # What is recorded outlives this pass, and a caller's inference mode with it.
            with torch.inference_mode(False), torch.no_grad():
                return measure()
        except RankError:
            raise
        except Exception as error:  # an edit of hours is not lost to a look at it
            reason = (str(error).splitlines() or [""])[0]
            self.not_measured = f"{type(error).__name__}: {reason}"
            logger.info("A part of the health check failed: %s", self.not_measured)
            return None

    def _measured(self) -> float:
        runner = self._runner
        assert runner is not None
        texts, prefix = runner.texts, runner.prefix
        if prefix is not None and not prefix.complete:
            prefix.record(runner.layout, len(texts))
        with runner.running():
            losses = runner.edit_losses(np.arange(len(texts))).double().cpu().numpy()  # [N]
        counts = texts.lengths - texts.target_start
        with np.errstate(over="ignore"):
            return float(np.exp(np.dot(losses, counts) / counts.sum()))


def health_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str] | None = None,
) -> tuple[TokenizedTexts, str]:
    """Returns a text's passages as tokens, or why this model cannot be given them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        passages: The text; the fixed one if `None`.
    """
    empty = TokenizedTexts.from_lists([], [])
    if passages is None:
        passages = _TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    try:
        found = ids_of(tokenizer, passages)
    except Exception as error:  # a tokenizer may be any Python code
        return empty, f"the tokenizer cannot read the text ({type(error).__name__})"
    length = context_length(model)
    sequences = [ids[:length] for ids in found if len(ids[:length]) > 1]
    if sum(len(ids) - 1 for ids in sequences) < _FEWEST_TOKENS:
        return empty, "the tokenizer makes next to no tokens of the text"
    everything = [token for ids in sequences for token in ids]
    if max(everything) >= _vocabulary(model):
        return empty, "the tokenizer has tokens that the model has no embedding for"
    unknown = tokenizer.unk_token_id
    if unknown is not None and everything.count(unknown) > len(everything) / 2:
        return empty, "the tokenizer does not know most of the text"
    # The first token has no predecessor that could predict it.
    return TokenizedTexts.from_lists(sequences, [1] * len(sequences)), ""


def _vocabulary(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])
