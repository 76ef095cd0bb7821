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

from .ahead import ahead
from .errors import NonFiniteLossError
from .hparams import LocFTBFHyperParams
from .runner import Prepared, TextRunner
from .weights import TrainedWeights

logger = logging.getLogger(__name__)


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
    runner: TextRunner,
    weights: TrainedWeights,
    indices: np.ndarray,
    hparams: LocFTBFHyperParams,
    *,
    describe: Callable[[int], str] = str,
    progress: bool = False,
) -> LoopResult:
    """Trains `weights` on the edits `indices`, in place.

    Args:
        runner: Gives the losses of a batch of edits, with a graph to the parameters.
        weights: What is trained.
        indices: The edits, [N].
        hparams: Epochs, batch size, learning rate, thresholds and seed.
        describe: Names an edit in an error.
        progress: Show a progress bar.

    Raises:
        NonFiniteLossError: A loss or a weight became NaN or infinite. Restoring the weights is up
            to the caller, who holds the originals.
    """
    generator = torch.Generator().manual_seed(hparams.seed)
    step = _Step(runner, weights, hparams)
    result = LoopResult()
    n_batches = math.ceil(len(indices) / hparams.batch_size)
    with tqdm(
        total=hparams.num_steps * n_batches, desc="breadth-first", unit="step", disable=not progress
    ) as bar:
        for epoch in range(hparams.num_steps):
            order = indices[torch.randperm(len(indices), generator=generator).numpy()]
            batches = [
                order[start : start + hparams.batch_size]
                for start in range(0, len(order), hparams.batch_size)
            ]
            outcomes = []
            for parts in step.prepared(batches):
                outcomes.append(step.take_(parts))
                bar.update()
                if step.waits and not torch.isfinite(outcomes[-1][0]):
                    break
            losses, updated = _on_host(outcomes)
            for number, loss in enumerate(losses):
                if not math.isfinite(loss):
                    explained = _explain(loss, epoch, number, batches[number], describe, hparams)
                    raise NonFiniteLossError(explained)
            result.step_losses += losses
            result.n_updates += sum(updated)
            sizes = [len(batch) for batch in batches]
            result.losses.append(float(np.dot(losses, sizes)) / len(order))
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


Outcome = tuple[torch.Tensor, torch.Tensor]  # a mini-batch's loss, and whether it made an update


def _on_host(outcomes: list[Outcome]) -> tuple[list[float], list[bool]]:
    """Returns all losses and whether they made an update: the only wait for a GPU in an epoch."""
    losses, updated = (torch.stack(column).tolist() for column in zip(*outcomes, strict=True))
    return losses, updated


class _Step:
    """One mini-batch after another: losses, gradients and, above the threshold, an update."""

    def __init__(
        self, runner: TextRunner, weights: TrainedWeights, hparams: LocFTBFHyperParams
    ) -> None:
        self.runner = runner
        self.weights = weights
        self.threshold = hparams.batch_loss_threshold
        self.micro_batch = _MicroBatch(hparams.micro_batch_size or hparams.batch_size)
        self.optimizer = torch.optim.Adam(
            weights.masters, lr=hparams.lr, weight_decay=hparams.weight_decay, fused=True
        )
        # A CPU has nothing to wait for, and then saves what follows a loss below the threshold.
        self.waits = runner.device.type == "cpu"

    def prepared(self, batches: list[np.ndarray]) -> Iterator[list[Prepared]]:
        """Yields each mini-batch's micro-batches, ready on the device."""
        return ahead(
            self._parts,
            batches,
            self.runner.device,
            move=lambda parts: (tensor for part in parts for tensor in part.tensors()),
            in_thread=self.runner.waits,
        )

    def _parts(self, batch: np.ndarray) -> list[Prepared]:
        lengths = self.runner.texts.input_lengths[batch]
        return [self.runner.prepare(part) for part in self.micro_batch.split(batch, lengths)]

    def _again(self, parts: list[Prepared]) -> list[Prepared]:
        return self._parts(np.concatenate([part.batch for part in parts]))

    def take_(self, parts: list[Prepared]) -> Outcome:
        """Makes one step on a mini-batch."""
        if max(part.n_texts for part in parts) > self.micro_batch.size:
            parts = self._again(parts)  # made ahead, before memory ran out
        while True:
            self.weights.clear_gradients_()
            try:
                loss, update = self._gradients_(parts)
                break
            except torch.cuda.OutOfMemoryError as error:
                self.micro_batch.halve(parts, error)
            # Outside the handler: the exception's frames hold the tensors that have to go.
            torch.cuda.empty_cache()
            parts = self._again(parts)
        if update is None:
            return loss, torch.tensor(False, device=loss.device)
        if self.waits:
            if update:
                self.optimizer.step()
                self.weights.publish_()
            return loss, update
        # A fused Adam leaves everything as it is where this says so: nobody waits for a GPU.
        self.optimizer.found_inf = (~update).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.weights.publish_()
        return loss, update

    def _gradients_(self, parts: list[Prepared]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the mini-batch's loss and gradients; returns it and whether to update.

        Where the answer costs nothing, `None` says that there are no gradients to update with.
        """
        n_edits = sum(part.n_texts for part in parts)
        losses = []
        for part in parts:
            loss = self.runner.edit_losses(part).sum() / n_edits
            if self.waits and len(parts) == 1 and not loss >= self.threshold:
                return loss.detach(), None  # NaN as well
            (loss * self.weights.loss_scale).backward()
            self.weights.collect_gradients_()
            losses.append(loss.detach())
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return total, torch.isfinite(total) & (total >= self.threshold)


class _MicroBatch:
    """How many edits one forward pass takes: halved for good when the GPU's memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def split(self, batch: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Returns micro-batches of about as many tokens each; one is the batch as it is."""
        n_parts = math.ceil(len(batch) / self.size)
        if n_parts == 1:
            return [batch]
        # Longest first, dealt to and fro: no part gets all the long ones.
        order = np.argsort(-lengths, kind="stable")
        turn = np.arange(len(batch)) % (2 * n_parts)
        part = np.where(turn < n_parts, turn, 2 * n_parts - 1 - turn)
        return [batch[np.sort(order[part == i])] for i in range(n_parts)]

    def halve(self, parts: list[Prepared], error: Exception) -> None:
        used = max(part.n_texts for part in parts)
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


def _explain(
    loss: float,
    epoch: int,
    number: int,
    batch: np.ndarray,
    describe: Callable[[int], str],
    hparams: LocFTBFHyperParams,
) -> str:
    shown = "; ".join(describe(int(i)) for i in batch[:3])
    more = f"; and {len(batch) - 3} more" if len(batch) > 3 else ""
    return (
        f"The loss became {loss} in epoch {epoch + 1}, mini-batch "
        f"{number + 1} ({shown}{more}). The weights are as they were "
        f"before the edit. Lower `lr={hparams.lr}`, or use `dtype: float32` if it is float16."
    )
