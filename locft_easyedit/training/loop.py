"""The breadth-first training loop of LocFT-BF ("Fine-tuning Done Right in Model Editing").

Ordinary training, restored to model editing: epochs over all edits, shuffled, in mini-batches,
with Adam on the trained matrices alone (arXiv 2509.22072, section 4). A mini-batch whose loss is
below a threshold makes no update, and an epoch whose mean loss is below another ends the training.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch

from ..data.training_texts import Variants
from ..hparams import LocFTBFHyperParams
from .progress import Progress
from .step import TrainingStep


def train_breadth_first(
    step: TrainingStep,
    edits: np.ndarray,
    hparams: LocFTBFHyperParams,
    done: Progress,
    variants: Variants,
) -> Generator[Progress, None, None]:
    """Trains on `edits` in place, from where `done` is; yields `done` after every mini-batch.

    Args:
        step: Makes a step on a mini-batch of texts.
        edits: Indices of the edits, [N].
        hparams: Epochs (`num_steps`), `batch_size` and `epoch_loss_threshold`.
        done: How far training has come; brought up to date in place.
        variants: Which texts stand for an edit in an epoch.

    Raises:
        NonFiniteLossError: A loss or a weight became NaN or infinite. Restoring the weights is up
            to the caller, who holds the originals.
    """
    while done.epoch < hparams.num_steps and not done.converged:
        batches, next_shuffling = shuffled_batches(edits, hparams.batch_size, done.shuffling)
        texts = [variants.texts(batch, done.epoch) for batch in batches[done.step :]]
        for batch in step.prefetched(texts):
            done.add(step.take_(batch), step.micro_batch.size)
            if step.host_may_sync:
                done.settle()
            yield done
        with step.share.world.warning_of_waits("an epoch's losses"):
            done.end_epoch([len(batch) for batch in batches], next_shuffling)
        done.converged = done.losses[-1] < hparams.epoch_loss_threshold
    step.finish_()
    done.finished = True


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
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches, generator.get_state()
