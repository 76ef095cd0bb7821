"""How far a training has come: all of it that is not weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import NonFiniteLossError


class LossNotFiniteError(NonFiniteLossError):
    """A mini-batch's loss is NaN or infinite; the session adds which requests it holds."""


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        shuffling: State of the shuffling's random generator when the present epoch began, uint8.
        epoch: Epochs that are done.
        step: Mini-batches of the present epoch that are done.
        losses: Mean loss of each epoch, over all edits.
        step_losses: Loss of each mini-batch, in order.
        n_updates: Mini-batches that made an update.
        converged: Whether the last epoch's loss was below the threshold.
        finished: Whether training is over.
        micro_batch_size: Texts that one forward pass takes.
        seconds: What training has taken, in all its parts.
        unsettled: Losses, and whether each made an update, that are still on the device alone;
            `step`, `step_losses` and `n_updates` are without them.
    """

    shuffling: torch.Tensor
    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    n_updates: int = 0
    converged: bool = False
    finished: bool = False
    micro_batch_size: int = 0
    seconds: float = 0.0
    unsettled: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)

    @classmethod
    def start(cls, seed: int, micro_batch_size: int) -> Progress:
        """Returns the beginning of a training that shuffles with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        return cls(generator.get_state(), micro_batch_size=micro_batch_size)

    def add(self, loss: torch.Tensor, updated: torch.Tensor, micro_batch_size: int) -> None:
        """Notes what a mini-batch did, without waiting for the device.

        Args:
            loss: Its mean loss, a scalar.
            updated: Whether it made an update, a scalar.
            micro_batch_size: Texts that one forward pass takes by now.
        """
        self.unsettled.append((loss, updated))
        self.micro_batch_size = micro_batch_size

    def settle(self) -> None:
        """Fetches from the device what mini-batches did: the host waits for the last of them.

        Raises:
            LossNotFiniteError: A loss is NaN or infinite; `step` is its mini-batch.
        """
        if not self.unsettled:
            return
        losses, updates = (
            torch.stack(column).tolist() for column in zip(*self.unsettled, strict=True)
        )
        self.unsettled.clear()
        for loss, updated in zip(losses, updates, strict=True):
            if not math.isfinite(loss):
                raise LossNotFiniteError(
                    f"The loss became {loss} in epoch {self.epoch + 1}, mini-batch {self.step + 1}"
                )
            self.step_losses.append(loss)
            self.n_updates += updated
            self.step += 1

    def end_epoch(self, sizes: Sequence[int], shuffling: torch.Tensor) -> None:
        """Begins the next epoch.

        Args:
            sizes: Edits in each mini-batch of the epoch.
            shuffling: State of the random generator that the next one shuffles with.

        Raises:
            LossNotFiniteError: As for `settle`.
        """
        self.settle()
        self.losses.append(float(np.dot(self.step_losses[-len(sizes) :], sizes)) / sum(sizes))
        self.epoch, self.step, self.shuffling = self.epoch + 1, 0, shuffling
