"""One forward pass over laid-out rows, with logits only where a target token is predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .packing import Rows


def run_rows(
    model: PreTrainedModel,
    rows: Rows,
    *,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the logits at the scored cells, [S, V].

    The output embedding is the largest matrix of many models, and prompts outnumber target tokens:
    a hook hands it only the scored hidden states.

    Args:
        model: A causal language model.
        rows: The layout, on the model's device.
        input_ids: Token ids, [R, L].
        inputs_embeds: Instead of ids, [R, L, D].
    """
    kept = False

    def keep_scored(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal kept
        kept = True
        hidden = args[0]  # [R, L, D]
        cells = rows.scored.to(hidden.device)
        return (hidden.flatten(0, 1)[cells].unsqueeze(0), *args[1:])  # [1, S, D]

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = head.register_forward_pre_hook(keep_scored) if head is not None else None
    try:
        output = model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            use_cache=False,
        )
    finally:
        if handle is not None:
            handle.remove()
    logits = output.logits  # [1, S, V], or [R, L, V] without an output embedding to hook
    return logits[0] if kept else logits.flatten(0, 1)[rows.scored.to(logits.device)]


def mean_by_owner(values: torch.Tensor, owner: torch.Tensor, n_owners: int) -> torch.Tensor:
    """Returns the mean of the values of each owner, [n_owners]; `values` and `owner` are [S]."""
    counts = torch.zeros(n_owners, dtype=values.dtype, device=values.device)
    counts.index_add_(0, owner, torch.ones_like(values))
    sums = torch.zeros_like(counts).index_add(0, owner, values)
    return sums / counts
