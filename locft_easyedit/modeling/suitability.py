"""Whether a model can be edited with these texts at this place: told before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import ModelError, PlaceError
from .devices import input_device
from .parameter_slices import whole_of

logger = logging.getLogger(__name__)

# Of the logits: what another last token may move them by in a causal model is rounding (experts
# that run over other numbers of tokens). Models that read both ways moved theirs by 3 % and more.
_MOST_ROUNDING = 0.01
_MOST_ROUNDING_HALF = 0.1
_PROBE_TOKENS = 16


def check_ids(model: Any, ids: np.ndarray) -> None:
    """Checks that the embedding has a row for each token.

    Args:
        model: A model.
        ids: Token ids, any shape.

    Raises:
        ModelError: It has not.
    """
    rows = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", (0,))[0]
    largest = int(ids.max()) if ids.size else -1
    if rows and largest >= rows:
        raise ModelError(
            f"Token {largest} of the tokenizer is beyond the model's embedding, which has {rows} "
            "rows. Use the tokenizer that belongs to the model, or make room before: "
            "model.resize_token_embeddings(len(tokenizer))."
        )


@torch.no_grad()
def check_causal(model: Any, ids: Sequence[int]) -> None:
    """Checks that no token sees a later one.

    Args:
        model: A model in evaluation mode.
        ids: Tokens of some text.

    Raises:
        ModelError: The logits of earlier tokens depend on the last one.
    """
    text = torch.tensor([list(ids[:_PROBE_TOKENS])], device=input_device(model))
    if text.shape[1] < 2:
        return
    own = int(text[0, -1])
    lasts = [own, *sorted({*text[0].tolist()[-4:], 0, 1} - {own})]
    texts = text.repeat(len(lasts), 1)
    texts[:, -1] = torch.tensor(lasts, device=texts.device)
    reference, *others = model(input_ids=texts, use_cache=False).logits[:, :-1].float()
    moved = max(float((other - reference).norm() / reference.norm()) for other in others)
    if moved > (_MOST_ROUNDING if model.dtype == torch.float32 else _MOST_ROUNDING_HALF):
        raise ModelError(
            f"{type(model).__name__} is no causal language model: what it predicts at a token "
            f"depends on later ones (the last token moves the others' logits by {moved:.0%}). "
            "Edit a model that reads from left to right; BERT and its kind need "
            "`is_decoder: true` in their configuration for that."
        )


def check_dependence(
    model: Any, parameters: Mapping[str, nn.Parameter], ids: Sequence[int]
) -> None:
    """Checks that the logits of a text depend on what is to be trained.

    A parameter may do nothing for one text (an expert that it does not reach), but not all.

    Args:
        model: A model in evaluation mode, whose `parameters` require gradients.
        parameters: What is trained, by name.
        ids: Tokens of some text.

    Raises:
        PlaceError: They depend on none of it.
    """
    text = torch.tensor([list(ids[:_PROBE_TOKENS])], device=input_device(model))
    with torch.enable_grad():
        logits = model(input_ids=text, use_cache=False).logits
    found: Sequence[torch.Tensor | None] = [None]
    if logits.requires_grad:
        wholes = [whole_of(parameter) for parameter in parameters.values()]
        found = torch.autograd.grad(logits.sum(), wholes, allow_unused=True)
    if all(gradient is None for gradient in found):
        named = ", ".join(f"`{name}`" for name in [*parameters][:3])
        raise PlaceError(
            f"The logits of a text do not depend on {named}: it belongs to a part that text does "
            "not run through (a tower for images, cross-attention to them). Choose a place in the "
            "language model's layers."
        )


def check_recordable(model: nn.Module) -> None:
    """Checks that gradients can go through a model.

    Raises:
        ModelError: Its weights were made in inference mode.
    """
    made = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if made is not None:
        raise ModelError(
            f"`{made}` was made in inference mode, and no gradient can go through it. Load the "
            "model outside `torch.inference_mode()`."
        )


def generation_ends(model: Any) -> list[int]:
    """Returns the tokens at which the model's own `generate` stops, by its settings."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    return [i for i in several if i is not None]


def warn_of_other_ends(model: Any, eos: int | None) -> None:
    """Warns if `generate` does not stop at the token that edits are trained to end with."""
    ends = generation_ends(model)
    if eos is None or eos in ends or not hasattr(model, "generation_config"):
        return
    logger.warning(
        "Edits are trained to end with the tokenizer's EOS, %d, but the model's "
        "`generation_config.eos_token_id` is %s: its own `generate` will run on after the answer. "
        "Add %d there, or give `generate` eos_token_id=%d.",
        eos,
        ends or None,
        eos,
        eos,
    )
