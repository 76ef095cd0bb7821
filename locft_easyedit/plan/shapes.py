"""The sizes of a model's parts, read from its modules on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, PlaceError
from ..hparams_rules import DTYPES
from ..place import find_layers, match_parameters
from .activations import LayerActivations, layer_activations
from .confined import ConfinedShapes, confined_shapes
from .lora import LoraShapes, lora_shapes
from .parts import count, matrices_in, parts_of

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
    def upper(self) -> int:
        """Parameters that stay while everything below the first trained layer is streamed."""
        kept = self.embedding if self.tied else 0
        return (
            sum(layer.parameters for layer in self.layers[self.first_layer :])
            + self.head
            + self.rest
            + kept
        )

    @property
    def streamed(self) -> int:
        """Parameters of the embedding and the layers below the first trained one."""
        return self.embedding + sum(layer.parameters for layer in self.layers[: self.first_layer])


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
        sizes = [count(part) for part in (outside, in_embedding, in_head)]
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
        trained_ids = {id(p) for p in self.selected.values()}
        parameters = list(layer.parameters())
        trained = [p for p in parameters if id(p) in trained_ids]
        names = [n for n, p in self.selected.items() if any(p is one for one in trained)]
        attention, mlp = parts_of(layer)
        out = [m for m in matrices_in(attention) if m[0].split(".")[-1] in _ATTENTION_OUT]
        last = (out or matrices_in(attention))[-1:]
        return LayerShape(
            parameters=count(parameters),
            matmul=self._matmul(parameters),
            late=self._matmul([p for module in mlp for p in module.parameters()])
            + self._matmul([m.weight for _, m in last]),
            trained=count(trained),
            trained_matmul=self._matmul(trained)
            if self.lora is None
            else 3 * self.lora.of(trained),
            confined=0 if self.confined is None else self.confined.of(names),
        )

    def _side_by_side(self, layer: nn.Module) -> bool:
        """Returns whether attention and MLP read one input, so that none enters the MLP alone."""
        children = [list(child.parameters()) for child in layer.children()]
        norms = [ps for ps in children if ps and all(p.dim() == 1 for p in ps)]
        return len(norms) == 1 or bool(getattr(self.config, "use_parallel_residual", False))

    def _matmul(self, parameters: Sequence[torch.Tensor]) -> int:
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
        here = {id(p): p for p in layer.parameters()}
        trained = {id(p) for p in self.selected.values()} & set(here)
        _, mlp = parts_of(layer)
        mlp_parameters = [p for module in mlp for p in module.parameters()]
        width: dict[str, int] = {}
        above: dict[str, int] = {}
        if trained <= {id(p) for p in mlp_parameters}:
            matrices = matrices_in(mlp)
            last = matrices[-1][1] if matrices else None
            if last is not None and trained <= {id(p) for p in last.parameters()}:
                width["matrix"] = self.hidden + last.weight.numel() // self.hidden
                above["matrix"] = last.weight.numel()
            if not self._side_by_side(layer):
                width["mlp"] = self.hidden
                above["mlp"] = self._matmul(mlp_parameters)
        width["layer"] = self.hidden
        above["layer"] = self._matmul(list(here.values()))
        return {"cuts": width, "above_cut": above}


def _stored_dtype(config: Any) -> str:
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"
