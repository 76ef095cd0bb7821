"""The sizes of a model's parts, read from its modules on the meta device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, PlaceError
from ..hparams_rules import DTYPES
from ..models import model_without_weights
from ..place import find_layers, match_parameters
from .activations import LayerActivations, layer_activations, layer_parts
from .change_shapes import ConfinedShapes, LoraShapes, confined_shapes, lora_shapes

_FOLDER = Path(__file__).resolve().parent / "configs"
CUTS = ("matrix", "mlp", "layer")

# What architectures call the matrix that leads out of the attention.
_ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(frozen=True)
class LayerShape:
    """One layer, counted in numbers.

    Attributes:
        parameters: All of its parameters.
        matmul: Weights that a token is multiplied with (of a mixture, its active experts').
        late: Those of `matmul` that come after the attention itself: its output projection and
            the MLP. The last layer needs them at scored positions only.
        trained: Trained parameters.
        trained_matmul: Those of them that are matrices. With LoRA three times A and B, which are
            multiplied with forward, backward and for their gradients.
        confined: A and S of its trained matrices, where their change is confined.
    """

    parameters: int
    matmul: int
    late: int
    trained: int
    trained_matmul: int
    confined: int = 0


@dataclass(frozen=True)
class ModelShapes:
    """A model's sizes, in numbers (never bytes).

    Attributes:
        name: Where they come from.
        parameters: All parameters; tied ones count once.
        embedding: Input embedding (and learned positions).
        head: Output head without what it shares with the embedding.
        tied: Whether the head is the embedding.
        rest: Everything else outside the layers: the final norm.
        layers: Each layer.
        first_layer: The lowest trained layer, L.
        hidden: Width of the residual stream, D.
        vocab: Rows of the output head, V.
        attention: Width of all attention heads together, A.
        cuts: Numbers a token that each possible cut keeps, W; widest first.
        above_cut: Weights of layer L that a token is multiplied with above each cut.
        trained: Sizes of the trained parameters, by name.
        stored_dtype: The checkpoint's precision.
        lora: LoRA of them; `None` where they are trained themselves.
        confined: A confined change of them; likewise.
    """

    name: str
    parameters: int
    embedding: int
    head: int
    tied: bool
    rest: int
    layers: tuple[LayerShape, ...]
    first_layer: int
    hidden: int
    vocab: int
    attention: int
    cuts: dict[str, int]
    above_cut: dict[str, int]
    trained: dict[str, int]
    stored_dtype: str
    lora: LoraShapes | None = None
    confined: ConfinedShapes | None = None

    def folds(self, cut: str) -> bool:
        """Returns whether the prefix holds what a confined change makes constant at a cut."""
        return self.confined is not None and self.confined.folds and cut == "matrix"

    @property
    def first(self) -> LayerShape:
        """The lowest trained layer."""
        return self.layers[self.first_layer]

    @property
    def above(self) -> tuple[LayerShape, ...]:
        """The layers above it."""
        return self.layers[self.first_layer + 1 :]

    @property
    def streamed(self) -> int:
        """Parameters of the embedding and the layers below the first trained one."""
        return self.embedding + sum(layer.parameters for layer in self.layers[: self.first_layer])

    @property
    def upper(self) -> int:
        """Parameters that stay while everything below the first trained layer is streamed."""
        return self.parameters - self.streamed + (self.embedding if self.tied else 0)

    @property
    def sharded(self) -> int:
        """Parameters that FSDP2 would cut up: frozen layers above the place."""
        return sum(one.parameters for one in (self.first, *self.above) if not one.trained)

    @property
    def n_trained(self) -> int:
        """Numbers of all trained parameters."""
        return sum(self.trained.values())

    @property
    def optimized(self) -> int:
        """Numbers that Adam updates: LoRA's, or as many as the trained parameters have."""
        return self.lora.trained if self.lora else self.n_trained


def shipped_models() -> dict[str, dict[str, Any]]:
    """Returns what is shipped, by every name in lower case.

    Each value has the `names` of the model, its number of `parameters` and the fields of its
    `config` that shapes depend on.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(_FOLDER.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        found |= {name.lower(): facts for name in facts["names"]}
    return found


def meta_model(model_name: Any, *, trust_remote_code: bool = False) -> tuple[Any, str]:
    """Returns a model without weights, on the meta device, and where its shapes come from.

    Args:
        model_name: A folder with a `config.json` (weights may be missing), or a folder or hub
            name that ends as a shipped model's does.
        trust_remote_code: Allow the folder's own code.

    Raises:
        ModelError: There is no such folder and no such shipped model, or the folder holds no
            causal language model.
    """
    if not isinstance(model_name, str) or not model_name.strip():
        raise ModelError(
            f"`model_name={model_name!r}` must be a folder with a config.json, or a name."
        )
    folder = Path(model_name).expanduser()
    if (folder / "config.json").is_file():
        model = model_without_weights(str(folder), trust_remote_code=trust_remote_code)
        return model, str(folder / "config.json")
    shipped = shipped_models()
    facts = shipped.get(folder.name.lower())
    if facts is None:
        names = ", ".join(sorted({known["names"][0] for known in shipped.values()}))
        raise ModelError(
            f"`model_name={model_name!r}` is no folder with a config.json, and its shapes are not "
            f"shipped. Put the model's config.json into that folder (it is enough; no weights are "
            f"needed), or name one of: {names}."
        )
    config = AutoConfig.for_model(**facts["config"])
    config.name_or_path = facts["names"][0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, f"shipped facts of {facts['names'][0]}"


class ModelReader:
    """Reads sizes from a model on the meta device.

    Args:
        model: A causal language model of transformers, on the meta device.
        name: Where it comes from.
        layers: Layers to train, counted from 0.
        templates: What to train in each.
        lora_rank: LoRA's rank; `None` for matrices that are trained themselves.
        preserve: What a confined change preserves; empty for matrices that are trained themselves.

    Raises:
        ModelError: The model has no list of layers, or no input embedding.
        PlaceError: A layer is out of range, a template matches nothing, or what it matches lies
            outside the layers, or suits no LoRA of that rank or no confined change.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        layers: Sequence[int],
        templates: Sequence[str],
        lora_rank: int | None = None,
        preserve: Sequence[str] = (),
    ) -> None:
        self.model = model.requires_grad_(False)
        self.name = name
        stack = find_layers(model)
        self.embedding: Any = model.get_input_embeddings()
        if stack is None or self.embedding is None:
            raise ModelError(
                f"{name} has no list of layers as long as `num_hidden_layers`, or no input "
                "embedding: its edit cannot be planned. Use a causal language model of layers."
            )
        self.layers = stack.layers
        self.selected = match_parameters(model, layers, templates)
        outside = [n for n in self.selected if not n.startswith(stack.path + ".")]
        if outside:
            raise PlaceError(
                f"`{outside[0]}` lies outside the layers: nothing below it stays frozen, and there "
                "is nothing to plan. Choose a place in a layer."
            )
        self.lora = None if lora_rank is None else lora_shapes(model, self.selected, lora_rank)
        self.first = min(int(n[len(stack.path) + 1 :].split(".")[0]) for n in self.selected)
        self.config = model.config.get_text_config()
        self.confined = None
        if preserve:
            layer = self.layers[self.first]
            self.confined = confined_shapes(model, self.selected, layer, preserve)

    def shapes(self) -> ModelShapes:
        """Returns the model's sizes."""
        inside = {id(p) for p in self.layers.parameters()}
        outside = [p for p in self.model.parameters() if id(p) not in inside]
        embeddings = {
            id(p)
            for module in self.model.modules()
            if isinstance(module, nn.Embedding)
            for p in module.parameters()
        } | {id(self.embedding.weight)}
        head: Any = self.model.get_output_embeddings()
        head_ids = {id(p) for p in head.parameters()} if head is not None else set()
        in_head = [p for p in outside if id(p) in head_ids - embeddings]
        in_embedding = [p for p in outside if id(p) in embeddings]
        layers = tuple(self._layer(layer) for layer in self.layers)
        sizes = [_count(part) for part in (outside, in_embedding, in_head)]
        return ModelShapes(
            name=self.name,
            parameters=sizes[0] + sum(layer.parameters for layer in layers),
            embedding=sizes[1],
            head=sizes[2],
            tied=id(self.embedding.weight) in head_ids,
            rest=sizes[0] - sizes[1] - sizes[2],
            layers=layers,
            first_layer=self.first,
            hidden=self.hidden,
            vocab=int((head if head is not None else self.embedding).weight.shape[0]),
            attention=self.attention,
            **self._cuts(),
            trained={name: p.numel() for name, p in self.selected.items()},
            stored_dtype=_stored_dtype(self.config),
            lora=self.lora,
            confined=self.confined,
        )

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(getattr(self.config, "hidden_size", self.embedding.weight.shape[1]))

    @property
    def attention(self) -> int:
        """Width of all attention heads together."""
        head = getattr(self.config, "head_dim", None)
        return int(head * self.config.num_attention_heads) if head else self.hidden

    def activations(
        self, dtype: torch.dtype, row_tokens: int, device: str
    ) -> list[LayerActivations]:
        """Returns what autograd keeps of each layer from the first trained one up."""
        kinds: dict[tuple[Any, ...], LayerActivations] = {}
        found = []
        for layer in self.layers[self.first :]:
            # Most models repeat one layer: each kind is looked at once.
            kind = (type(layer), *((n, p.shape) for n, p in layer.named_parameters()))
            if kind not in kinds:
                kinds[kind] = layer_activations(
                    layer,
                    self.config,
                    hidden=self.hidden,
                    attention=self.attention,
                    dtype=dtype,
                    row_tokens=row_tokens,
                    device=device,
                )
            found.append(kinds[kind])
        return found

    def _layer(self, layer: nn.Module) -> LayerShape:
        parameters = list(layer.parameters())
        inside = {id(p) for p in parameters}
        trained = {name: p for name, p in self.selected.items() if id(p) in inside}
        matmul = self._matmul(trained.values())
        _, attention, mlp = layer_parts(layer)
        matrices = _matrices_in(attention)
        out = [m for name, m in matrices if name.split(".")[-1] in _ATTENTION_OUT]
        last = (out or [m for _, m in matrices])[-1:]
        return LayerShape(
            parameters=_count(parameters),
            matmul=self._matmul(parameters),
            late=self._matmul(_parameters_of(mlp)) + self._matmul([m.weight for m in last]),
            trained=_count(trained.values()),
            trained_matmul=3 * self.lora.of(trained.values()) if self.lora else matmul,
            confined=self.confined.of(trained) if self.confined else 0,
        )

    def _matmul(self, parameters: Iterable[torch.Tensor]) -> int:
        """Returns how many weights one token is multiplied with."""
        total = 0.0
        for p in parameters:
            if p.dim() == 2:
                total += p.numel()
            elif p.dim() > 2:  # experts, of which a token takes a few
                used = getattr(self.config, "num_experts_per_tok", None) or p.shape[0]
                total += p.numel() * min(1.0, used / p.shape[0])
        return int(total)

    def _cuts(self) -> dict[str, dict[str, int]]:
        """Returns the width that each possible cut keeps, and the weights above it."""
        layer = self.layers[self.first]
        inside = {id(p) for p in layer.parameters()}
        trained = {id(p) for p in self.selected.values()} & inside
        norms, _, mlp = layer_parts(layer)
        found = []
        if trained <= {id(p) for p in _parameters_of(mlp)}:
            last = [module for _, module in _matrices_in(mlp)][-1:]
            if last and trained <= {id(p) for p in last[0].parameters()}:
                n = last[0].weight.numel()
                found.append(("matrix", self.hidden + n // self.hidden, n))
            # With one norm attention and MLP read the same input, and none enters the MLP alone.
            if len(norms) != 1 and not getattr(self.config, "use_parallel_residual", False):
                found.append(("mlp", self.hidden, self._matmul(_parameters_of(mlp))))
        found.append(("layer", self.hidden, self._matmul(layer.parameters())))
        return {
            "cuts": {cut: width for cut, width, _ in found},
            "above_cut": {cut: weights for cut, _, weights in found},
        }


def _count(parameters: Iterable[torch.Tensor]) -> int:
    """Returns how many numbers the parameters hold."""
    return sum(p.numel() for p in parameters)


def _parameters_of(modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules.values() for p in module.parameters()]


def _matrices_in(modules: Mapping[str, nn.Module]) -> list[tuple[str, Any]]:
    """Returns the matrices within `modules`, by path, in the order of definition."""
    return [
        (name, module)
        for parent in modules.values()
        for name, module in parent.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]


def _stored_dtype(config: Any) -> str:
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"
