"""What an edit did to a model: figures, and the trained matrices' values before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.requests import EditSet
from ..modeling.parameter_slices import parameters_named
from .health_report import HealthReport
from .lora import LoraAdapter
from .trained_weights import values_swapped, write_

if TYPE_CHECKING:
    from .choice import Choice


@dataclass
class EditResult:
    """What an edit did to a model.

    Attributes:
        losses: Mean loss of each epoch; depth-first, over all mini-batches after each step on them.
        step_losses: Loss of each step.
        original: The trained parameters' values before, by name.
        new: Their values after.
        timings: Seconds by phase: `prepare` (checks and tokens), `preserve` (what is to be kept is
            measured), `prefix`, `train`.
        n_updates: Mini-batches that made an update, of the epochs; so are the losses. What came
            after them is in `repairs`.
        converged: Whether training stopped because the loss fell below the threshold.
        n_trained: Distinct edits that were trained.
        edits: The distinct edits, and how many requests were merged, in conflict or left out.
        packed: Whether rows were packed.
        frozen_prefix: Whether the frozen layers were computed only once.
        lora: What `tuning: lora` trained: the change from `original` to `new`, before rounding.
        health: Whether the edit has hurt the model; `None` with `health_check: false`.
        choice: What `layers: auto` has chosen, and among what; `None` where the place was given.
        repairs: What a check after the epochs found, and what was trained again: texts that were
            checked and wrong, rounds and epochs of repair, edits that are lost all the same; `None`
            where nothing was checked.
        augmented: The forms and rewordings that were trained, and what was left out; `None` without
            any.
        preserved: What was measured to be preserved, by source; `None` without `preserve`.
    """

    losses: list[float]
    step_losses: list[float]
    original: dict[str, torch.Tensor]
    new: dict[str, torch.Tensor]
    timings: dict[str, float]
    n_updates: int
    converged: bool
    n_trained: int
    edits: EditSet
    packed: bool
    frozen_prefix: bool
    lora: LoraAdapter | None = None
    health: HealthReport | None = None
    choice: Choice | None = None
    repairs: dict[str, int] | None = None
    augmented: dict[str, Any] | None = None
    preserved: dict[str, Any] | None = None

    def restore_(self, model: nn.Module) -> None:
        """Gives `model` the original values back, bit for bit."""
        write_(parameters_named(model, self.original), self.original)

    def apply_(self, model: nn.Module) -> None:
        """Gives `model` the edited values."""
        write_(parameters_named(model, self.new), self.new)

    @contextmanager
    def switched_off(self, model: nn.Module) -> Iterator[None]:
        """Context manager that takes the edit out of `model`; afterwards it is as on entering.

        One model serves both: only the trained matrices are exchanged.
        """
        with values_swapped(model, self.original):
            yield

    @contextmanager
    def switched_on(self, model: nn.Module) -> Iterator[None]:
        """Context manager that puts the edit into `model`; afterwards it is as on entering."""
        with values_swapped(model, self.new):
            yield

    def summary(self) -> dict[str, Any]:
        """Returns the figures without the tensors, ready for JSON."""
        return {
            "losses": self.losses,
            "epochs": len(self.losses),
            "updates": self.n_updates,
            "converged": self.converged,
            "requests": self.edits.n_requests,
            "trained_edits": self.n_trained,
            "merged_duplicates": self.edits.n_merged,
            "conflicting_prompts": self.edits.n_conflicts,
            "replaced_by_later": self.edits.n_replaced,
            "trained_parameters": {name: list(value.shape) for name, value in self.new.items()},
            "lora": None if self.lora is None else self.lora.summary(),
            "packed": self.packed,
            "frozen_prefix": self.frozen_prefix,
            "health": None if self.health is None else self.health.to_dict(),
            "choice": None if self.choice is None else self.choice.to_dict(),
            "repairs": self.repairs,
            "augmented": self.augmented,
            "preserved": self.preserved,
            "seconds": self.timings,
        }
