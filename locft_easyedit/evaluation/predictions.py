"""The model's first choice at every scored token, the same however texts are batched.

Logits depend a little on what else is in a batch, by rounding; batch size, packing and the frozen
prefix must not decide between two tokens that are close. In float32 hardly any are: one text of a
thousand, which is run again in one fixed way. In half precision every second text has some, and all
texts run in shapes that depend on nothing but the text (see `fixed_shape`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.batching import cells_of, in_batches
from ..data.packing import Rows
from ..data.tokenization import TokenizedTexts
from ..modeling.devices import input_device
from ..modeling.last_layer import Tail
from ..modeling.modes import evaluation_mode
from ..modeling.near_ties import too_close
from ..modeling.suitability import check_ids
from ..prefix.cut import Cut
from ..prefix.frozen_prefix import FrozenPrefix, Layout, PrefixRecorder
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import can_pack, can_pack_anywhere
from ..prefix.store import Budget
from ..prefix.streaming import FrozenStream
from ..training.session import EditSession
from .prompts import Metrics

logger = logging.getLogger(__name__)


class Wrapper(Protocol):
    """What an editing method has put around a model, in which its edits hold.

    It may look at where a prompt ends, and take a batch for one text: texts run one at a time.
    """

    def begins(self, end: int) -> None:
        """Tells it that a text comes whose prompt ends at position `end`."""

    def generate(self, ids: list[int], most: int, done: Callable[[list[int]], bool]) -> list[int]:
        """Returns a prompt's tokens and up to `most` of a greedy answer, until they are `done`."""


@dataclass(frozen=True)
class EvalConfig:
    """How texts are run for evaluation.

    Attributes:
        batch_size: Prompts a forward pass.
        row_tokens: Length of packed rows.
        packed: Whether rows are packed; `None` measures whether this model can be packed.
        packed_anywhere: The same for texts whose positions do not begin at 0.
        frozen: Where the part ends that stays the same from one measurement to the next: it is
            computed once, which costs memory for a hidden state a token. `None` runs all layers
            every time.
        progress: Show progress bars.
        tail: Lets the end of the model run at scored positions alone.
        budget: Where recorded states may lie.
        stream: What reads the frozen layers, if they are not resident.
        states: What may have recorded the frozen layers' states already.
        wrapper: What is around the model, and is asked instead of it.
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
    packed_anywhere: bool | None = None
    wrapper: Wrapper | None = None

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
            found.packed_anywhere,
        )


class Measurement(ABC):
    """What takes metrics of the records that it was made with, before and after an edit."""

    @abstractmethod
    def stream(self, description: str, only: Sequence[int] | None = None) -> Iterator[Metrics]:
        """Measures; yields each record's metrics.

        Args:
            description: Label of the progress bars.
            only: Records to measure; all if `None`.
        """

    def measure(self, description: str = "", only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns each record's metrics; see `stream`."""
        return list(self.stream(description, only))


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
        self._replaced: dict[int, list[int]] = {}

    def __getitem__(self, text: int) -> list[int]:
        if text in self._replaced:
            return self._replaced[text]
        end = self._ends[text]
        return self._tokens[end - self._n_choices[text] : end].tolist()

    def put(self, texts: np.ndarray, tokens: np.ndarray) -> None:
        """Sets the choices of some texts, [B]: one text's after the other's, [S]."""
        counts = self._n_choices[texts]
        before = np.cumsum(counts) - counts
        first = self._ends[texts] - counts
        self._tokens[np.repeat(first - before, counts) + np.arange(len(tokens))] = tokens

    def replace(self, text: int, choices: list[int]) -> None:
        """Sets the choices of one text."""
        self._replaced[text] = choices


class TextPasses:
    """Passes of a model over a fixed set of texts; its frozen layers run but once if `how` says so.

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
        first_position: np.ndarray | None = None,
    ) -> None:
        self.model = model
        self.texts = texts
        self.how = how
        self.first_position = first_position
        check_ids(model, texts.ids)
        self.fixed = fixed_cells(model) if how.wrapper is None else 0
        self._packed = False if self.fixed or how.wrapper is not None else how.packed
        self._anywhere = how.packed_anywhere
        self._prefix: FrozenPrefix | None = None
        if how.frozen is None or not len(texts):
            return
        # What runs at scored positions alone has other shapes than what runs everywhere.
        cut = replace(how.frozen, narrows=False) if self.fixed else how.frozen
        prefix = FrozenPrefix(model, cut, int(texts.input_offsets[-1]), how.budget)
        if how.stream is not None:
            self._prefix = prefix
            how.stream.record(prefix, self._layout())
        elif self._filled(prefix) or prefix.fits():
            self._prefix = prefix

    def packed(self) -> bool:
        """Returns whether rows are packed; measured on a few texts if `how` leaves it open."""
        if self._packed is None:
            with evaluation_mode(self.model):
                self._packed = bool(len(self.texts)) and can_pack(self.model, self.texts)
        return self._packed

    def _packs_these(self) -> bool:
        """Returns whether these texts' rows are packed: their positions may not begin at 0."""
        if self.first_position is None or not self.packed():
            return self.packed()
        if self._anywhere is None:
            with evaluation_mode(self.model):
                self._anywhere = can_pack_anywhere(self.model, self.texts)
        return self._anywhere

    @torch.no_grad()
    def run(
        self,
        use: Callable[[torch.Tensor, Rows, np.ndarray], None],
        description: str,
        only: np.ndarray | None = None,
    ) -> None:
        """Calls `use` with the logits of each batch, [S, V], its layout, and its texts.

        Args:
            use: Must have no lasting effect before it has succeeded (see `in_batches`).
            description: Label of the progress bar.
            only: Indices of the texts to run; all if `None`.
        """
        indices = np.arange(len(self.texts)) if only is None else only
        if not len(indices):
            return
        with evaluation_mode(self.model):
            runner = self._runner(everything=only is None)
            wrapper = self.how.wrapper

            def run(batch: np.ndarray) -> None:
                if wrapper is not None:
                    wrapper.begins(int(self.texts.target_start[batch[0]]) - 1)
                logits, rows = runner.logits(batch)
                use(logits, rows, batch)

            with runner.running():
                in_batches(
                    runner.layout.batches(self.how.batch_size if wrapper is None else 1, indices),
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
        return self.how.states is not None and self.how.states.fill(
            prefix, self._layout(), self.how.batch_size
        )

    def _layout(self) -> Layout:
        return Layout(
            self.texts, self.how.row_tokens, self._packs_these(), self.first_position, self.fixed
        )

    def _runner(self, *, everything: bool) -> TextRunner:
        # A frozen prefix is recorded in a pass over all texts, or not at all.
        usable = self._prefix is not None and (
            everything or self._prefix.complete or self._prefix.source is not None
        )
        return TextRunner(
            self.model,
            self.texts,
            row_tokens=self.how.row_tokens,
            packed=self._packs_these(),
            prefix=self._prefix if usable else None,
            first_position=self.first_position,
            tail=None if self.fixed else self.how.tail,
            fixed=self.fixed,
        )


class ArgmaxPredictor(TextPasses):
    """First choices for a fixed set of texts, to be taken before and after an edit.

    Args:
        model: A causal language model.
        texts: The texts; every token from `target_start` on is predicted.
        how: How they are run.
        alone: Returns the first choices of text i from full forward passes of one fixed form; one
            pass over this text if `None`.
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
        alone: Callable[[int], list[int]] | None = None,
        first_position: np.ndarray | None = None,
    ) -> None:
        super().__init__(model, texts, how, first_position)
        self._alone = alone
        self._apart: bool | None = None
        self.not_finite: set[int] = set()

    @torch.no_grad()
    def take(self, description: str, only: np.ndarray | None = None) -> ArgmaxPredictions:
        """Returns the first choice at each predicted token of each text.

        Args:
            description: Label of the progress bar.
            only: Indices of the texts that are asked for; the others' choices stay empty.
        """
        asked = np.arange(len(self.texts)) if only is None else only
        choices = ArgmaxPredictions(self.texts, asked)
        close: set[int] = set()
        self.not_finite = set()

        def note(logits: torch.Tensor, rows: Rows, texts: np.ndarray) -> None:
            best = logits.topk(2, dim=-1)  # [S, 2]
            near = too_close(best.values, self.model)
            finite = torch.isfinite(best.values[:, 0])
            owner = rows.owner.to(logits.device)
            # One copy to the host a batch.
            columns = [owner, best.indices[:, 0], near.long(), finite.long()]
            owners, tokens, is_close, is_finite = torch.stack(columns).cpu().numpy()
            choices.put(texts, tokens)
            self.not_finite.update(texts[owners[is_finite == 0]].tolist())
            close.update(texts[owners[(is_close == 1) & (is_finite == 1)]].tolist())

        self.run(note, description, only)
        if self.fixed:
            if close and not self._rows_apart():
                warn_close(len(close), len(asked))
        elif self.how.stream is None:  # else the whole model would be read again for each
            alone = self._alone or self._by_itself
            with evaluation_mode(self.model):
                for text in sorted(close - self.not_finite):
                    choices.replace(text, alone(text))
        return choices

    def _rows_apart(self) -> bool:
        """Returns whether a text's logits are the same to the last bit beside any other texts.

        Measured once, on the fullest batch: with its other texts, and with none but the first.
        """
        if self._apart is None:
            with evaluation_mode(self.model):
                runner = self._runner(everything=False)
                batch = max(runner.layout.batches(self.how.batch_size), key=len)
                with runner.running():
                    (together, rows), (alone, _) = map(runner.logits, (batch, batch[:1]))
            self._apart = torch.equal(together[rows.owner.to(together.device) == 0], alone)
        return self._apart

    def _by_itself(self, i: int) -> list[int]:
        """Returns text i's first choices from a plain forward pass over it."""
        texts, first = self.texts, int(self.texts.offsets[i])
        ids = torch.from_numpy(texts.ids[first : texts.offsets[i + 1] - 1])[None]
        if self.how.wrapper is not None:
            self.how.wrapper.begins(int(texts.target_start[i]) - 1)
        output = self.model(input_ids=ids.to(input_device(self.model)), use_cache=False)
        return output.logits[0, int(texts.target_start[i]) - 1 :].argmax(-1).tolist()


def fixed_cells(model: PreTrainedModel) -> int:
    """Returns the cells of the fixed shapes in which a model's texts run; 0 in float32: in none."""
    return 0 if model.dtype == torch.float32 else cells_of(input_device(model).type)


def warn_close(n: int, of: int) -> None:
    """Says that rounding may decide some choices."""
    logger.warning(
        "Rounding may decide between the two first choices of %d of %d prompts (%.0f%%): in this "
        "model a text's logits depend on the other texts of its batch (experts do that, say), and "
        "among other records some answers may differ. `dtype: float32` decides them.",
        n,
        of,
        100 * n / of,
    )


def warn_not_finite(n: int, of: int) -> None:
    """Warns of texts that cannot be measured."""
    if n:
        logger.warning(
            "%d of %d prompts gave logits that are no finite numbers: their metrics are NaN. The "
            "model is damaged, or its numbers are too large for this `dtype`.",
            n,
            of,
        )
