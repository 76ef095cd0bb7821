"""Edits as folders that `peft` and transformers load."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import DeltaError, HyperParamsError, one_message
from ..modeling.parameter_slices import slices_joined
from ..utils.files import new_folder, output_errors
from .edited_matrices import EditedMatrices, Factors
from .folder import check_output, compare_folder, skeleton_of, values_beside, with_originals
from .low_rank import LITTLE, low_rank_factors

logger = logging.getLogger(__name__)

# peft's own mark of an adapter without low-rank layers (`peft.utils.constants`).
_NO_TARGET = "dummy-target-modules"
_PREFIX = "base_model.model."


def write_exact_adapter(
    delta: EditedMatrices, model: str | Path, output: str | Path, *, trust_remote_code: bool = False
) -> None:
    """Writes a PEFT adapter that carries the edited matrices themselves.

    `PeftModel.from_pretrained(base, output)` answers as the edited model, to the bit; within
    `disable_adapter()` it answers as before. The adapter is as large as the matrices. Technically
    it is a LoRA configuration without any low-rank layer, whose `modules_to_save` are the edited
    modules. Args and errors are those of `Delta.apply_to_folder`.
    """
    check_output(model, output)
    _check_base(delta, model, trust_remote_code)
    modules = {_module_of(name): None for name in delta.new}
    if "" in modules:
        raise DeltaError(
            "An edited parameter belongs to the model itself. Use `apply_to_folder` (as=model)."
        )
    config = {"r": 1, "target_modules": _NO_TARGET, "modules_to_save": list(modules)}
    # peft replaces whole modules: a bias beside an edited weight comes along as it is.
    beside = values_beside(delta, model, trust_remote_code=trust_remote_code)
    everything = beside | slices_joined(delta.new, beside)
    tensors = {_PREFIX + name: value for name, value in everything.items()}
    with output_errors(output), new_folder(output) as folder:
        _write_adapter(folder, config, tensors, model)


def write_lora_adapter(
    delta: EditedMatrices,
    model: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    trust_remote_code: bool = False,
) -> float:
    """Writes a PEFT LoRA adapter: the edit's change of each matrix, cut off at a rank.

    The factors are those of a singular value decomposition of new - original, the best that there
    are of their rank; alpha equals the rank, so that peft scales by 1. An edit that was trained as
    LoRA is written as it was trained, unless a rank is given.

    Args:
        delta: The edit.
        model: The folder of the model without the edit.
        output: A folder that does not exist or is empty.
        rank: The rank of every matrix; one that needs less gets less.
        trust_remote_code: Allow the model's own code.

    Returns:
        How much of the change is left out: ||change - B A|| / ||change|| (Frobenius norms).

    Raises:
        DeltaError: The edit does not fit the model, or changes what LoRA cannot.
        HyperParamsError: `rank` is missing or below 1.
        ModelError: The model's folder cannot be used.
        OutputError: `output` holds something or cannot be written.
    """
    if rank is not None and rank < 1:
        raise HyperParamsError(f"`rank={rank}` must be 1 or more.")
    if rank is None and not delta.lora:
        raise HyperParamsError(
            "`rank` is missing: the edit was not trained as LoRA. Choose one, such as rank=64, and "
            "measure the adapter with `locft evaluate`."
        )
    check_output(model, output)
    _check_base(delta, model, trust_remote_code)
    transposed = _transposed(delta, model, trust_remote_code)
    with output_errors(output), new_folder(output) as folder:
        if rank is None:
            trained = delta.metadata["lora"]
            factors, scale, left_out = delta.lora, trained["alpha"] / trained["rank"], 0.0
        else:
            whole = delta if delta.original else with_originals(delta, model)
            stored_in_out = [name for name, is_so in transposed.items() if is_so]
            factors, left_out, enough = low_rank_factors(whole, rank, stored_in_out)
            scale = 1.0
            if left_out > LITTLE:
                logger.warning(
                    "rank=%d leaves out %.1f %% of the change: the adapter may answer quite unlike "
                    "the edited model. rank=%d keeps all but %g %%, as=adapter (`export_adapter`) "
                    "all of it; an edit that is trained with tuning=lora has a low rank.",
                    rank, 100 * left_out, enough, 100 * LITTLE,
                )  # fmt: skip
        _write_lora(folder, factors, scale, all(transposed.values()), model)
    return left_out


def _write_lora(
    folder: Path,
    factors: Mapping[str, Factors],
    scale: float,
    fan_in_fan_out: bool,
    model: str | Path,
) -> None:
    ranks = {_module_of(name): len(a) for name, (a, _) in factors.items()}
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    config = {
        "r": largest,
        "lora_alpha": scale * largest,
        "rank_pattern": smaller,
        "alpha_pattern": {module: scale * rank for module, rank in smaller.items()},
        "target_modules": list(ranks),
        "fan_in_fan_out": fan_in_fan_out,
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in factors.items():
        key = _PREFIX + _module_of(name)
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    _write_adapter(folder, config, tensors, model)


def _write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: str | Path
) -> None:
    """Writes what `PeftModel.from_pretrained` reads."""
    from peft import LoraConfig  # takes seconds to import

    described = LoraConfig(
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=str(model),
        **config,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        described.save_pretrained(str(folder))
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _check_base(delta: EditedMatrices, model: str | Path, trust_remote_code: bool) -> None:
    """Raises if a folder does not hold the model that an adapter of this edit belongs to."""
    report = compare_folder(delta, model, trust_remote_code=trust_remote_code)
    if not report.fits_base:
        problems = report.differences or ["the edit is already in it. Give the model without it."]
        raise DeltaError(
            one_message(f"Edit {delta.short_id} does not belong to `{model}`:", problems)
        )


def _transposed(
    delta: EditedMatrices, model: str | Path, trust_remote_code: bool
) -> dict[str, bool]:
    """Returns for each edited matrix whether its linear layer stores it as [in, out]."""
    skeleton = skeleton_of(model, trust_remote_code)
    modules = {name: skeleton.get_submodule(_module_of(name)) for name in delta.new}
    wrong = [
        f"`{name}` is not the weight of a linear layer."
        for name, module in modules.items()
        if not isinstance(module, (nn.Linear, Conv1D)) or name != f"{_module_of(name)}.weight"
    ]
    if wrong:
        raise DeltaError(
            one_message("LoRA cannot hold this edit. Use as=adapter or as=model:", wrong)
        )
    return {name: isinstance(module, Conv1D) for name, module in modules.items()}


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
