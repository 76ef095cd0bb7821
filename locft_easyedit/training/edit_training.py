"""One training of a session's edits: shown, saved and stopped, and repaired where it is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
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
from .edit_repair import EditRepair
from .loop import batch_of, train_breadth_first, train_depth_first
from .progress import LossNotFiniteError, Progress
from .step import TrainingStep
from .trained_weights import TrainedWeights


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
        h = self.hparams.of_edits(len(indices))
        weights, checkpoints = self.weights, self.checkpoints
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
            try:
                for _ in steps:
                    bar.update(max(1, done.epoch * of_a_round + done.step - bar.n))
                    _show_loss(bar, done)
                    if checkpoints is not None and checkpoints.due():
                        with self.share.world.warning_of_waits("the losses so far"):
                            done.settle()
                        checkpoints.save(done, weights, step.optimizer)
            except LossNotFiniteError as error:
                named = self.edits.named(batch_of(indices, h.batch_size, done).tolist())
                raise NonFiniteLossError(
                    f"{error} ({named}). The weights are as they were before the edit. "
                    f"Lower `lr={h.lr}`, or use `dtype: float32` if it is float16."
                ) from None
            _show_loss(bar, done)
            bar.close()
            if h.rounds_of_repair:
                EditRepair(
                    step,
                    indices,
                    self.edits,
                    self.texts,
                    self.hparams,
                    done,
                    checkpoints=checkpoints,
                    progress=self.progress,
                ).run_()
            if checkpoints is not None:
                checkpoints.finish(done, weights)
        return done


def _show_loss(bar: tqdm, done: Progress) -> None:
    if done.losses:
        name = "mini_batch" if done.depth_first else "epoch"
        bar.set_postfix({name: done.epoch}, loss=f"{done.losses[-1]:.4f}", refresh=False)
