"""How many bytes autograd keeps of a transformer layer, a token.

The trained matrices aside, every weight is frozen: a frozen matrix product keeps nothing but its
weight, and what is left is what norms, attention and activation functions keep. For a Llama layer
of width D, attention width A, H heads and inner width I, in rows of R tokens and s bytes a number:

    norms      2 (4 D + 4)               their inputs in float32, and one scale each
    attention  4 A s + 4 H + R s         query, key, value, output; log-sum-exp; the mask's rows
    MLP        3 I s                     gate, its activation, and what that is multiplied with

A CPU in half precision takes no fused attention (`runner.py`) but products of matrices, in float32:

    attention  12 A + 4 H R              query, key and value; the probabilities

Norms and MLP are not written down for each architecture but looked at: each runs once on the meta
device, where nothing is computed, and what it keeps is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..prefix.probes import REFUSALS


@dataclass(frozen=True)
class LayerActivations:
    """Bytes a token that autograd keeps of one layer; `norms` are those outside the attention."""

    norms: float
    attention: float
    mlp: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.norms + self.attention + self.mlp


def config_number(config: Any, name: str) -> int | None:
    """Returns a number that a configuration gives, the largest where layers differ in it.

    `None` if it gives none: not every model has heads, and some refuse to give one number for all
    of their layers.
    """
    try:
        value = getattr(config, name, None)
    except REFUSALS:
        return None
    values = value if isinstance(value, (list, tuple)) else [value]
    numbers = [int(one) for one in values if isinstance(one, (int, float)) and one > 0]
    return max(numbers, default=None)


def layer_parts(layer: nn.Module) -> tuple[dict[str, nn.Module], ...]:
    """Returns a layer's norms, its attention and its MLP: children that hold parameters, by name.

    What holds no matrix is a norm; the attention is told by its name, and the rest is the MLP.
    """
    norms: dict[str, nn.Module] = {}
    attention: dict[str, nn.Module] = {}
    mlp: dict[str, nn.Module] = {}
    for name, child in layer.named_children():
        dimensions = [p.dim() for p in child.parameters()]
        if dimensions and max(dimensions) < 2:
            norms[name] = child
        elif dimensions:
            (attention if "attn" in name or "attention" in name else mlp)[name] = child
    return norms, attention, mlp


def layer_activations(
    layer: nn.Module,
    config: Any,
    *,
    hidden: int,
    attention: int,
    dtype: torch.dtype,
    row_tokens: int,
    device: str,
) -> LayerActivations:
    """Returns what autograd keeps of one layer, which is on the meta device and put into `dtype`.

    The widths are those of the residual stream, D, and of all attention heads together, A;
    `row_tokens` is the length of packed rows, R.
    """
    norms, attentions, mlp = layer_parts(layer.to(dtype))
    scores = _attention_bytes(config, attention, dtype, row_tokens, device)
    return LayerActivations(
        norms=sum(saved_by(norm, hidden, dtype) for norm in norms.values()),
        attention=sum(scores + _head_norms(one, config, dtype) for one in attentions.values()),
        mlp=sum(saved_by(one, hidden, dtype) for one in mlp.values()),
    )


def _attention_bytes(
    config: Any, width: int, dtype: torch.dtype, row_tokens: int, device: str
) -> float:
    """Returns the bytes a token of the attention itself, whose heads are `width` wide together."""
    size, heads = dtype.itemsize, config_number(config, "num_attention_heads") or 1
    if getattr(config, "_attn_implementation", None) != "eager":
        if device == "cpu" and size < 4:
            return 3 * width * 4 + heads * row_tokens * 4
        return 4 * width * size + 4 * heads + row_tokens * size
    # The probabilities in float32 and in the model's precision, and what a soft cap keeps.
    copies = 4 + (size if size < 4 else 0)
    copies += size if getattr(config, "attn_logit_softcapping", None) else 0
    return 3 * width * size + heads * row_tokens * copies


def saved_by(module: nn.Module, width: int, dtype: torch.dtype) -> float:
    """Returns the bytes a token that autograd keeps of `module` with an input of `width`."""
    try:
        return float(_saved(module, (1, 2, width), dtype) - _saved(module, (1, 1, width), dtype))
    except REFUSALS:
        # Some modules cannot run without numbers, or on hidden states alone: the widest matrix says
        # what is kept of it.
        widest = max((max(p.shape[-2:]) for p in module.parameters() if p.dim() > 1), default=width)
        return float(3 * widest * dtype.itemsize)


def _head_norms(attention: nn.Module, config: Any, dtype: torch.dtype) -> float:
    """Returns the bytes a token that norms of queries and keys keep."""
    heads = config_number(config, "num_attention_heads") or 1
    kv_heads = config_number(config, "num_key_value_heads") or heads
    norms, _, _ = layer_parts(attention)
    return sum(
        (kv_heads if name.startswith("k") else heads)
        * saved_by(norm, next(norm.parameters()).numel(), dtype)
        for name, norm in norms.items()
    )


def _saved(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Returns the bytes of all storages that autograd keeps, parameters aside."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}  # the tensors too: a freed storage's address comes again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    given = torch.zeros(shape, device="meta", dtype=dtype, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(given)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
