"""Choices between tokens that rounding could turn."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

# Rounding could decide between logits that are closer than this many steps of the model's numbers
# at their size, or than the floor. Batching moves the logits of SmolLM2, of about 20, by up to 1e-4
# in float32 and 0.4 in bfloat16.
_STEPS = 4
_FLOOR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def too_close(best: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Returns where rounding could decide between the two best logits, [S] bool.

    Args:
        best: The best and the second-best logit, [S, 2].
        model: The model. Its own precision counts: some give float32 logits of half weights.
    """
    dtype = model.dtype if model.dtype in _FLOOR else torch.bfloat16
    size = best[:, 0].float().abs()
    margin = (_STEPS * torch.finfo(dtype).eps * size).clamp(min=_FLOOR[dtype])
    return (best[:, 0] - best[:, 1]).float() < margin
