"""Reads a model's sizes from its configuration: modules on the meta device, and no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, PlaceError
from ..hparams_rules import DTYPES
from ..modeling.loading import model_without_weights
from ..modeling.parameter_slices import ParameterSlice, whole_of
from ..modeling.places import check_low_rank, find_layers, match_parameters, owner
from ..training.preserve.confined_change import check_confinable
from ..training.preserve.input_moments import input_width
from ..training.preserve.sources import kind_of
from .activations import LayerActivations, config_number, layer_activations, layer_parts
from .shapes import ConfinedShapes, LayerShape, LoraShapes, ModelShapes

_FOLDER = Path(__file__).resolve().parent / "configs"  # of a few models, shipped

# What architectures call the matrix that leads out of the attention.
_ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")


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
        DataError: Something in `preserve` is no source.
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
        self.first = min(int(n[len(stack.path) + 1 :].split(".")[0]) for n in self.selected)
        self.config = model.config.get_text_config()
        self.lora = None if lora_rank is None else self._lora(lora_rank)
        self.confined = self._confined(preserve) if preserve else None

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
            fused=_count({id(w): w for w in map(whole_of, self.sliced)}.values()),
            stored_dtype=_stored_dtype(self.config),
            lora=self.lora,
            confined=self.confined,
        )

    @property
    def sliced(self) -> list[ParameterSlice]:
        """What is trained of fused parameters alone."""
        return [p for p in self.selected.values() if isinstance(p, ParameterSlice)]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return config_number(self.config, "hidden_size") or int(self.embedding.weight.shape[1])

    @property
    def attention(self) -> int:
        """Width of all attention heads together."""
        head = config_number(self.config, "head_dim")
        heads = config_number(self.config, "num_attention_heads")
        return head * heads if head and heads else self.hidden

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

    def _lora(self, rank: int) -> LoraShapes:
        check_low_rank(self.model, self.selected, rank)
        return LoraShapes(
            rank=rank,
            trained=sum(rank * sum(p.shape) for p in self.selected.values()),
            inputs=sum(self._inputs().values()),
            largest=max(p.numel() for p in self.selected.values()),
        )

    def _confined(self, preserve: Sequence[str]) -> ConfinedShapes:
        check_confinable(self.model, self.selected)
        # Where a norm follows the MLP, what leaves the matrix is not yet what the residual gets.
        norms, _, _ = layer_parts(self.layers[self.first])
        normed = any("post" in name and ("feedforward" in name or "mlp" in name) for name in norms)
        return ConfinedShapes(
            preserve=tuple(preserve),
            kinds=tuple(map(kind_of, preserve)),
            inputs=self._inputs(),
            sizes={name: p.numel() for name, p in self.selected.items()},
            folds=not normed,
        )

    def _inputs(self) -> dict[str, int]:
        """Returns the width of what each trained matrix is given."""
        return {name: input_width(owner(self.model, name)) for name in self.selected}

    def _layer(self, layer: nn.Module) -> LayerShape:
        parameters = list(layer.parameters())
        inside = {id(p) for p in parameters}
        trained = {name: p for name, p in self.selected.items() if id(whole_of(p)) in inside}
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
            output_filters=self.confined.outputs_of(trained) if self.confined else 0,
        )

    def _matmul(self, parameters: Iterable[nn.Parameter]) -> int:
        """Returns how many weights one token is multiplied with."""
        total = 0.0
        for p in parameters:
            n_experts = len(whole_of(p)) if whole_of(p).dim() > 2 else 0
            if n_experts:  # of which a token takes a few
                used = config_number(self.config, "num_experts_per_tok") or n_experts
                total += p.numel() * min(1.0, used / n_experts)
            elif p.dim() == 2:
                total += p.numel()
        return int(total)

    def _cuts(self) -> dict[str, dict[str, int]]:
        """Returns the width that each possible cut keeps, and the weights above it."""
        layer = self.layers[self.first]
        inside = {id(p) for p in layer.parameters()}
        trained = {id(whole_of(p)) for p in self.selected.values()} & inside
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
