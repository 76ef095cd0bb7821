"""A low-rank change of the trained matrices: LoRA (arXiv 2106.09685), through peft's own layers.

A matrix W [out, in] computes W x + (alpha / rank) B A x while training runs, A [rank, in] and
B [out, rank] being all that is trained; then the change is added to W.

The sum is rounded once to the model's precision, which training did not see. Measured on
SmolLM2-135M after 16 steps, the logits with the sum differ from those with A and B by 4e-7 of their
norm in float32 and by 7e-3 in bfloat16, where the edit itself changes them by 0.46.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..hparams import LocFTBFHyperParams
from ..modeling.places import sides
from .reparametrization import Reparametrization
from .trained_weights import TrainedWeights

_KEY = "matrix"  # a layer is made inside a module of its own, under this name


@dataclass(frozen=True)
class LoraAdapter:
    """What LoRA trained, for each matrix by the full name of its parameter; float32, on the CPU.

    Attributes:
        rank: Rank of the change, r.
        alpha: LoRA's alpha; the change is scaled by alpha / r.
        a: The matrices A, [r, in].
        b: The matrices B, [out, r].
        transposed: Names of parameters that are stored as [in, out] (transformers' `Conv1D`);
            peft calls it `fan_in_fan_out`.
    """

    rank: int
    alpha: float
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]
    transposed: frozenset[str] = frozenset()

    def change(self, name: str) -> torch.Tensor:
        """Returns what was added to a parameter, in its own shape: (alpha / r) B A."""
        product = self.b[name] @ self.a[name]  # [out, in]
        return (product.T if name in self.transposed else product) * (self.alpha / self.rank)

    def summary(self) -> dict[str, Any]:
        """Returns the figures without the tensors, ready for JSON."""
        trained = sum(tensor.numel() for part in (self.a, self.b) for tensor in part.values())
        return {"rank": self.rank, "alpha": self.alpha, "trained_numbers": trained}


class LoraChange(Reparametrization):
    """LoRA of the matrices of a place. Making one changes nothing in the model.

    Args:
        model: The model.
        parameters: The weights of the place's linear layers, by name (see `check_low_rank`).
        hparams: `lora_rank`, `lora_alpha`, and `seed`, which A is drawn with.

    Attributes:
        weights: What is trained: `NAME.lora_A` and `NAME.lora_B` for each parameter NAME, in
            float32 whatever the model's precision.
    """

    title = "LoRA's change"

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        hparams: LocFTBFHyperParams,
    ) -> None:
        super().__init__(model, parameters)
        self.rank = hparams.lora_rank
        self.alpha = float(self.rank if hparams.lora_alpha is None else hparams.lora_alpha)
        # Tensors made in inference mode could not be trained, whatever mode the caller is in.
        with torch.inference_mode(False), _drawn_with(hparams.seed):
            self._layers = {
                name: _layer(module, self.rank, self.alpha) for name, module in self.modules.items()
            }
            trained = {}
            for name, layer in self._layers.items():
                trained[f"{name}.lora_A"] = layer.lora_A["default"].weight
                trained[f"{name}.lora_B"] = layer.lora_B["default"].weight
            in_float16 = any(p.dtype == torch.float16 for p in parameters.values())
            self.weights = TrainedWeights(trained, in_float16=in_float16)

    def forward_of(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns what the module of a parameter computes with A and B."""
        forward: Callable[[torch.Tensor], torch.Tensor] = self._layers[name].forward
        return forward

    def add_(self, name: str, matrix: torch.Tensor) -> None:
        """Adds (alpha / r) B A to `matrix`, [out, in] float32, in place."""
        a, b = self._factors(name)
        matrix.addmm_(b, a, alpha=self.alpha / self.rank)

    def adapter(self) -> LoraAdapter:
        """Returns copies of what was trained."""
        factors = {name: self._factors(name) for name in self.parameters}
        return LoraAdapter(
            self.rank,
            self.alpha,
            a={name: a.cpu().clone() for name, (a, _) in factors.items()},
            b={name: b.cpu().clone() for name, (_, b) in factors.items()},
            transposed=frozenset(filter(self.transposed, factors)),
        )

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._layers[name]
        return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def low_rank_of(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], hparams: LocFTBFHyperParams
) -> LoraChange | None:
    """Returns LoRA of these parameters if `tuning` asks for it, else `None`."""
    return LoraChange(model, parameters, hparams) if hparams.tuning == "lora" else None


@contextmanager
def _drawn_with(seed: int) -> Iterator[None]:
    """Context manager that draws on the CPU from `seed`; the caller's generators are untouched."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # `torch.manual_seed` would seed the GPUs' generators as well.
        torch.default_generator.manual_seed(seed)
        yield


def _layer(module: nn.Module, rank: int, alpha: float) -> Any:
    """Returns peft's LoRA layer over `module`, which stays as it is."""
    # At import it would cost everybody a second or two.
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        target_modules=[_KEY],
        fan_in_fan_out=isinstance(module, Conv1D),
    )
    holder = nn.ModuleDict({_KEY: _twin(module)})
    inject_adapter_in_model(config, holder)
    layer: Any = holder[_KEY]
    layer.lora_A.float()  # peft makes them in the weight's precision
    layer.lora_B.float()
    return layer.eval()


def _twin(module: nn.Module) -> nn.Module:
    """Returns a module of the same kind and weight without hooks, which runs `module.forward`.

    peft's layer calls what it wraps: the module itself would call the layer again.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    n_out, n_in = sides(module)
    with torch.device("meta"):
        twin: Any = (
            Conv1D(n_out, n_in)
            if isinstance(module, Conv1D)
            else nn.Linear(n_in, n_out, bias=False)
        )
    # peft sets flags of its base's parameters: a parameter of its own, with the same memory.
    twin.weight = nn.Parameter(weight.detach(), requires_grad=False)
    twin.forward = module.forward
    return twin
