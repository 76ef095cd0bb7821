"""The model's first choice at every scored token, the same however texts are batched.

Logits depend a little on what else is in a batch, by rounding. Where the two best tokens are that
close, the text is run again in one fixed way, so that batch size, packing and the frozen prefix
never decide between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.batching import in_batches
from ..data.tokenization import TokenizedTexts
from ..modeling.last_layer import Tail
from ..modeling.modes import evaluation_mode
from ..prefix.cut import Cut
from ..prefix.frozen_prefix import FrozenPrefix, PrefixRecorder
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import can_pack
from ..prefix.store import Budget
from ..prefix.streaming import FrozenStream
from ..training.session import EditSession

logger = logging.getLogger(__name__)

# Rounding could decide between logits that are closer than this many steps of the model's numbers
# at their size, or than the floor. Batching moves the logits of SmolLM2 by up to 1e-4 in float32.
_STEPS = 4
_FLOOR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class EvalConfig:
    """How texts are run for evaluation.

    Attributes:
        batch_size: Prompts a forward pass.
        row_tokens: Length of packed rows.
        packed: Whether rows are packed; `None` measures whether this model can be packed.
        frozen: Where the part ends that stays the same from one measurement to the next: it is
            computed once, which costs memory for a hidden state a token. `None` runs all layers
            every time.
        progress: Show progress bars.
        tail: Lets the end of the model run at scored positions alone.
        budget: Where recorded states may lie.
        stream: What reads the frozen layers, if they are not resident.
        states: What may have recorded the frozen layers' states already.
    """

    batch_size: int = 64
    row_tokens: int = 64
    packed: bool | None = None
    frozen: Cut | None = None
    progress: bool = False
    tail: Tail | None = None
    budget: Budget | None = None
    stream: FrozenStream | None = None
    states: PrefixRecorder | None = None

    @classmethod
    def from_session(cls, session: EditSession, *, progress: bool) -> EvalConfig:
        """Returns the fastest way that an entered session knows for its model."""
        h, found = session.hparams, session.shortcuts
        return cls(
            h.eval_batch_size,
            h.row_tokens,
            found.packed,
            # Prompts are run once or twice: the fewest numbers a token, not the least to run.
            min(found.cuts, key=lambda cut: cut.width, default=None),
            progress,
            found.tail,
            session.budget,
            session.stream,
            session.shared_states,
        )


class ArgmaxPredictions:
    """The first choice at each predicted token of many texts; `choices[i]` are those of text i.

    Args:
        texts: The texts.
        asked: Those that are asked for; the others' choices stay empty.
    """

    def __init__(self, texts: TokenizedTexts, asked: np.ndarray) -> None:
        n_choices = np.zeros(len(texts), np.int64)
        n_choices[asked] = (texts.lengths - texts.target_start)[asked]
        self._ends = np.cumsum(n_choices)
        self._n_choices = n_choices
        self._tokens = np.zeros(int(n_choices.sum()), np.int32)
        self._odd: dict[int, list[int]] = {}

    def __getitem__(self, text: int) -> list[int]:
        if text in self._odd:
            return self._odd[text]
        end = self._ends[text]
        choices: list[int] = self._tokens[end - self._n_choices[text] : end].tolist()
        return choices

    def put(self, texts: np.ndarray, tokens: np.ndarray) -> None:
        """Sets the choices of some texts, [B]: one text's after the other's, [S]."""
        counts = self._n_choices[texts]
        before = np.cumsum(counts) - counts
        first = self._ends[texts] - counts
        self._tokens[np.repeat(first - before, counts) + np.arange(len(tokens))] = tokens

    def replace(self, text: int, choices: list[int]) -> None:
        """Sets the choices of one text."""
        if len(choices) == self._n_choices[text]:
            self.put(np.array([text]), np.array(choices))
        else:
            self._odd[text] = choices


class Predictor:
    """Runs a fixed set of texts, before and after an edit, for the logits of what they predict.

    Args:
        model: A causal language model.
        texts: The texts; every token from `target_start` on is predicted.
        how: How they are run.
        first_position: As for `lay_out`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: TokenizedTexts,
        how: EvalConfig,
        *,
        first_position: np.ndarray | None = None,
    ) -> None:
        self.model = model
        self.texts = texts
        self.how = how
        self.first_position = first_position
        self._packed = how.packed
        self._prefix: FrozenPrefix | None = None
        if how.frozen is not None:
            n_tokens = int(texts.input_offsets[-1])
            prefix = FrozenPrefix(model, how.frozen, n_tokens, how.budget)
            there = how.stream is not None or self._filled(prefix)
            self._prefix = prefix if there or prefix.fits() else None
            if how.stream is not None and len(texts):
                how.stream.record(
                    prefix,
                    texts,
                    row_tokens=how.row_tokens,
                    packed=self.packed(),
                    first_position=first_position,
                )

    @torch.no_grad()
    def run(
        self,
        description: str,
        only: np.ndarray | None,
        take: Callable[[np.ndarray, torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Runs the texts in batches.

        Args:
            description: Label of the progress bar.
            only: Indices of the texts that are run; all if `None`.
            take: Called for each batch with the indices of its texts, [B], the logits of its
                predicted tokens, [S, V], and which of the B texts each of them is of, [S].
        """
        indices = np.arange(len(self.texts)) if only is None else only
        with evaluation_mode(self.model):
            runner = self._runner(everything=only is None)

            def run(batch: np.ndarray) -> None:
                logits, rows = runner.logits(indices[batch])
                take(indices[batch], logits, rows.owner.to(logits.device))

            with runner.running():
                in_batches(
                    self.texts.lengths[indices],
                    self.how.batch_size,
                    run,
                    description=description,
                    progress=self.how.progress and only is None,
                )
            if runner.prefix is not None:
                runner.prefix.complete = True

    def close(self) -> None:
        """Gives back what recorded states took."""
        if self._prefix is not None:
            self._prefix.close()

    def _filled(self, prefix: FrozenPrefix) -> bool:
        """Returns whether `prefix` could take its states from a recorder that had them."""
        if self.how.states is None or not len(self.texts):
            return False
        return self.how.states.fill(
            prefix,
            self.texts,
            batch_size=self.how.batch_size,
            row_tokens=self.how.row_tokens,
            packed=self.packed(),
            first_position=self.first_position,
        )

    def packed(self) -> bool:
        """Returns whether rows are packed; measured on a few texts if `how` leaves it open."""
        if self._packed is None:
            with evaluation_mode(self.model):
                self._packed = bool(len(self.texts)) and can_pack(self.model, self.texts)
        return self._packed

    def _runner(self, *, everything: bool) -> TextRunner:
        # A frozen prefix is recorded in a pass over all texts, or not at all.
        usable = self._prefix is not None and (
            everything or self._prefix.complete or self._prefix.source is not None
        )
        return TextRunner(
            self.model,
            self.texts,
            row_tokens=self.how.row_tokens,
            packed=self.packed(),
            prefix=self._prefix if usable else None,
            first_position=self.first_position,
            tail=self.how.tail,
        )


class ArgmaxPredictor(Predictor):
    """First choices for a fixed set of texts, to be taken before and after an edit.

    Args:
        model: A causal language model.
        texts: The texts; every token from `target_start` on is predicted.
        how: How they are run.
        alone: Returns the first choices of text i from full forward passes of one fixed form.
        first_position: As for `lay_out`.

    Attributes:
        not_finite: Texts for which the last measurement met logits that are NaN or infinite; what
            the model "chooses" there is meaningless.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: TokenizedTexts,
        how: EvalConfig,
        *,
        alone: Callable[[int], list[int]],
        first_position: np.ndarray | None = None,
    ) -> None:
        super().__init__(model, texts, how, first_position=first_position)
        self.alone = alone
        self.not_finite: set[int] = set()

    @torch.no_grad()
    def take(self, description: str, only: np.ndarray | None = None) -> ArgmaxPredictions:
        """Returns the first choice at each predicted token of each text.

        Args:
            description: Label of the progress bar.
            only: Indices of the texts that are asked for; the others' choices stay empty.
        """
        choices = ArgmaxPredictions(
            self.texts, np.arange(len(self.texts)) if only is None else only
        )
        if not (len(self.texts) if only is None else len(only)):
            return choices
        close: set[int] = set()
        self.not_finite = set()

        def choose(texts: np.ndarray, logits: torch.Tensor, owner: torch.Tensor) -> None:
            best = logits.topk(2, dim=-1)  # [S, 2]
            near = too_close(best.values, self.model)
            finite = torch.isfinite(best.values[:, 0])
            # One copy to the host a batch.
            columns = [owner, best.indices[:, 0], near.long(), finite.long()]
            owners, tokens, is_close, is_finite = torch.stack(columns).cpu().numpy()
            choices.put(texts, tokens)
            self.not_finite.update(texts[owners[is_finite == 0]].tolist())
            close.update(texts[owners[(is_close == 1) & (is_finite == 1)]].tolist())

        self.run(description, only, choose)
        if self.how.stream is None:  # else the whole model would be read again for each
            with evaluation_mode(self.model):
                for text in sorted(close - self.not_finite):
                    choices.replace(text, self.alone(text))
        return choices


def too_close(best: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Returns where rounding could decide between the two best logits, [S] bool.

    Args:
        best: The best and the second-best logit, [S, 2].
        model: The model. Its own precision counts: some give float32 logits of half weights.
    """
    dtype = model.dtype if model.dtype in _FLOOR else torch.bfloat16
    size = best[:, 0].float().abs()
    margin = (_STEPS * torch.finfo(dtype).eps * size).clamp(min=_FLOOR[dtype])
    return (best[:, 0] - best[:, 1]).float() < margin


def warn_not_finite(n: int, of: int) -> None:
    """Warns of texts that cannot be measured."""
    if n:
        logger.warning(
            "%d of %d prompts gave logits that are no finite numbers: their metrics are NaN. The "
            "model is damaged, or its numbers are too large for this `dtype`.",
            n,
            of,
        )
