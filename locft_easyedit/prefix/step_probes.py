"""Trials of what makes a training step faster: its losses and their gradient with and without.

A pass without gradients would not show what goes wrong in the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.tokenization import TokenizedTexts
from ..distributed.world import brief
from ..modeling.compiled_layers import CompiledLayers, find_compilable
from ..modeling.cross_entropy import Head
from ..modeling.fused_linears import FusedLinears, find_fused
from ..modeling.layer_trace import entry_gradient
from ..modeling.parameter_slices import whole_of
from ..modeling.places import Place
from .cut import Cut
from .probes import REFUSALS, Probes, no_refusal, relative_error
from .runner import TextRunner

logger = logging.getLogger(__name__)


@dataclass
class StepProbes:
    """A few texts, and how a step runs them.

    Attributes:
        probes: The texts and the model.
        place: What is trained.
        packed: Whether rows are packed.
        head: The output head, for losses in chunks; `None` takes the model's own logits.
        shared: Whether texts share their beginnings in a row.
    """

    probes: Probes
    place: Place
    packed: bool
    head: Head | None
    shared: bool

    def fused(self, cuts: Sequence[Cut]) -> FusedLinears | None:
        """Returns the frozen matrices of one input in the layers that every step runs.

        Args:
            cuts: Where the frozen prefix may end; without one, every step runs all layers.
        """
        layers = self._layers(min((cut.first_layer for cut in cuts), default=0))
        if not layers:
            return None
        probes = self.probes
        with no_refusal():
            fused = find_fused(probes.model, layers, self._trained, probes.run_one)
            if fused is None:
                return None
            with fused.laid_out():
                error = self._error(layers[0], probes.texts, fused=fused)
            if error <= probes.tolerance:
                return fused
            logger.debug("Matrices of one input run each for itself: %.1e off.", error)
        return None

    def compiled(self) -> CompiledLayers | None:
        """Returns the layers to compile, which are; warns if there are none, or they are not right.

        Those that hold a trained parameter run as they are, and the last one, where only the scored
        positions run. Tried in rows of each kind that training has.
        """
        why_not = (
            "none between the place and the last one is whole on one device, without a trained "
            "parameter and without hooks"
        )
        probes = self.probes
        try:
            layers = self._layers(self.place.first_layer or 0)
            found = find_compilable(probes.model, layers[1:-1], self._trained)
            if found is not None:
                logger.info("Compiling %d layers takes half a minute or more.", len(found.layers))
                one = probes.texts.subset(np.arange(1))
                errors = [
                    self._error(layers[0], texts, compiled=found) for texts in (probes.texts, one)
                ]
                if self.shared:
                    trees = probes.with_a_common_beginning()
                    errors.append(self._error(layers[0], trees, shared=True, compiled=found))
                if max(errors) <= probes.tolerance:
                    return found
                why_not = f"they change losses or gradients (relative error {max(errors):.1e})"
        except (*REFUSALS, ImportError) as failure:
            why_not = brief(failure)
        logger.warning("No layer is compiled (`compile_layers`): %s.", why_not)
        return None

    def _layers(self, first: int) -> list[nn.Module]:
        return [] if self.place.stack is None else [*self.place.stack.layers][first:]

    @property
    def _trained(self) -> list[nn.Parameter]:
        """The whole parameters of which all or a part is trained."""
        return [whole_of(parameter) for parameter in self.place.parameters.values()]

    def _error(
        self, first: nn.Module, texts: TokenizedTexts, shared: bool = False, **shortcut: Any
    ) -> float:
        """Returns the relative error of the losses, or of their gradient where it leaves `first`.

        The larger of both.
        """
        plain, runner = (
            self.probes.runner(texts, packed=self.packed, head=self.head, shared=shared, **how)
            for how in ({}, shortcut)
        )
        expected, found = (_losses_and_gradient(first, one) for one in (plain, runner))
        return max(map(relative_error, found, expected))


def _losses_and_gradient(first: nn.Module, runner: TextRunner) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each text's loss, [B], and the gradient of their sum by what enters `first`."""
    losses: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        with runner.running():
            losses[:] = [runner.edit_losses(np.arange(len(runner.texts)))]
        return 1024 * losses[0].sum()  # keeps gradients from vanishing in float16

    gradient = entry_gradient(first, run)
    return losses[0].detach(), gradient
