"""Text drawn from a model's own distribution: ancestral sampling at temperature 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .devices import input_device
from .errors import ModelError
from .forward import head_sees
from .modes import evaluation_mode


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Seeds torch for a while; its random states and the model's settings are put back after."""
    device = input_device(model)
    # `torch.manual_seed` seeds all GPUs' generators.
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    settings = model.generation_config
    # A model's own top_k or repetition penalty would make its text unlike what it was trained on.
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=devices), evaluation_mode(model), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = settings


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that a document begins with: BOS, or EOS where there is no BOS.

    Raises:
        ModelError: The tokenizer has neither.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ModelError(
            "The tokenizer has neither BOS nor EOS for the model to begin text of its own with. "
            "Set `bos_token`, or give text in place of what the model would sample."
        )
    return int(first)


def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    n_tokens: int,
    *,
    whole: bool = False,
) -> list[str]:
    """Returns what the model goes on with, until EOS; use it within `seeded`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: What each text begins with, padded on the left, [B, T].
        mask: Which of these tokens are real, [B, T].
        n_tokens: Tokens to add at most.
        whole: Return the beginnings too. Many tokenizers leave out the space that a text begins
            with, so that what was added cannot be put behind its beginning.

    Raises:
        ModelError: The tokenizer has neither BOS nor EOS.
    """
    end = tokenizer.eos_token_id
    end = first_token(tokenizer) if end is None else end
    # As they are, but contiguous: `generate` gives it a slice, the beginnings' last column.
    with head_sees(model, lambda hidden: hidden):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=n_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
    start = 0 if whole else ids.shape[1]
    drawn: list[str] = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    return drawn
