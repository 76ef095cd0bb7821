"""A change of the trained matrices that is confined to directions which ordinary text hardly uses.

A matrix W [out, in] becomes W + A S while training runs: A [out, in] is all that is trained, and
S [in, in] is a fixed filter of the matrix's inputs (see `spectral`). A step costs what it costs
without: where the frozen prefix ends at the matrix, W x and S x are constants of the training, and
recorded once. Then A S is added to W.

The sum is rounded once to the model's precision. In float32 an input that S takes to 0 gives the
same output as before up to that rounding; in a half precision the rounding of W itself moves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..cut import Cut, Fold
from ..errors import NonFiniteLossError, PlaceError, one_message
from ..fingerprint import checksum
from ..weights import TrainedWeights, write_


class Confined:
    """The confined change of the matrices of a place. Making one changes nothing in the model.

    Args:
        model: The model.
        parameters: The weights of the place's linear layers, by name (see `check_confinable`).
        filters: S of each, [in, in] float32.

    Attributes:
        weights: What is trained: `NAME.confined` for each parameter NAME.
        original: Copies of the parameters' values.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        filters: Mapping[str, torch.Tensor],
    ) -> None:
        self._model = model
        self.parameters = dict(parameters)
        self.original = {name: p.detach().clone() for name, p in parameters.items()}
        self._modules = {name: owner(model, name) for name in parameters}
        self._forwards = {name: module.forward for name, module in self._modules.items()}
        self._filters = {name: s.to(parameters[name].device) for name, s in filters.items()}
        # A copy in the model's precision runs; the exact one is what is merged.
        self._running = {n: s.to(parameters[n].dtype) for n, s in self._filters.items()}
        # Tensors made in inference mode could not be trained, whatever mode the caller is in.
        with torch.inference_mode(False):
            self._a = {
                name: nn.Parameter(torch.zeros(sides(module), dtype=p.dtype, device=p.device))
                for (name, p), module in zip(
                    parameters.items(), self._modules.values(), strict=True
                )
            }
        self.weights = TrainedWeights({f"{name}.confined": a for name, a in self._a.items()})

    def folded(self, cut: Cut) -> Cut:
        """Returns the cut with this change's constants in what it records, where that is exact.

        What follows the block (a norm, in some models) must not see a part of its output.
        """
        name = next((n for n, module in self._modules.items() if module is cut.block), None)
        if cut.kind != "matrix" or cut.after or name is None:
            return cut
        running, a = self._running[name], self._a[name]
        content = [checksum(self._filters[name]), checksum(self.original[name])]
        fold = Fold(
            constant=self._forwards[name],
            inner=lambda x: F.linear(x, running),
            trained=lambda x: F.linear(x, a),
            digest=hashlib.sha256(str(content).encode()).hexdigest(),
        )
        values = {field: getattr(cut, field) for field in cut.__dataclass_fields__}
        return Cut(**values | {"fold": fold})

    def holds_for(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Returns whether the model's values are those that this change is added to."""
        return all(torch.equal(parameters[name], value) for name, value in self.original.items())

    def on_top(self) -> Confined:
        """Returns a change with the same filters, of the model's present values."""
        return Confined(self._model, self.parameters, self._filters)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, the modules compute with A S, and the parameters get no gradients."""
        with ExitStack() as undo:
            for name, module in self._modules.items():
                parameter = self.parameters[name]
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                undo.callback(_put_back, module, vars(module).get("forward"))
                parameter.requires_grad_(False)
                module.forward = self._forward(name)
            yield

    def _forward(self, name: str) -> Any:
        before, running, a = self._forwards[name], self._running[name], self._a[name]

        def forward(x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = before(x)
            return output + F.linear(F.linear(x, running), a)

        return forward

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_(self) -> None:
        """Adds the change to the parameters: in float32, rounded once to their precision.

        Raises:
            NonFiniteLossError: A sum overflows the parameters' precision. Restoring is up to the
                caller.
        """
        masters = self.weights.named_masters()
        for name, parameter in self.parameters.items():
            merged = parameter.float()  # a float32 parameter itself
            transposed = merged.T if self._transposed(name) else merged  # [out, in]
            transposed.addmm_(masters[f"{name}.confined"], self._filters[name])
            parameter.copy_(merged)
            if not torch.isfinite(parameter).all():
                raise NonFiniteLossError(
                    f"`{name}` with the change added overflows {parameter.dtype}; the weights are "
                    "as they were before the edit. Lower `lr`, or use `dtype: bfloat16`."
                )

    def restore_(self) -> None:
        """Gives the model its original values back, bit for bit."""
        write_(self.parameters, self.original)

    def reset_(self) -> None:
        """Forgets what was trained."""
        self.weights.restore_()

    def values(self) -> dict[str, torch.Tensor]:
        """Returns copies of the model's present values."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _transposed(self, name: str) -> bool:
        return isinstance(self._modules[name], Conv1D)


def check_confinable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that a change of these parameters can be confined.

    Raises:
        PlaceError: Lists every parameter that is not the weight of a linear layer.
    """
    problems = [
        f"`{name}` is no matrix of a linear layer (it belongs to {type(module).__name__}), and a "
        "change of it cannot be confined. Name matrices in `rewrite_module_tmp`, for example "
        '"model.layers.{}.mlp.down_proj.weight", or set `preserve: []`.'
        for name, module in ((name, owner(model, name)) for name in parameters)
        if not (isinstance(module, (nn.Linear, Conv1D)) and name.endswith(".weight"))
    ]
    if problems:
        raise PlaceError(one_message("`preserve` does not go with this place:", problems))


def owner(model: nn.Module, name: str) -> nn.Module:
    """Returns the module that a parameter belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def sides(module: nn.Module) -> tuple[int, int]:
    """Returns a linear module's (out, in)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def _put_back(module: nn.Module, forward: Any | None) -> None:
    """Gives a module the `forward` of its own that it had, or its class's."""
    if forward is None:
        vars(module).pop("forward", None)
    else:
        module.forward = forward
