"""Training a ledger's facts: new ones beside old ones, then every fact checked, lost ones again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.variants import Replayed
from ..distributed.world import World
from ..errors import NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..modeling.modes import only_trainable, with_gradients
from ..modeling.places import Place
from ..training.loop import train_breadth_first
from ..training.lora import low_rank_of
from ..training.preserve.confined_change import ConfinedChange
from ..training.preserve.filters import Filters, adam_of
from ..training.preserve.spectral_filter import spared_filter
from ..training.progress import LossNotFiniteError, Progress
from ..training.repair import Repaired, again_beside, of_round, repair_, wrong_texts
from ..training.reparametrization import Reparametrization
from ..training.step import TrainingStep
from ..training.trained_weights import TrainedWeights
from ..utils.progress import progress_bar
from .moments import begin_with_, moments_of
from .recorded_facts import RecordedFacts
from .runner import LedgerRunner
from .states import Matrices
from .texts import Numbered

logger = logging.getLogger(__name__)

# How strongly what stays is spared while facts are taken out; chosen on 25 of the first 500 records
# of ZsRE. Without, it took twice the texts: an eighth of what stays was lost, and trained again.
_SPARED = 0.03
# Of what is taken out, how much may be left when its training ends and repairs begin, which train
# that alone. Chosen on the first 100 records of ZsRE, of which ten were taken out: to go on for all
# epochs took four times the texts, and left some for repairs as well.
_NEARLY = 0.2


@dataclass
class Trained:
    """What training and checks came to.

    Attributes:
        epochs: Passes over what was trained, those of repairs included.
        texts: Texts that were trained, each as often as it was.
        repairs: Rounds of repair.
        lost: Numbers of facts that do not hold, or were taken out and are not out, after all
            rounds.
    """

    epochs: int = 0
    texts: int = 0
    repairs: int = 0
    lost: list[int] = field(default_factory=list)

    def add(self, other: Trained) -> None:
        """Adds what came after."""
        self.epochs += other.epochs
        self.texts += other.texts
        self.repairs += other.repairs
        self.lost = other.lost

    def said(self) -> dict[str, Any]:
        """Returns the figures as the log has them."""
        return vars(self).copy()


@dataclass(eq=False)
class Trainer:
    """Trains and checks the facts of a ledger in a model.

    Attributes:
        facts: Their texts and states, and the model.
        filters: What confines the change; `None` without `preserve`.
        moments: Adam's second moments with which the next training begins (see `moments_of`);
            `None` to begin anew. New ones after each training that is no repair.
    """

    facts: RecordedFacts
    filters: Filters | None = None
    moments: Matrices | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.facts.model

    @property
    def hparams(self) -> LocFTBFHyperParams:
        """The settings."""
        return self.facts.hparams

    @property
    def place(self) -> Place:
        """What is trained."""
        return self.facts.place

    @property
    def world(self) -> World:
        """The processes that share the work."""
        return self.facts.world

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context manager in which only the place can be trained; then the model is as before."""
        with (
            only_trainable(self.model, self.place.parameters.values()),
            self.facts.recorder.ready(),
            with_gradients(),
        ):
            yield

    @contextmanager
    def sparing(self, stays: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Context manager in which training moves little of what is to stay as it is.

        The change is confined to directions that this hardly uses, beside whatever else it is
        confined to. Adam begins anew, and what it learns is not kept: these are other numbers.

        Args:
            stays: Second moments of the inputs at what stays, [in, in], by the parameter's name.
        """
        before = self.filters, self.moments
        filters = self.filters or Filters({}, {})
        spared = {
            name: spared_filter(
                moment.to(self.place.parameters[name].device),
                filters.of.get(name),
                strength=_SPARED,
            )
            for name, moment in stays.items()
        }
        # Unlike GPUs may have rounded differently.
        self.world.broadcast_(spared.values())
        self.filters, self.moments = replace(filters, of=spared, damps=True), None
        try:
            yield
        finally:
            self.filters, self.moments = before

    def settle_(
        self,
        numbered: Numbered,
        runner: LedgerRunner,
        new: np.ndarray,
        pool: np.ndarray,
        checked: np.ndarray,
        not_right: Callable[[np.ndarray], np.ndarray],
        more: Mapping[int, int] | None = None,
        *,
        wrong: np.ndarray | None = None,
    ) -> Trained:
        """Trains `new` beside others, in place, and what checks find not to be right again.

        That is trained text by text: of an edit that does not hold in one of its forms, this form.
        What is taken out is trained until most of it is back; what is added in all epochs, which it
        needs to be known in other words.
        A round ends as soon as its texts are right: every further step would move the others. Where
        all rounds do not suffice, that with the fewest wrong texts counts.

        Args:
            numbered: The texts of all edits.
            runner: What runs them.
            new: Edits to train, [N].
            pool: Edits that are replayed beside them.
            checked: The texts that are checked.
            not_right: Returns those of some texts that are not as they should be, ascending.
            more: The fact's number of edits that `numbered` has no fact for.
            wrong: What is not right now, where the matrices are nearly as `new` wants them: that
                alone is trained.
        """

        def right(texts: np.ndarray, but: float = 0.0) -> bool:
            return len(not_right(texts)) <= but * len(texts)

        found, before, h = Trained(), runner.n_trained_by_all, self.hparams

        def train_again_(wrong: np.ndarray, number: int) -> int:
            # What is taken out may need a higher rate, which where facts are added would lose
            # others.
            factor = 2 ** ((number - 1) // 2) if more else 1
            watched = numbered.checked(np.union1d(new, pool))
            texts = again_beside(len(numbered.texts), watched, wrong, h.seed)
            of_it = of_round(h, number, factor)
            return self._fit_(runner, numbered, wrong, texts, of_it, partial(right, wrong))

        if wrong is None:
            texts = Replayed.of(numbered.variants, h.forms_per_epoch, pool, h.seed)
            enough = partial(right, numbered.checked(new), _NEARLY) if more else None
            found.epochs = self._fit_(runner, numbered, new, texts, None, enough)
            wrong = not_right(checked)
        repaired = repair_(
            self.place.parameters,
            Repaired(0, 0, wrong),
            partial(not_right, checked),
            train_again_,
            h.most_repairs,
        )
        found.repairs = repaired.rounds
        found.epochs += repaired.epochs
        found.texts = runner.n_trained_by_all - before
        number_of = {edit: number for number, edit in numbered.edit_of.items()} | dict(more or {})
        lost = numbered.edits_of(repaired.wrong).tolist()
        found.lost = sorted({number_of[edit] for edit in lost})
        return found

    def wrong(self, runner: LedgerRunner, texts: np.ndarray, *, clearly: bool = True) -> np.ndarray:
        """Returns those of these texts that the model does not answer, ascending.

        Args:
            runner: What runs the texts.
            texts: The texts, [B].
            clearly: As for `wrong_texts`.
        """
        size = self.hparams.eval_batch_size
        return wrong_texts(runner, runner.share, texts, size, clearly=clearly)

    def _fit_(
        self,
        runner: LedgerRunner,
        numbered: Numbered,
        new: np.ndarray,
        texts: Replayed,
        repair: LocFTBFHyperParams | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> int:
        """Trains `new` beside others, in place; returns the epochs that it took.

        Args:
            runner: What runs the texts.
            numbered: The texts of all edits.
            new: Edits to train, [N], as `texts` counts them.
            texts: Which texts stand for them, and for those that are replayed.
            repair: The hyper-parameters of the round of repair that this is, if it is one.
            enough: As for `train_breadth_first`.

        Raises:
            NonFiniteLossError: Training diverged; to restore the weights is up to the caller.
        """
        parameters = self.place.parameters
        h = repair or self.hparams.of_edits(len(new))
        change: Reparametrization | None = low_rank_of(self.model, parameters, h)
        lasting = change is None  # a low-rank change is another one at each training
        adam = None
        if self.filters is not None:
            change = ConfinedChange(self.model, parameters, self.filters.of, self.filters.outputs)
            adam = adam_of(len(new), h) if self.filters.damps else None
        weights = TrainedWeights(parameters) if change is None else change.weights
        step = TrainingStep(
            runner, weights, h, runner.share,
            texts_per_edit=texts.most, adam=adam, target_tokens=numbered.texts.target_lengths,
        )  # fmt: skip
        if lasting and self.moments is not None:
            begin_with_(step.optimizer, weights.named_masters(), self.moments)
        done = Progress.start(h.seed, step.micro_batch.size)
        n_batches = -(-len(new) // h.batch_size)
        try:
            with (
                nullcontext() if change is None else change.in_force(),
                runner.running(),
                closing(train_breadth_first(step, new, h, done, texts, enough)) as steps,
                progress_bar(
                    total=h.num_steps * n_batches,
                    desc="breadth-first",
                    unit="step",
                    show=self.facts.progress,
                ) as bar,
            ):
                for _ in steps:
                    bar.update()
        except LossNotFiniteError as error:
            raise NonFiniteLossError(
                f"{error}. The model is as it was before. Make another ledger with a lower "
                f"`lr` than {h.lr:g}."
            ) from None
        finally:
            weights.clear_gradients_()
        if change is not None:
            change.merge_()
            # The same sums in all processes; unlike GPUs may have rounded them differently.
            self.world.broadcast_(parameters.values())
        if lasting and repair is None:
            self.moments = moments_of(step.optimizer, weights.named_masters()) or self.moments
        return done.epoch
