"""Repairs of a session's edits: every edit is checked, and what does not hold is trained again."""

from __future__ import annotations

import logging
import math
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from ..data.requests import EditSet
from ..data.training_texts import TrainingTexts
from ..hparams import LocFTBFHyperParams
from ..utils.progress import progress_bar
from .checkpoints import Checkpoints
from .loop import train_breadth_first
from .progress import REPAIRS, Progress
from .repair import Repaired, again_beside, of_round, repair_, wrong_texts
from .step import TrainingStep

logger = logging.getLogger(__name__)

_PATIENCE = 3  # rounds in a row that help nobody


@dataclass(eq=False)
class EditRepair:
    """Checks edits that have been trained, and trains again what does not hold, in place.

    An edit is checked plainly and in each form that is trained; of those that contradict each
    other one alone could hold, and none is checked.

    Attributes:
        step: Has trained them.
        indices: Which of the distinct edits, [N].
        edits: The distinct edits of the session.
        texts: Their texts.
        hparams: The hyper-parameters, as the session has them.
        done: How far training has come: to the end of its epochs, or into the repairs. Its
            `repairs` are brought up to date.
        checkpoints: Those of the training; `None` without.
        progress: Show progress bars.
    """

    step: TrainingStep
    indices: np.ndarray
    edits: EditSet
    texts: TrainingTexts
    hparams: LocFTBFHyperParams
    done: Progress
    checkpoints: Checkpoints | None = None
    progress: bool = True
    _checked: np.ndarray = field(init=False)
    _saved: bool = field(init=False, default=False)

    def run_(self) -> None:
        """Checks and repairs.

        Raises:
            EditInterrupted: Ctrl-C or SIGTERM; the checkpoint has the best state so far.
        """
        h, variants, done = self.hparams, self.texts.variants, self.done
        prompts = [self.edits.edits[i].prompt.strip() for i in self.indices]
        times = Counter(prompts)
        alone = [i for i, prompt in zip(self.indices, prompts, strict=True) if times[prompt] == 1]
        self._checked = variants.first_texts(np.array(alone, np.int64), len(self.texts.forms))
        done.finished = False
        wrong = self._all_wrong()
        if done.repairs is None:
            found = {"checked_texts": len(self._checked), "wrong_texts": len(wrong)}
            done.repairs = dict.fromkeys(REPAIRS, 0) | found
            self._keep(Repaired(0, 0, wrong))
        else:  # the checkpoint that this goes on from
            self._saved = True
        weights = self.step.weights
        repaired = repair_(
            weights.named_masters(),
            Repaired(done.repairs["rounds"], done.repairs["epochs"], wrong),
            self._all_wrong,
            self._train_again_,
            h.rounds_of_repair,
            patience=_PATIENCE,
            better=self._keep,
        )
        weights.clear_gradients_()
        weights.copy_masters_to_model_()  # where an earlier state was the best
        done.repairs |= {"rounds": repaired.rounds, "epochs": repaired.epochs}
        done.finished = True
        lost = variants.edits_of(repaired.wrong)
        if len(lost) and self.step.share.world.is_main_process:
            logger.warning(
                "%d of %d edits do not hold, plainly or in another form, after %d rounds of "
                "repair: %s. More epochs (`num_steps`), or other words for them, may help.",
                len(lost),
                len(alone),
                repaired.rounds,
                self.edits.named(lost.tolist()),
            )

    def _all_wrong(self) -> np.ndarray:
        return self._wrong(self._checked, progress=self.progress)

    def _wrong(self, texts: np.ndarray, *, progress: bool = False) -> np.ndarray:
        step, size = self.step, self.hparams.eval_batch_size
        return wrong_texts(step.runner, step.share, texts, size, progress=progress)

    def _train_again_(self, wrong: np.ndarray, number: int) -> int:
        """Trains some texts again until they hold; returns the epochs of this round."""
        step, h = self.step, of_round(self.hparams, number)
        step.lr, step.threshold = h.lr, h.batch_loss_threshold
        n_texts = int(self.texts.variants.first[-1])
        texts = again_beside(n_texts, self._checked, wrong, h.seed)
        again = Progress.start(h.seed, step.micro_batch.size)
        with (
            closing(
                train_breadth_first(
                    step, wrong, h, again, texts, lambda: not len(self._wrong(wrong))
                )
            ) as steps,
            progress_bar(
                total=h.num_steps * math.ceil(len(wrong) / h.batch_size),
                desc=f"repair {number}",
                unit="step",
                show=self.progress,
            ) as bar,
        ):
            for _ in steps:
                bar.update()
                if self.checkpoints is not None and self.checkpoints.due():
                    self.checkpoints.end_if_asked(self.done, self._saved)
        return again.epoch

    def _keep(self, so_far: Repaired) -> None:
        """Notes a state that is better than all before: from there repairs may go on."""
        lost = len(self.texts.variants.edits_of(so_far.wrong))
        assert self.done.repairs is not None
        self.done.repairs |= {
            "rounds": so_far.rounds,
            "epochs": so_far.epochs,
            "lost_edits": lost,
        }
        if self.checkpoints is not None and lost:
            step = self.step
            self._saved = self.checkpoints.save(self.done, step.weights, step.optimizer)
