"""Where a model and its modules compute, and how much the model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that takes the model's token ids."""
    embedding: Any = model.get_input_embeddings()
    # One that was left on disk says nothing: what is resident tells.
    return module_device(embedding) or module_device(model) or torch.device("cpu")


def module_device(module: nn.Module) -> torch.device | None:
    """Returns the device that a module computes on; `None` if nothing of it is loaded.

    A model that is spread over several devices has modules on each of them.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    # The hook of a whole model says where its input is sent, and nothing about what is inside.
    if device is not None and not getattr(hook, "io_same_device", False):
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((p.device for p in module.parameters() if not p.is_meta), None)


def sent_to(hidden: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Returns hidden states on the device that `module` computes on.

    The hooks with which accelerate sends a module its input run after all others: what these see
    is still where the module before has left it.
    """
    device = module_device(module)
    return hidden if device is None else hidden.to(device)


def one_long_row(model: PreTrainedModel) -> bool:
    """Returns whether packed texts should be in one row: FlashAttention tells them apart in it."""
    implementation = getattr(model.config, "_attn_implementation", None) or ""
    return str(implementation).startswith("flash_attention")


def row_length(model: PreTrainedModel, row_tokens: int) -> int:
    """Returns how long packed rows should be for the model's attention.

    FlashAttention takes sequences of different lengths without a mask, and transformers tells them
    apart in a single row only; every other kernel pays for the square of a row.
    """
    return 2**31 if one_long_row(model) else row_tokens


def context_length(model: PreTrainedModel) -> int | None:
    """Returns the model's context in tokens, if its configuration names one."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def text_config(model: nn.Module) -> Any:
    """Returns the configuration of a model, or of its text part; `None` if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
