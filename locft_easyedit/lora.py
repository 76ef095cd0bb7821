"""A low-rank change of the trained matrices: LoRA (arXiv 2106.09685), through peft's own layers.

A matrix W [out, in] computes W x + (alpha / rank) B A x while training runs, A [rank, in] and
B [out, rank] being all that is trained; then the change is added to W. The module tree stays as it
is, so that everything that was found about the model holds: only what a module's `forward` does is
another thing for a while.

The sum is rounded once to the model's precision, which training did not see. Measured on
SmolLM2-135M after 16 steps, the logits with the sum differ from those with A and B by 4e-7 of their
norm in float32 and by 7e-3 in bfloat16, where the edit itself changes them by 0.46.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import NonFiniteLossError, PlaceError, one_message
from .hparams import LocFTBFHyperParams
from .weights import TrainedWeights, write_

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


class LowRank:
    """LoRA of the matrices of a place. Making one changes nothing in the model.

    Args:
        model: The model.
        parameters: The weights of the place's linear layers, by name (see `check_low_rank`).
        hparams: `lora_rank`, `lora_alpha`, and `seed`, which A is drawn with.

    Attributes:
        weights: What is trained: `NAME.lora_A` and `NAME.lora_B` for each parameter NAME, in
            float32 whatever the model's precision.
        original: Copies of the parameters' values.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        hparams: LocFTBFHyperParams,
    ) -> None:
        self.rank = hparams.lora_rank
        self.alpha = float(self.rank if hparams.lora_alpha is None else hparams.lora_alpha)
        self.parameters = dict(parameters)
        self.original = {name: p.detach().clone() for name, p in parameters.items()}
        self._modules = {name: _owner(model, name) for name in parameters}
        # Tensors made in inference mode could not be trained, whatever mode the caller is in.
        with torch.inference_mode(False), _drawn_with(hparams.seed):
            self._layers = {
                name: _layer(module, self.rank, self.alpha)
                for name, module in self._modules.items()
            }
            trained = {}
            for name, layer in self._layers.items():
                trained[f"{name}.lora_A"] = layer.lora_A["default"].weight
                trained[f"{name}.lora_B"] = layer.lora_B["default"].weight
            in_float16 = any(p.dtype == torch.float16 for p in parameters.values())
            self.weights = TrainedWeights(trained, in_float16=in_float16)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, the modules compute with A and B, and the parameters get no gradients."""
        with ExitStack() as undo:
            for name, module in self._modules.items():
                parameter = self.parameters[name]
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                undo.callback(_put_back, module, vars(module).get("forward"))
                parameter.requires_grad_(False)
                module.forward = self._layers[name].forward
            yield

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge_(self) -> LoraAdapter:
        """Adds the change to the parameters: in float32, rounded once to their precision.

        Raises:
            NonFiniteLossError: A sum overflows the parameters' precision. Restoring is up to the
                caller, as is whatever else interrupts.
        """
        a, b = {}, {}
        for name, layer in self._layers.items():
            a[name] = layer.lora_A["default"].weight.detach()
            b[name] = layer.lora_B["default"].weight.detach()
            parameter = self.parameters[name]
            merged = parameter.float()  # a float32 parameter itself
            transposed = merged.T if self._transposed(name) else merged  # [out, in]
            transposed.addmm_(b[name], a[name], alpha=self.alpha / self.rank)
            parameter.copy_(merged)
            if not torch.isfinite(parameter).all():
                raise NonFiniteLossError(
                    f"`{name}` with LoRA's change added overflows {parameter.dtype}; the weights "
                    "are as they were before the edit. Lower `lr`, or use `dtype: bfloat16`."
                )
        return LoraAdapter(
            self.rank,
            self.alpha,
            a={name: tensor.cpu().clone() for name, tensor in a.items()},
            b={name: tensor.cpu().clone() for name, tensor in b.items()},
            transposed=frozenset(name for name in a if self._transposed(name)),
        )

    def restore_(self) -> None:
        """Gives the model its original values back, bit for bit."""
        write_(self.parameters, self.original)

    def values(self) -> dict[str, torch.Tensor]:
        """Returns copies of the model's present values."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _transposed(self, name: str) -> bool:
        return isinstance(self._modules[name], Conv1D)


def check_low_rank(model: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int) -> None:
    """Checks that LoRA of this rank can be trained at a place.

    Args:
        model: The model; its weights need not be loaded.
        parameters: The place's parameters by name.
        rank: The rank.

    Raises:
        PlaceError: Lists every parameter that is not the weight of a linear layer, and every one
            whose smaller side is below the rank.
    """
    problems = []
    for name, parameter in parameters.items():
        module = _owner(model, name)
        if not (isinstance(module, (nn.Linear, Conv1D)) and name.endswith(".weight")):
            problems.append(
                f"`{name}` is no matrix of a linear layer (it belongs to {type(module).__name__}), "
                "and LoRA changes nothing else. Name matrices in `rewrite_module_tmp`, for example "
                '"model.layers.{}.mlp.down_proj.weight", or set `tuning: full`.'
            )
        elif rank > min(parameter.shape):
            shape = " x ".join(str(n) for n in parameter.shape)
            problems.append(
                f"`lora_rank={rank}` is above {min(parameter.shape)}, the largest rank that "
                f"`{name}` ({shape}) can have. Lower it, or set `tuning: full`."
            )
    if problems:
        raise PlaceError(one_message("`tuning: lora` cannot be trained here:", problems))


def low_rank_of(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], hparams: LocFTBFHyperParams
) -> LowRank | None:
    """Returns LoRA of these parameters if `tuning` asks for it, else `None`."""
    return LowRank(model, parameters, hparams) if hparams.tuning == "lora" else None


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


@contextmanager
def _drawn_with(seed: int) -> Iterator[None]:
    """Within, numbers are drawn on the CPU from `seed`; the caller's generators are untouched."""
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
    sides = tuple(weight.shape)
    with torch.device("meta"):
        twin: Any = (
            Conv1D(sides[1], sides[0])
            if isinstance(module, Conv1D)
            else nn.Linear(sides[1], sides[0], bias=False)
        )
    # peft sets flags of its base's parameters: a parameter of its own, with the same memory.
    twin.weight = nn.Parameter(weight.detach(), requires_grad=False)
    twin.forward = module.forward
    return twin


def _put_back(module: nn.Module, forward: Any | None) -> None:
    """Gives a module the `forward` of its own that it had (accelerate's, say), or its class's."""
    if forward is None:
        vars(module).pop("forward", None)
    else:
        module.forward = forward
