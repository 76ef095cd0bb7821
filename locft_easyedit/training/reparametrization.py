"""A change of the trained matrices that is trained beside them, and then added to them.

The module tree stays as it is, so that everything that was found about the model holds: only what
a module's `forward` does is another thing for a while.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import NonFiniteLossError
from ..modeling.modes import forward_replaced
from ..modeling.places import owner
from .trained_weights import TrainedWeights, copies_of, write_


class Reparametrization(ABC):
    """A change of the matrices of a place. Making one changes nothing in the model.

    Args:
        model: The model.
        parameters: The weights of the place's linear layers, by name (see `unsuitable`).

    Attributes:
        parameters: The parameters that the change is of.
        original: Copies of their values.
        weights: What is trained.
    """

    title: str  # as errors name it
    weights: TrainedWeights

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.original = copies_of(parameters)
        self.modules = {name: owner(model, name) for name in parameters}

    @abstractmethod
    def forward_of(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns what the module of a parameter computes with the change."""

    @abstractmethod
    def add_(self, name: str, matrix: torch.Tensor) -> None:
        """Adds the change of a parameter to `matrix`, [out, in] float32, in place."""

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Context manager that adds the change to what the modules compute; it alone is trained."""
        with ExitStack() as undo:
            for name, module in self.modules.items():
                parameter = self.parameters[name]
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
                undo.enter_context(forward_replaced(module, self.forward_of(name)))
            yield

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_(self) -> None:
        """Adds the change to the parameters: in float32, rounded once to their precision.

        Raises:
            NonFiniteLossError: A sum overflows the parameters' precision. Restoring is up to the
                caller, as is whatever else interrupts.
        """
        for name, parameter in self.parameters.items():
            merged = parameter.float()  # a float32 parameter itself
            self.add_(name, merged.T if self.transposed(name) else merged)
            parameter.copy_(merged)
            if not torch.isfinite(parameter).all():
                raise NonFiniteLossError(
                    f"`{name}` with {self.title} added overflows {parameter.dtype}; the weights "
                    "are as they were before the edit. Lower `lr`, or use `dtype: bfloat16`."
                )

    def restore_(self) -> None:
        """Gives the model its original values back, bit for bit."""
        write_(self.parameters, self.original)

    def values(self) -> dict[str, torch.Tensor]:
        """Returns copies of the model's present values."""
        return copies_of(self.parameters)

    def transposed(self, name: str) -> bool:
        """Returns whether a parameter is stored as [in, out]."""
        return isinstance(self.modules[name], Conv1D)
