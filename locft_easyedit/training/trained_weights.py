"""The trained parameters: originals kept, float32 masters, restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ModelError
from ..modeling.parameter_slices import parameters_named


class TrainedWeights:
    """Float32 masters of the trained parameters, and copies of their original values.

    A parameter in float32 is its own master. One in a half precision is written from its master
    after every update: small steps would round away otherwise.

    Args:
        parameters: The parameters by name.
        in_float16: Gradients pass through float16, whatever the parameters are in.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, in_float16: bool = False) -> None:
        self.parameters = dict(parameters)
        self._in_float16 = in_float16 or any(p.dtype == torch.float16 for p in parameters.values())
        # A copy, because adding and subtracting a change does not give the original bits back.
        self.original = copies_of(self.parameters)
        self._separate = {
            name: p.detach().float().clone().requires_grad_()
            for name, p in self.parameters.items()
            if p.dtype != torch.float32 or self.loss_scale != 1.0
        }

    @property
    def masters(self) -> list[torch.Tensor]:
        """What the optimizer updates."""
        return [self._separate.get(name, p) for name, p in self.parameters.items()]

    def named_masters(self) -> dict[str, torch.Tensor]:
        """Returns what the optimizer updates, by the parameters' names."""
        return dict(zip(self.parameters, self.masters, strict=True))

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied by before it is differentiated.

        Small gradients would vanish in float16, whose smallest number is 6e-8.
        """
        return 1024.0 if self._in_float16 else 1.0

    def collect_gradients_(self) -> None:
        """Adds the parameters' gradients to their masters', in float32, and clears them."""
        for name, master in self._separate.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                # Micro-batches add up in float32: eight bits of mantissa would lose the small ones.
                added = gradient.float()
                if self.loss_scale != 1.0:
                    added = added / self.loss_scale
                master.grad = added if master.grad is None else master.grad.add_(added)
                self.parameters[name].grad = None

    def gradients_(self) -> Iterator[torch.Tensor]:
        """Yields the masters' gradients, to be changed in place; zeros where there is none."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            yield master.grad

    def finite_gradients(self) -> torch.Tensor:
        """Returns whether the masters' gradients are finite: a scalar, on the first one's device.

        A gradient overflows where the loss does not, in float16 above 65,504.
        """
        largest = [torch.linalg.vector_norm(g, torch.inf) for g in self.gradients_()]
        return torch.isfinite(torch.stack([one.to(largest[0].device) for one in largest])).all()

    @torch.no_grad()
    def copy_masters_to_model_(self) -> None:
        """Writes the masters into the model."""
        for name, master in self._separate.items():
            self.parameters[name].copy_(master)

    @torch.no_grad()
    def restore_(self) -> None:
        """Gives the model its original values back, bit for bit."""
        write_(self.parameters, self.original)
        for name, master in self._separate.items():
            master.copy_(self.original[name])

    def clear_gradients_(self) -> None:
        """Drops all gradients."""
        for parameter in (*self.parameters.values(), *self._separate.values()):
            parameter.grad = None

    def values(self) -> dict[str, torch.Tensor]:
        """Returns copies of the model's present values."""
        return copies_of(self.parameters)

    def finite(self) -> bool:
        """Returns whether all values are finite."""
        return all(bool(torch.isfinite(p).all()) for p in self.parameters.values())


def copies_of(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns copies of the parameters' present values."""
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def write_(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copies `values` into `parameters`, in place."""
    for name, value in values.items():
        parameters[name].copy_(value)


@contextmanager
def values_swapped(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Context manager that puts `values` into the parameters they name, and back what these held.

    Raises:
        ModelError: The model has no parameter of such a name and shape; nothing was changed.
    """
    parameters = parameters_named(model, values)
    wrong = [
        name
        for name, value in values.items()
        if name not in parameters or parameters[name].shape != value.shape
    ]
    if wrong:
        raise ModelError(
            f"{type(model).__name__} has no parameters {', '.join(wrong[:5])} of the shapes that "
            "the edit has. Give the model that was edited."
        )
    held = copies_of({name: parameters[name] for name in values})
    try:
        write_(parameters, values)
        yield
    finally:
        write_(parameters, held)
