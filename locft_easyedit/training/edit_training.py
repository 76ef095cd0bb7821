"""One training of a session's edits: shown, saved and stopped, and repaired where it is needed."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.requests import EditSet
from ..data.training_texts import TrainingTexts
from ..distributed.world import Partition
from ..errors import NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import DEPTH_FIRST
from ..modeling.modes import with_gradients
from ..prefix.runner import TextRunner
from ..utils.progress import progress_bar
from .checkpoints import Checkpoints
from .loop import batch_of, train_breadth_first, train_depth_first
from .progress import LossNotFiniteError, Progress
from .repair import again_beside, of_round, repair_, wrong_texts
from .step import TrainingStep
from .trained_weights import TrainedWeights

logger = logging.getLogger(__name__)

_NAMED = 3  # requests that a message names


@dataclass(eq=False)
class EditTraining:
    """Trains weights on edits, in place.

    Attributes:
        runner: Runs this process's texts.
        weights: What is trained.
        edits: The distinct edits of the session.
        texts: Their texts.
        hparams: The hyper-parameters, as the session has them.
        share: Which of all texts this process runs.
        adam: What Adam is given, as for `TrainingStep`.
        checkpoints: What the training goes on from, and leaves; `None` without.
        progress: Show progress bars.
    """

    runner: TextRunner
    weights: TrainedWeights
    edits: EditSet
    texts: TrainingTexts
    hparams: LocFTBFHyperParams
    share: Partition
    adam: Mapping[str, Any] | None = None
    checkpoints: Checkpoints | None = None
    progress: bool = True

    def run_(self, indices: np.ndarray) -> Progress:
        """Trains these edits, from the beginning or from a checkpoint.

        Args:
            indices: Which of the distinct edits, [N].

        Raises:
            NonFiniteLossError: Training diverged; restoring the weights is up to the caller.
            EditInterrupted: Ctrl-C or SIGTERM, after a checkpoint; the same.
        """
        h, weights, checkpoints = (
            self.hparams.of_edits(len(indices)),
            self.weights,
            self.checkpoints,
        )
        variants = self.texts.variants
        step = TrainingStep(
            self.runner,
            weights,
            h,
            self.share,
            texts_per_edit=variants.most,
            adam=self.adam,
            target_tokens=self.texts.texts.target_lengths,
        )
        n_batches = math.ceil(len(indices) / h.batch_size)
        depth_first = h.pipeline == DEPTH_FIRST
        loop = train_depth_first if depth_first else train_breadth_first
        # Breadth-first, rounds are epochs; depth-first, the steps on a mini-batch, which may end.
        of_a_round = h.num_steps if depth_first else n_batches
        done = Progress.start(h.seed, step.micro_batch.size, depth_first=depth_first)
        if checkpoints is not None:
            checkpoints.check_room(weights)
            done = checkpoints.resume_(weights, step.optimizer, n_batches) or done
            step.micro_batch.size = done.micro_batch_size
        with ExitStack() as stack:
            stack.enter_context(self.runner.running())
            stack.enter_context(with_gradients())
            if checkpoints is not None:
                stack.enter_context(checkpoints.watching(done))
            bar = stack.enter_context(
                progress_bar(
                    total=h.num_steps * n_batches,
                    initial=done.epoch * of_a_round + done.step,
                    desc=h.pipeline.replace("_", "-"),
                    unit="step",
                    show=self.progress,
                )
            )
            # Closed also where the training ends early: its prefetching thread ends with it.
            steps = stack.enter_context(closing(loop(step, indices, h, done, variants)))
            with self._explaining(lambda: batch_of(indices, h.batch_size, done)):
                for _ in steps:
                    bar.update(max(1, done.epoch * of_a_round + done.step - bar.n))
                    _show_loss(bar, done)
                    if checkpoints is not None and checkpoints.due():
                        with self.share.world.warning_of_waits("the losses so far"):
                            done.settle()
                        checkpoints.save(done, weights, step.optimizer)
            _show_loss(bar, done)
            if h.rounds_of_repair:
                self._repair_(step, indices, done)
            if checkpoints is not None:
                checkpoints.finish(done, weights)
        return done

    def _repair_(self, step: TrainingStep, indices: np.ndarray, done: Progress) -> None:
        """Checks the edits, and trains again what does not hold; notes in `done` what it came to.

        Args:
            step: Has trained the edits.
            indices: Which of the distinct edits, [N].
            done: How far training has come: to its end.
        """
        h, variants = self.hparams, self.texts.variants
        prompts = Counter(self.edits.edits[i].prompt for i in indices)
        # Of those that contradict each other one alone can hold.
        alone = [i for i in indices if prompts[self.edits.edits[i].prompt] == 1]
        checked = variants.first_texts(np.array(alone, np.int64), len(self.texts.forms))

        def not_right(texts: np.ndarray) -> np.ndarray:
            shown = self.progress and texts is checked
            return wrong_texts(self.runner, self.share, texts, h.eval_batch_size, progress=shown)

        def train_again_(wrong: np.ndarray, number: int) -> int:
            of_it = of_round(h, number)
            step.lr, step.threshold = of_it.lr, of_it.batch_loss_threshold
            texts = again_beside(int(variants.first[-1]), checked, wrong, h.seed)
            again = Progress.start(h.seed, step.micro_batch.size)
            with (
                closing(
                    train_breadth_first(
                        step, wrong, of_it, again, texts, lambda: not len(not_right(wrong))
                    )
                ) as steps,
                progress_bar(
                    total=h.num_steps * math.ceil(len(wrong) / h.batch_size),
                    desc=f"repair {number}",
                    unit="step",
                    show=self.progress,
                ) as bar,
                self._explaining(lambda: variants.edits_of(wrong)),
            ):
                for _ in steps:
                    bar.update()
                    if self.checkpoints is not None and self.checkpoints.due():
                        self.checkpoints.end_if_asked(done, written)
            return again.epoch

        written = False
        wrong = not_right(checked)
        done.repairs = {"checked_texts": len(checked), "wrong_texts": len(wrong)}
        done.finished = not len(wrong)
        if self.checkpoints is not None and not done.finished:
            # Repairs begin from here again, should they be interrupted.
            written = self.checkpoints.save(done, self.weights, step.optimizer)
        masters = self.weights.named_masters()
        repaired = repair_(
            masters, wrong, lambda: not_right(checked), train_again_, h.rounds_of_repair
        )
        self.weights.copy_masters_to_model_()  # where an earlier round was the best
        left = variants.edits_of(repaired.wrong)
        done.repairs |= {
            "rounds": repaired.rounds,
            "epochs": repaired.epochs,
            "lost_edits": len(left),
        }
        done.finished = True
        if len(left) and self.share.world.is_main_process:
            logger.warning(
                "%d of %d edits do not hold after %d rounds of repair: %s. More epochs "
                "(`num_steps`), or other words for them, may help.",
                len(left),
                len(indices),
                repaired.rounds,
                self._named(left),
            )

    @contextmanager
    def _explaining(self, batch: Callable[[], np.ndarray]) -> Iterator[None]:
        """Context manager in which an error of a mini-batch says of which requests it is.

        Args:
            batch: Returns the edits of the mini-batch that comes next.
        """
        try:
            yield
        except LossNotFiniteError as error:
            raise NonFiniteLossError(
                f"{error} ({self._named(batch())}). The weights are as they were before the edit. "
                f"Lower `lr={self.hparams.lr}`, or use `dtype: float32` if it is float16."
            ) from None

    def _named(self, edits: np.ndarray) -> str:
        """Returns the first of these edits, as a text."""
        found = [self.edits.edits[int(i)] for i in edits[:_NAMED]]
        shown = "; ".join(f"request {e.request}: {e.prompt!r} -> {e.target!r}" for e in found)
        return f"{shown}; and {len(edits) - _NAMED} more" if len(edits) > _NAMED else shown


def _show_loss(bar: tqdm, done: Progress) -> None:
    if done.losses:
        name = "mini_batch" if done.depth_first else "epoch"
        bar.set_postfix({name: done.epoch}, loss=f"{done.losses[-1]:.4f}", refresh=False)
