"""How far a training has come: all of it that is not weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ..errors import NonFiniteLossError

# What is noted of repairs: texts that were checked, and of them did not hold after the epochs;
# rounds and epochs of repair; edits that do not hold after the best round so far.
REPAIRS = ("checked_texts", "wrong_texts", "rounds", "epochs", "lost_edits")


class LossNotFiniteError(NonFiniteLossError):
    """A mini-batch's loss or gradient is NaN or infinite; the session adds its requests."""


class Outcome(NamedTuple):
    """What a step on a mini-batch did: scalars, which are still on the device.

    Attributes:
        loss: The mean loss of the mini-batch.
        updated: Whether an update was made.
        finite: Whether its gradients were finite; no update was made where not.
    """

    loss: torch.Tensor
    updated: torch.Tensor
    finite: torch.Tensor


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        shuffling: State of the shuffling's random generator when the present epoch began, uint8.
        epoch: Epochs that are done; of a depth-first training, mini-batches.
        step: Mini-batches of the present epoch that are done; depth-first, steps on the present
            mini-batch.
        losses: Mean loss of each epoch, over all edits; depth-first, the last one of each
            mini-batch as long as training goes on, and then the mean after each step (see `loop`).
        step_losses: Loss of each step, in order.
        n_updates: Mini-batches that made an update.
        converged: Whether the last epoch's loss, or depth-first each mini-batch's, was below the
            threshold.
        finished: Whether training is over.
        micro_batch_size: Texts that one forward pass takes.
        seconds: What training has taken, in all its parts.
        repairs: What repairs came to by now, by the names in `REPAIRS`; `None` before they begin.
        depth_first: Whether mini-batches are trained one after the other.
        unsettled: What steps did, as long as it is on the device alone; `step`, `step_losses` and
            `n_updates` are without them.
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
    repairs: dict[str, int] | None = None
    depth_first: bool = False
    unsettled: list[Outcome] = field(default_factory=list, repr=False)

    @classmethod
    def start(cls, seed: int, micro_batch_size: int, *, depth_first: bool = False) -> Progress:
        """Returns the beginning of a training that shuffles with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        return cls(
            generator.get_state(), micro_batch_size=micro_batch_size, depth_first=depth_first
        )

    def add(self, outcome: Outcome, micro_batch_size: int) -> None:
        """Notes what a step did, without waiting for the device.

        Args:
            outcome: What it did.
            micro_batch_size: Texts that one forward pass takes by now.
        """
        self.unsettled.append(outcome)
        self.micro_batch_size = micro_batch_size

    def settle(self) -> None:
        """Fetches from the device what mini-batches did: the host waits for the last of them.

        Raises:
            LossNotFiniteError: A loss or a gradient is NaN or infinite; `step` is its mini-batch.
        """
        if not self.unsettled:
            return
        columns = (torch.stack(column).tolist() for column in zip(*self.unsettled, strict=True))
        outcomes = zip(*columns, strict=True)
        self.unsettled.clear()
        for loss, updated, finite in outcomes:
            if not (finite and math.isfinite(loss)):
                what = f"The gradient of a loss of {loss:.4g} became infinite or NaN"
                if not math.isfinite(loss):
                    what = f"The loss became {loss}"
                raise LossNotFiniteError(f"{what} {self.where()}")
            self.step_losses.append(loss)
            self.n_updates += updated
            self.step += 1

    def where(self) -> str:
        """Returns which step comes next, as the end of a sentence."""
        if self.depth_first:
            return f"in mini-batch {self.epoch + 1}, step {self.step + 1}"
        return f"in epoch {self.epoch + 1}, mini-batch {self.step + 1}"

    def so_far(self) -> str:
        """Returns how much has been trained, as the end of a sentence."""
        if self.repairs is not None:
            return "in the repairs that follow the epochs"
        if self.depth_first:
            return f"in mini-batch {self.epoch + 1}, after {self.step} of its steps"
        return f"in epoch {self.epoch + 1}, after {self.step} of its mini-batches"

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
