"""LocFT-BF as the function that EasyEdit's `ALG_DICT` holds for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..hparams import LocFTBFHyperParams
from ..pipeline import edit_model


def apply_locft_bf_to_model(
    model: Any,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Edits a model with all `requests` together, and returns it with the original values.

    Args:
        model: A causal language model.
        tok: Its tokenizer.
        requests: EasyEdit's request dictionaries.
        hparams: The hyper-parameters.
        copy: Edit a copy; else the model itself.
        return_orig_weights: Return the trained parameters' former values, by name.
        keep_original_weight: EasyEdit's; whoever holds the values decides whether to restore them.
        **kwargs: What EasyEdit passes for other methods.

    Raises:
        LocFTError: As for `edit_model`.
    """
    edited = deepcopy(model) if copy else model
    result = edit_model(edited, tok, requests, hparams)
    return edited, result.original if return_orig_weights else {}
