"""One training step: the losses of a mini-batch, their gradients, and an update by Adam."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..distributed.world import Partition
from ..errors import NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..modeling.fsdp import lockstep
from ..prefix.prefetch import prefetch
from ..prefix.runner import Prepared, TextRunner
from .trained_weights import TrainedWeights

logger = logging.getLogger(__name__)


class TrainingStep:
    """One mini-batch after another: losses, gradients and, above the threshold, an update.

    Args:
        runner: Gives the losses of a batch of texts, with a graph to the parameters; where several
            processes train together, of this one's share.
        weights: What is trained.
        hparams: Batch size, learning rate, weight decay and the threshold of an update.
        share: Which texts this process runs.
        texts_per_edit: Texts that stand for an edit in an epoch, at most.
        adam: What Adam is given beside the rate; by default PyTorch's values, and `weight_decay`.

    Attributes:
        optimizer: Adam on the float32 masters.
        micro_batch: How many texts one forward pass takes.
        host_may_sync: Whether reading a number of the device costs nothing: on a CPU. On a GPU the
            host runs ahead, and must not wait for each loss.
    """

    def __init__(
        self,
        runner: TextRunner,
        weights: TrainedWeights,
        hparams: LocFTBFHyperParams,
        share: Partition,
        *,
        texts_per_edit: int = 1,
        adam: Mapping[str, Any] | None = None,
    ) -> None:
        self.runner = runner
        self.share = share
        self.weights = weights
        self.threshold = hparams.batch_loss_threshold
        self.lr = hparams.lr
        edits = hparams.micro_batch_size or hparams.batch_size
        self.micro_batch = MicroBatch(edits, texts_per_edit)
        self.optimizer = torch.optim.Adam(
            weights.masters,
            lr=hparams.lr,
            fused=True,
            **{"weight_decay": hparams.weight_decay} | dict(adam or {}),
        )
        self.host_may_sync = runner.device.type == "cpu"

    def prefetched(self, batches: list[np.ndarray]) -> Iterator[list[Prepared]]:
        """Yields this process's micro-batches of each mini-batch, on the device.

        The next ones are laid out and copied while the caller runs the present ones.

        Args:
            batches: The texts of each mini-batch.
        """
        return prefetch(
            self.micro_batches,
            batches,
            self.runner.device,
            move=lambda parts: (tensor for part in parts for tensor in part.tensors()),
            in_thread=self.runner.prefetch_in_thread,
            also=[] if self.runner.prefix is None else [self.runner.prefix.device],
        )

    def micro_batches(self, batch: np.ndarray) -> list[Prepared]:
        """Returns this process's share of a mini-batch of texts, [B], on the device, in parts."""
        return self._divided(self.share.positions_of(batch))

    def _divided(self, texts: np.ndarray) -> list[Prepared]:
        lengths = self.runner.texts.input_lengths[texts]
        return [self.runner.prepare(part) for part in self.micro_batch.split(texts, lengths)]

    def _divided_again(self, parts: list[Prepared]) -> list[Prepared]:
        return self._divided(np.concatenate([part.batch for part in parts]))

    def take_(self, parts: list[Prepared], n_texts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes one step on a mini-batch, in place.

        Args:
            parts: This process's share of it, in micro-batches.
            n_texts: Texts of the whole mini-batch.

        Returns:
            The mean loss of the mini-batch and whether an update was made: two scalars, which are
            still on the device.
        """
        if max((part.n_texts for part in parts), default=0) > self.micro_batch.size:
            parts = self._divided_again(parts)  # made ahead, before memory ran out
        # Ranks with less to run wait for those with more, or that run theirs again in parts.
        with lockstep(self.runner.model):
            loss, known_below = self._own_gradients_(parts, n_texts)
        if known_below:
            return loss, torch.tensor(False, device=loss.device)
        # All that ranks exchange in a step.
        self.share.world.sum_(chain([loss], self.weights.gradients_()))
        update = torch.isfinite(loss) & (loss >= self.threshold)
        if self.host_may_sync:
            if update:
                self.optimizer.step()
                self.weights.copy_masters_to_model_()
            return loss, update
        # A fused Adam leaves everything as it is where this says so: the host need not wait.
        self.optimizer.found_inf = (~update).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.weights.copy_masters_to_model_()
        return loss, update

    def finish_(self) -> None:
        """Leaves the same trained values in the models of all ranks.

        Raises:
            NonFiniteLossError: The last update made a weight NaN or infinite.
        """
        self.weights.clear_gradients_()
        # The same sums were added to all; unlike GPUs may still have rounded them differently.
        self.share.world.broadcast_(self.weights.masters)
        self.weights.copy_masters_to_model_()
        if not self.weights.finite():
            raise NonFiniteLossError(
                "The last update made a weight NaN or infinite; the weights are as they were "
                f"before the edit. Lower `lr={self.lr}`."
            )

    def _own_gradients_(self, parts: list[Prepared], n_texts: int) -> tuple[torch.Tensor, bool]:
        """Computes this process's share of the mini-batch's loss and gradients.

        Returns it, and whether it is below the threshold, where that costs nothing to know: there
        are no gradients then.
        """
        while True:
            self.weights.clear_gradients_()
            try:
                return self._summed_(parts, n_texts)
            except torch.cuda.OutOfMemoryError as error:
                self.micro_batch.halve(parts, error)
            # Outside the handler: the exception's frames hold the tensors that have to go.
            torch.cuda.empty_cache()
            parts = self._divided_again(parts)

    def _summed_(self, parts: list[Prepared], n_texts: int) -> tuple[torch.Tensor, bool]:
        losses = []
        # Then what follows a loss below the threshold is saved.
        known_at_once = (
            self.host_may_sync and len(parts) == 1 and not self.share.world.is_distributed
        )
        for part in parts:
            loss = self.runner.edit_losses(part).sum() / n_texts
            if known_at_once and not loss >= self.threshold:
                return loss.detach(), True  # NaN as well
            (loss * self.weights.loss_scale).backward()
            self.weights.collect_gradients_()
            losses.append(loss.detach())
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=self.runner.device)
        return total, False


class MicroBatch:
    """How many texts one forward pass takes: halved for good when the GPU's memory runs out.

    Args:
        edits: How many edits to begin with.
        texts_each: Texts of an edit.
    """

    def __init__(self, edits: int, texts_each: int = 1) -> None:
        self.size = edits * texts_each
        self._texts_each = texts_each

    def split(self, batch: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Returns micro-batches of about as many tokens each; one is the batch as it is."""
        n_parts = math.ceil(len(batch) / self.size)
        if n_parts <= 1:
            return [batch] if n_parts else []
        # Longest first, dealt to and fro: no part gets all the long ones.
        order = np.argsort(-lengths, kind="stable")
        turn = np.arange(len(batch)) % (2 * n_parts)
        part = np.where(turn < n_parts, turn, 2 * n_parts - 1 - turn)
        return [batch[np.sort(order[part == i])] for i in range(n_parts)]

    def halve(self, parts: list[Prepared], error: Exception) -> None:
        """Halves what one forward pass takes, with a warning; raises `error` at a single text."""
        used = max(part.n_texts for part in parts)
        if used == 1:
            raise error
        self.size = used // 2
        logger.warning(
            "%d texts in one forward pass do not fit into the GPU's memory; %d at a time, with "
            "gradients added up, give the same mini-batch. `micro_batch_size: %d` starts there.",
            used,
            self.size,
            max(1, self.size // self._texts_each),
        )
