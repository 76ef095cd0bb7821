"""Where a model takes its input, and how much of it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that takes the model's token ids."""
    embedding: Any = model.get_input_embeddings()
    hook: Any = getattr(embedding, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:  # offloaded by accelerate
        return torch.device(hook.execution_device)
    device: torch.device = embedding.weight.device
    if device.type == "meta":  # left on disk: what is resident tells
        resident = (p.device for p in model.parameters() if not p.is_meta)
        return next(resident, torch.device("cpu"))
    return device


def row_length(model: PreTrainedModel, row_tokens: int) -> int:
    """Returns how long packed rows should be for the model's attention.

    FlashAttention takes sequences of different lengths without a mask, and transformers tells them
    apart in a single row only; every other kernel pays for the square of a row.
    """
    implementation = getattr(model.config, "_attn_implementation", None) or ""
    return 2**31 if str(implementation).startswith("flash_attention") else row_tokens


def context_length(model: PreTrainedModel) -> int | None:
    """Returns the model's context in tokens, if its configuration names one."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text_config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
