"""Prompts that are kept exactly: what enters the trained matrices at each of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data.tokenization import ids_of
from ...errors import PreserveError
from .input_moments import check_finite, check_modules, input_width, keys_of, within_context


def check_few(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[str],
    prompts: Sequence[str],
) -> None:
    """Checks that prompts can be kept exactly, before anything is computed of them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        modules: Full names of linear modules.
        prompts: The prompts.

    Raises:
        PreserveError: Their keys would span nearly everything.
    """
    width = min(input_width(model.get_submodule(module)) for module in modules)
    different: set[int] = set()
    for ids in ids_of(tokenizer, prompts):
        before = 0
        for token in ids:  # a key depends on its token and on those before it
            before = hash((before, token))
            different.add(before)
        if len(different) > width:
            raise PreserveError(
                f"The prompts of `preserve` have more than {width} tokens, as many as the matrix "
                "has inputs; exactly kept prompts may take half of these directions, or too little "
                "is left to edit with. Give fewer or shorter prompts, or the same as a .txt file, "
                "which is kept nearly."
            )


def prompt_keys(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    modules: Sequence[str],
    prompts: Sequence[str],
    *,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Returns the keys of all tokens of prompts, [T, D] float32 on the host, by module.

    Prompt after prompt, special tokens included, as the tokenizer gives them; a prompt is cut to
    the model's context.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        modules: Full names of linear modules.
        prompts: The prompts.
        progress: Show a progress bar.

    Raises:
        ModelError: A module does not exist, is not linear or not run, or gets a NaN or an infinite
            number.
        DataError: There is no token.
    """
    check_modules(model, modules)
    sequences = within_context(model, ids_of(tokenizer, prompts))
    keys = keys_of(model, sequences, modules, description="keys of prompts", progress=progress)
    for module, found in keys.items():
        check_finite(found, module)
    return keys
