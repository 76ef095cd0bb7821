"""The training loop of LocFT-BF ("Fine-tuning Done Right in Model Editing"), and what it replaces.

Ordinary training, restored to model editing: epochs over all edits, shuffled, in mini-batches,
with Adam on the trained matrices alone (arXiv 2509.22072, section 4). A mini-batch whose loss is
below a threshold makes no update, and an epoch whose mean loss is below another ends the training.

The paper compares this breadth-first loop with the depth-first one of editors before it, which
trains one edit until it is learned, then the next, and so forgets the first ones (section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch

from ..data.training_texts import Variants
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import CONSTANT
from .progress import Progress
from .step import TrainingStep

_WARM_UP = 0.1  # of all steps


def train_breadth_first(
    step: TrainingStep,
    edits: np.ndarray,
    hparams: LocFTBFHyperParams,
    done: Progress,
    variants: Variants,
    enough: Callable[[], bool] | None = None,
) -> Generator[Progress, None, None]:
    """Trains on `edits` in place, from where `done` is; yields `done` after every mini-batch.

    Args:
        step: Makes a step on a mini-batch of texts.
        edits: Indices of the edits, [N].
        hparams: Epochs (`num_steps`), `batch_size`, `lr_schedule` and `epoch_loss_threshold`.
        done: How far training has come; brought up to date in place.
        variants: Which texts stand for an edit in an epoch.
        enough: Asked after each epoch, with the matrices as they are by then: true ends the
            training there.

    Raises:
        NonFiniteLossError: A loss or a weight became NaN or infinite. Restoring the weights is up
            to the caller, who holds the originals.
    """
    n_batches = math.ceil(len(edits) / hparams.batch_size)
    rate = rates(hparams.lr_schedule, hparams.num_steps * n_batches)
    while done.epoch < hparams.num_steps and not done.converged:
        batches, next_shuffling = shuffled_batches(edits, hparams.batch_size, done.shuffling)
        texts = [variants.texts(batch, done.epoch) for batch in batches[done.step :]]
        for number, batch in enumerate(step.prefetched(texts), done.epoch * n_batches + done.step):
            done.add(step.take_(batch, rate(number)), step.micro_batch.size)
            if step.host_may_sync:
                done.settle()
            yield done
        with step.share.world.warning_of_waits("an epoch's losses"):
            done.end_epoch([len(batch) for batch in batches], next_shuffling)
        done.converged = done.losses[-1] < hparams.epoch_loss_threshold or (
            enough is not None and enough()
        )
    step.finish_()
    done.finished = True


def train_depth_first(
    step: TrainingStep,
    edits: np.ndarray,
    hparams: LocFTBFHyperParams,
    done: Progress,
    variants: Variants,
) -> Generator[Progress, None, None]:
    """Trains one mini-batch after another, each until its loss is below the threshold.

    In the order given, with Adam beginning anew for each, as EasyEdit's `FT` does in sequential
    editing. Arguments and errors are those of `train_breadth_first`; of `hparams` `num_steps` (of
    each mini-batch at most), `batch_size` and `batch_loss_threshold` count.
    """
    batches = _in_batches(edits, hparams.batch_size)
    while done.epoch < len(batches):
        batch = batches[done.epoch]
        if done.step == 0:
            step.begin_again_()
        while done.step < hparams.num_steps and not (
            done.step and done.step_losses[-1] < hparams.batch_loss_threshold
        ):
            for one in step.prefetched([variants.texts(batch, done.step)]):
                done.add(step.take_(one), step.micro_batch.size)
            with step.share.world.warning_of_waits("a mini-batch's loss"):
                done.settle()
            yield done
        done.end_epoch([len(batch)], done.shuffling)
    done.converged = max(done.losses) < hparams.batch_loss_threshold
    done.losses = _losses_by_step(done.step_losses, [len(batch) for batch in batches], hparams)
    done.epoch = len(done.losses)
    step.finish_()
    done.finished = True


def _losses_by_step(
    losses: Sequence[float], sizes: Sequence[int], hparams: LocFTBFHyperParams
) -> list[float]:
    """Returns the mean loss over all edits after each step on their mini-batch.

    A mini-batch that has ended counts with its last loss: so this compares with epochs.
    """
    curves: list[list[float]] = []
    for loss in losses:
        ended = not curves or len(curves[-1]) == hparams.num_steps
        if ended or curves[-1][-1] < hparams.batch_loss_threshold:
            curves.append([])
        curves[-1].append(loss)
    return [
        float(np.average([curve[min(k, len(curve) - 1)] for curve in curves], weights=sizes))
        for k in range(max(map(len, curves)))
    ]


def rates(schedule: str, n_steps: int) -> Callable[[int], float]:
    """Returns what the learning rate is multiplied by in each of `n_steps` steps, from 0."""
    if schedule == CONSTANT:
        return lambda _: 1.0
    rise = max(1, round(_WARM_UP * n_steps))

    def cosine(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / (n_steps - rise))) / 2

    return cosine


def batch_of(edits: np.ndarray, batch_size: int, done: Progress) -> np.ndarray:
    """Returns the edits of the mini-batch that comes next."""
    if done.depth_first:
        return _in_batches(edits, batch_size)[done.epoch]
    return shuffled_batches(edits, batch_size, done.shuffling)[0][done.step]


def shuffled_batches(
    edits: np.ndarray, batch_size: int, shuffling: torch.Tensor
) -> tuple[list[np.ndarray], torch.Tensor]:
    """Returns the mini-batches of an epoch, and the state that the next epoch shuffles with.

    Args:
        edits: Indices of the edits, [N].
        batch_size: Edits in a mini-batch; the last one takes what is left.
        shuffling: State of the random generator, uint8.
    """
    generator = torch.Generator()
    generator.set_state(shuffling)
    order = edits[torch.randperm(len(edits), generator=generator).numpy()]
    return _in_batches(order, batch_size), generator.get_state()


def _in_batches(edits: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [edits[start : start + batch_size] for start in range(0, len(edits), batch_size)]
