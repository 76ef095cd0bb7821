"""One training step: the losses of a mini-batch, their gradients, and an update by Adam."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..distributed.world import Partition
from ..errors import NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import TOKEN
from ..modeling.fsdp import lockstep
from ..prefix.prefetch import prefetch
from ..prefix.runner import Prepared, TextRunner
from ..utils.memory import is_out_of_memory
from .progress import Outcome
from .trained_weights import TrainedWeights

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class MiniBatch:
    """A mini-batch of texts, of which this process has a share.

    Attributes:
        own: The texts of this process's share, [b].
        total: What the sum of the whole mini-batch's weighted losses is divided by.
        parts: The share in micro-batches, on the device; `None` before they are prepared, and
            where they had to go. Nothing else may hold them: they are most of what memory that has
            run out can get back.
        ran_out: Whether memory ran out when they were prepared.
    """

    own: np.ndarray
    total: float
    parts: list[Prepared] | None = None
    ran_out: bool = False

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields what lies on the device."""
        for part in self.parts or ():
            yield from part.tensors()


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
        target_tokens: How many tokens each target has, of all texts, [T]: with `loss_average:
            token` a text weighs as much.

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
        target_tokens: np.ndarray | None = None,
    ) -> None:
        self.runner = runner
        by_token = hparams.loss_average == TOKEN
        assert not by_token or target_tokens is not None
        self._weights = target_tokens if by_token else None
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

    def prefetched(self, batches: list[np.ndarray]) -> Iterator[MiniBatch]:
        """Yields the mini-batches, with this process's share of each on the device.

        The next one is laid out and copied while the caller runs the present one.

        Args:
            batches: The texts of each mini-batch.
        """
        return prefetch(
            self.prepared,
            batches,
            move=MiniBatch.tensors,
            in_thread=self.runner.prefetch_in_thread,
            sides=self.runner.sides,
        )

    def prepared(self, texts: np.ndarray) -> MiniBatch:
        """Returns a mini-batch of texts, [B], with this process's share on the device.

        Without it where memory runs out: the step before has to end first. Changes nothing that a
        running step uses.
        """
        total = len(texts) if self._weights is None else float(self._weights[texts].sum())
        batch = MiniBatch(self.share.positions_of(texts), total)
        try:
            batch.parts = self._divided(batch.own)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            batch.ran_out = True
        return batch

    def _divided(self, texts: np.ndarray) -> list[Prepared]:
        lengths = self.runner.texts.input_lengths[texts]
        return [self.runner.prepare(part) for part in self.micro_batch.split(texts, lengths)]

    def begin_again_(self) -> None:
        """Lets Adam forget what it has seen."""
        self.optimizer.state.clear()

    def take_(self, batch: MiniBatch, rate: float = 1.0) -> Outcome:
        """Makes one step on a mini-batch, in place, and lets go of what is prepared of it.

        Args:
            batch: The mini-batch.
            rate: What the learning rate is multiplied by.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        # Ranks with less to run wait for those with more, or that run theirs again in parts.
        with lockstep(self.runner.model):
            loss, known_below = self._own_gradients_(batch)
        batch.parts = None
        if known_below:
            no = torch.tensor(False, device=loss.device)
            return Outcome(loss, no, ~no)
        # All that ranks exchange in a step.
        self.share.world.sum_(chain([loss], self.weights.gradients_()))
        finite = self.weights.finite_gradients().to(loss.device)
        update = torch.isfinite(loss) & (loss >= self.threshold) & finite
        outcome = Outcome(loss, update, finite)
        if self.host_may_sync:
            if update:
                self.optimizer.step()
                self.weights.copy_masters_to_model_()
            return outcome
        # A fused Adam leaves everything as it is where this says so: the host need not wait.
        self.optimizer.found_inf = (~update).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.weights.copy_masters_to_model_()
        return outcome

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

    def _own_gradients_(self, batch: MiniBatch) -> tuple[torch.Tensor, bool]:
        """Computes this process's share of the mini-batch's loss and gradients.

        Returns it, and whether it is below the threshold, where that costs nothing to know: there
        are no gradients then.
        """
        if batch.ran_out:  # beside the step before: there may be room for it alone
            self.micro_batch.halve(len(batch.own))
            torch.cuda.empty_cache()
        if any(part.n_texts > self.micro_batch.size for part in batch.parts or ()):
            batch.parts = None  # made ahead, before memory ran out
        while True:
            self.weights.clear_gradients_()
            try:
                if batch.parts is None:
                    batch.parts = self._divided(batch.own)
                return self._summed_(batch.parts, batch.total)
            except Exception as error:
                if not is_out_of_memory(error) or not self.micro_batch.halve(len(batch.own)):
                    raise
            # Outside the handler: the exception's frames hold the tensors that have to go.
            batch.parts = None
            torch.cuda.empty_cache()

    def _summed_(self, parts: list[Prepared], total: float) -> tuple[torch.Tensor, bool]:
        losses = []
        # Then what follows a loss below the threshold is saved.
        known_at_once = (
            self.host_may_sync and len(parts) == 1 and not self.share.world.is_distributed
        )
        for part in parts:
            loss = self._weighted(self.runner.edit_losses(part), part).sum() / total
            if known_at_once and not loss >= self.threshold:
                return loss.detach(), True  # NaN as well
            (loss * self.weights.loss_scale).backward()
            self.weights.collect_gradients_()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.runner.device)
        return loss, False

    def _weighted(self, losses: torch.Tensor, part: Prepared) -> torch.Tensor:
        """Returns the losses of a part's texts, [B], each times what it weighs."""
        if self._weights is None:
            return losses
        # Counted where the losses are: the host need not wait for a copy.
        owner = part.rows.owner.to(losses.device)
        return losses * torch.zeros_like(losses).index_add_(0, owner, losses.new_ones(len(owner)))


class MicroBatch:
    """How many texts one forward pass takes: halved for good when memory runs out.

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

    def halve(self, n_texts: int) -> bool:
        """Halves what one forward pass takes of `n_texts`, with a warning.

        Returns whether that was possible: of a single text there is no half.
        """
        if n_texts == 0 or (used := math.ceil(n_texts / math.ceil(n_texts / self.size))) == 1:
            return False
        self.size = used // 2
        logger.warning(
            "%d texts in one forward pass do not fit into memory; %d at a time, with gradients "
            "added up, give the same mini-batch. `micro_batch_size: %d` starts there.",
            used,
            self.size,
            max(1, self.size // self._texts_each),
        )
        return True
