"""A change of the trained matrices that is confined to directions which ordinary text hardly uses.

A matrix W [out, in] becomes W + T A S while training runs: A [out, in] is all that is trained, and
S [in, in] and T [out, out] are fixed filters of the matrix's inputs and outputs (see
`spectral_filter`). A step costs what it costs without but for the product with T: where the frozen
prefix ends at the matrix, W x and S x are constants of the training, and recorded once. Then T A S
is added to W.

The sum is rounded once to the model's precision. In float32 an input that S takes to 0 gives the
same output as before up to that rounding; in a half precision the rounding of W itself moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from ...errors import PlaceError, one_message
from ...modeling.places import sides, unsuitable
from ...prefix.cut import Cut, Fold
from ...utils.hashing import checksum, json_sha256
from ..reparametrization import Reparametrization
from ..trained_weights import TrainedWeights


class ConfinedChange(Reparametrization):
    """The confined change of the matrices of a place. Making one changes nothing in the model.

    Args:
        model: The model.
        parameters: The weights of the place's linear layers, by name (see `check_confinable`).
        filters: S of each, [in, in] float32.
        outputs: T of each, [out, out] float32; without one it is the identity.

    Attributes:
        weights: What is trained: `NAME.confined` for each parameter NAME.
    """

    title = "the change"

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        filters: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(model, parameters)
        self._model = model
        self._forwards = {name: module.forward for name, module in self.modules.items()}
        # Tensors made in inference mode could not be trained, whatever mode the caller is in.
        with torch.inference_mode(False):
            self._filters = {name: s.to(parameters[name].device) for name, s in filters.items()}
            # A copy in the model's precision runs; the exact one is what is merged.
            self._running = {n: s.to(parameters[n].dtype) for n, s in self._filters.items()}
            outputs = outputs or {}
            self._outputs = {name: t.to(parameters[name].device) for name, t in outputs.items()}
            self._running_outputs = {n: t.to(parameters[n].dtype) for n, t in self._outputs.items()}
            self._a = {
                name: nn.Parameter(torch.zeros(sides(module), dtype=p.dtype, device=p.device))
                for (name, p), module in zip(parameters.items(), self.modules.values(), strict=True)
            }
        self.weights = TrainedWeights({f"{name}.confined": a for name, a in self._a.items()})

    def folded(self, cut: Cut) -> Cut:
        """Returns the cut with this change's constants in what it records, where that is exact.

        What follows the block (a norm, in some models) must not see a part of its output.
        """
        name = next((n for n, module in self.modules.items() if module is cut.block), None)
        if cut.kind != "matrix" or cut.after or name is None:
            return cut
        running = self._running[name]
        content = [checksum(self._filters[name]), checksum(self.original[name])]
        fold = Fold(
            constant=self._forwards[name],
            inner=lambda x: F.linear(x, running),
            trained=lambda x: self._trained(name, x),
            digest=json_sha256(content),
        )
        return replace(cut, fold=fold)

    def holds_for(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Returns whether the model's values are those that this change is added to."""
        return all(torch.equal(parameters[name], value) for name, value in self.original.items())

    def on_top(self) -> ConfinedChange:
        """Returns a change with the same filters, of the model's present values."""
        return ConfinedChange(self._model, self.parameters, self._filters, self._outputs)

    def forward_of(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns what the module of a parameter computes with T A S."""
        before, running = self._forwards[name], self._running[name]

        def forward(x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = before(x)
            return output + self._trained(name, F.linear(x, running))

        return forward

    def _trained(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Returns T A x, [..., out]."""
        y, t = F.linear(x, self._a[name]), self._running_outputs.get(name)
        return y if t is None else F.linear(y, t)

    def add_(self, name: str, matrix: torch.Tensor) -> None:
        """Adds T A S to `matrix`, [out, in] float32, in place."""
        a, t = self.weights.named_masters()[f"{name}.confined"], self._outputs.get(name)
        matrix.addmm_(a if t is None else t @ a, self._filters[name])

    def reset_(self) -> None:
        """Forgets what was trained."""
        self.weights.restore_()


def check_confinable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that a change of these parameters can be confined.

    Raises:
        PlaceError: Lists every parameter that is not the weight of a linear layer.
    """
    problems = unsuitable(
        model, parameters, "a change of it cannot be confined", remedy="`preserve: []`"
    )
    if problems:
        raise PlaceError(
            one_message("`preserve` does not go with this place:", [*problems.values()])
        )
