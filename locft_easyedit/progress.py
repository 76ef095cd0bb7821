"""How far a training has come: all of it that is not weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


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
        micro_batch_size: Edits that one forward pass takes.
        seconds: What training has taken, in all its parts.
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

    @classmethod
    def start(cls, seed: int, micro_batch_size: int) -> Progress:
        """Returns the beginning of a training that shuffles with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        return cls(generator.get_state(), micro_batch_size=micro_batch_size)
