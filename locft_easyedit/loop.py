"""The breadth-first training loop of LocFT-BF ("Fine-tuning Done Right in Model Editing").

Ordinary training, restored to model editing: epochs over all edits, shuffled, in mini-batches,
with Adam on the trained matrices alone (arXiv 2509.22072, section 4).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from .errors import NonFiniteLossError
from .hparams import LocFTBFHyperParams
from .weights import TrainedWeights

logger = logging.getLogger(__name__)

EditLosses = Callable[[np.ndarray], torch.Tensor]


@dataclass
class LoopResult:
    """What the loop did.

    Attributes:
        losses: Mean loss of each epoch, over all edits.
        step_losses: Loss of each mini-batch, in order.
        n_updates: Mini-batches that made an update.
        converged: Whether the last epoch's loss was below the threshold.
    """

    losses: list[float] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    n_updates: int = 0
    converged: bool = False


def breadth_first_(
    edit_losses: EditLosses,
    weights: TrainedWeights,
    indices: np.ndarray,
    hparams: LocFTBFHyperParams,
    *,
    describe: Callable[[int], str] = str,
    progress: bool = False,
) -> LoopResult:
    """Trains `weights` on the edits `indices`, in place.

    Args:
        edit_losses: Gives the losses of a batch of edits, [B], with a graph to the parameters.
        weights: What is trained.
        indices: The edits, [N].
        hparams: Epochs, batch size, learning rate, thresholds and seed.
        describe: Names an edit in an error.
        progress: Show a progress bar.

    Raises:
        NonFiniteLossError: A loss or a weight became NaN or infinite. Restoring the weights is up
            to the caller, who holds the originals.
    """
    optimizer = torch.optim.Adam(
        weights.masters, lr=hparams.lr, weight_decay=hparams.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(hparams.seed)
    micro_batch = _MicroBatch(hparams.micro_batch_size or hparams.batch_size)
    result = LoopResult()
    n_batches = math.ceil(len(indices) / hparams.batch_size)
    with tqdm(
        total=hparams.num_steps * n_batches, desc="breadth-first", unit="step", disable=not progress
    ) as bar:
        for epoch in range(hparams.num_steps):
            order = indices[torch.randperm(len(indices), generator=generator).numpy()]
            total = 0.0
            for start in range(0, len(order), hparams.batch_size):
                batch = order[start : start + hparams.batch_size]
                loss, updated = _step_(edit_losses, weights, optimizer, batch, hparams, micro_batch)
                if not math.isfinite(loss):
                    raise NonFiniteLossError(_explain(loss, epoch, start, batch, describe, hparams))
                result.step_losses.append(loss)
                result.n_updates += updated
                total += loss * len(batch)
                bar.update()
            result.losses.append(total / len(order))
            bar.set_postfix(epoch=epoch + 1, loss=f"{result.losses[-1]:.4f}")
            if result.losses[-1] < hparams.epoch_loss_threshold:
                result.converged = True
                break
    weights.clear_gradients_()
    if not weights.finite():
        raise NonFiniteLossError(
            "The last update made a weight NaN or infinite; the weights are as they were before "
            f"the edit. Lower `lr={hparams.lr}`."
        )
    return result


class _MicroBatch:
    """How many edits one forward pass takes: halved for good when the GPU's memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def split(self, batch: np.ndarray) -> Iterator[np.ndarray]:
        for i in range(0, len(batch), self.size):
            yield batch[i : i + self.size]

    def halve(self, batch: np.ndarray, error: Exception) -> None:
        used = min(self.size, len(batch))
        if used == 1:
            raise error
        self.size = used // 2
        logger.warning(
            "%d edits in one forward pass do not fit into the GPU's memory; %d at a time, with "
            "gradients added up, give the same mini-batch. `micro_batch_size: %d` starts there.",
            used,
            self.size,
            self.size,
        )


def _step_(
    edit_losses: EditLosses,
    weights: TrainedWeights,
    optimizer: torch.optim.Optimizer,
    batch: np.ndarray,
    hparams: LocFTBFHyperParams,
    micro_batch: _MicroBatch,
) -> tuple[float, bool]:
    """Makes one update; returns the mini-batch's loss and whether there was an update."""
    while True:
        weights.clear_gradients_()
        try:
            loss, has_gradients = _gradients_(edit_losses, weights, batch, hparams, micro_batch)
            break
        except torch.cuda.OutOfMemoryError as error:
            micro_batch.halve(batch, error)
        # Outside the handler: the exception's frames hold the tensors that have to go.
        torch.cuda.empty_cache()
    update = has_gradients and math.isfinite(loss) and loss >= hparams.batch_loss_threshold
    if update:
        optimizer.step()
        weights.publish_()
    return loss, update


def _gradients_(
    edit_losses: EditLosses,
    weights: TrainedWeights,
    batch: np.ndarray,
    hparams: LocFTBFHyperParams,
    micro_batch: _MicroBatch,
) -> tuple[float, bool]:
    """Computes the mini-batch's loss and gradients; returns the loss and whether there are any."""
    parts = list(micro_batch.split(batch))
    losses = []
    for part in parts:
        loss = edit_losses(part).sum() / len(batch)
        if len(parts) == 1:
            value = loss.item()  # waits for the GPU: the threshold needs the number
            if not value >= hparams.batch_loss_threshold:  # NaN as well
                return value, False
        (loss * weights.loss_scale).backward()
        weights.collect_gradients_()
        losses.append(loss.detach())
    return (value if len(parts) == 1 else torch.stack(losses).sum().item()), True


def _explain(
    loss: float,
    epoch: int,
    start: int,
    batch: np.ndarray,
    describe: Callable[[int], str],
    hparams: LocFTBFHyperParams,
) -> str:
    shown = "; ".join(describe(int(i)) for i in batch[:3])
    more = f"; and {len(batch) - 3} more" if len(batch) > 3 else ""
    return (
        f"The loss became {loss} in epoch {epoch + 1}, mini-batch "
        f"{start // hparams.batch_size + 1} ({shown}{more}). The weights are as they were "
        f"before the edit. Lower `lr={hparams.lr}`, or use `dtype: float32` if it is float16."
    )
