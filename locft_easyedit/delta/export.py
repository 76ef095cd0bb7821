"""Edits for programs that know nothing of them: folders that `peft` and transformers load."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..data import read_requests
from ..errors import DeltaError, HyperParamsError, one_message
from ..files import new_folder, output_errors
from ..models import load_causal_lm, model_without_weights
from ..report import write_json
from .delta import Delta, Factors
from .folder import apply_to_folder, originals_from, values_beside, verify_folder
from .low_rank import LowRankChange
from .rank_report import ranks_record, write_ranks_picture
from .ranks import RankMeter, RankSearch, smallest_rank

# peft's own mark of an adapter without low-rank layers (`peft.utils.constants`).
_NO_TARGET = "dummy-target-modules"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Linear:
    """A module whose weight was edited."""

    module: str
    transposed: bool


def export_model(
    delta: Delta, model: str | Path, output: str | Path, *, trust_remote_code: bool = False
) -> None:
    """Writes the edited model as a folder that transformers loads; see `apply_to_folder`."""
    apply_to_folder([delta], model, output, trust_remote_code=trust_remote_code)


def export_adapter(
    delta: Delta, model: str | Path, output: str | Path, *, trust_remote_code: bool = False
) -> None:
    """Writes a PEFT adapter that carries the edited matrices themselves.

    `PeftModel.from_pretrained(base, output)` answers as the edited model, to the bit; within
    `disable_adapter()` it answers as before. Nothing is approximated, and nothing is saved either:
    the adapter is as large as the matrices. Technically a LoRA configuration without any low-rank
    layer, whose `modules_to_save` are the edited modules.

    Args:
        delta: The edit.
        model: The folder of the model without it.
        output: A folder that does not exist or is empty.
        trust_remote_code: Allow the model's own code.

    Raises:
        DeltaError: The edit does not fit the model.
        ModelError: The model's folder cannot be used.
        OutputError: `output` holds something or cannot be written.
    """
    _check_base(delta, model, trust_remote_code)
    modules = {name.rpartition(".")[0]: None for name in delta.new}
    if "" in modules:
        raise DeltaError("An edited parameter belongs to the model itself. Export with as=model.")
    config = {
        "r": 1,
        "target_modules": _NO_TARGET,
        "modules_to_save": list(modules),
    }
    # peft replaces whole modules: a bias beside an edited weight comes along as it is.
    beside = values_beside(delta, model, trust_remote_code=trust_remote_code)
    tensors = {_PREFIX + name: value for name, value in (beside | delta.new).items()}
    with output_errors(output), new_folder(output) as folder:
        _write_adapter(folder, config, tensors, model)


def export_lora(
    delta: Delta,
    model: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    data: str | Path | None = None,
    n: int | None = None,
    margin: float = 0.01,
    device: int | str | None = None,
    batch_size: int = 64,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> RankSearch | None:
    """Writes a PEFT LoRA adapter: the edit's change of each matrix, cut off at a rank.

    The factors are those of a singular value decomposition of new - original, the best that there
    are of their rank; alpha equals the rank, so that peft scales by 1. An edit that was trained as
    LoRA is written as it was trained, unless a rank or data are given.

    Args:
        delta: The edit.
        model: The folder of the model without it.
        output: A folder that does not exist or is empty.
        rank: The rank of every matrix; one that needs less gets less.
        data: Instead of a rank, the file of the requests that were trained: the smallest rank is
            taken whose generated reliability on them is within `margin` of the whole edit's. What
            was measured goes into `ranks.json` and `ranks.png`.
        n: Only the first `n` requests.
        margin: See `data`.
        device: Where that is measured; a GPU if there is one.
        batch_size: Prompts together.
        trust_remote_code: Allow the model's own code.
        progress: Show progress bars.

    Returns:
        The search for the rank, if there was one.

    Raises:
        DeltaError: The edit does not fit the model, or changes what LoRA cannot.
        HyperParamsError: Neither a rank nor data are given, or both.
        LocFTError: The model or the data cannot be used, or `output` cannot be written.
    """
    _check_choice(delta, rank, data, n, margin)
    _check_base(delta, model, trust_remote_code)
    linear = _linear_modules(delta, model, trust_remote_code)
    if not delta.original:
        delta = originals_from(delta, model)
    transposed = [name for name, found in linear.items() if found.transposed]
    search = None
    with output_errors(output), new_folder(output) as folder:
        if data is not None:
            requests = read_requests(data, n)
            loaded, tokenizer = load_causal_lm(
                str(Path(model).expanduser().resolve()),
                device=device,
                dtype=delta.dtype,
                trust_remote_code=trust_remote_code,
            )
            meter = RankMeter(
                loaded,
                tokenizer,
                delta,
                requests,
                transposed=transposed,
                batch_size=batch_size,
                progress=progress,
            )
            search = smallest_rank(meter, margin)
            factors, scale = meter.change.factors(search.chosen), 1.0
            write_json(folder / "ranks.json", ranks_record(search))
            write_ranks_picture(folder / "ranks.png", search)
        elif rank is not None:
            factors, scale = LowRankChange(delta, transposed).factors(rank), 1.0
        else:
            factors = delta.lora
            scale = delta.about["lora"]["alpha"] / delta.about["lora"]["rank"]
        _write_lora(folder, factors, scale, linear, model)
    return search


def _check_choice(
    delta: Delta, rank: int | None, data: str | Path | None, n: int | None, margin: float
) -> None:
    """Checks how the rank is to be chosen.

    Raises:
        HyperParamsError: It cannot be done that way (all problems in one error).
    """
    problems = []
    if rank is not None and data is not None:
        problems.append("`rank` and `data` are two ways to choose a rank. Give one of them.")
    if rank is not None and rank < 1:
        problems.append(f"`rank={rank}` must be 1 or more.")
    if n is not None and data is None:
        problems.append(f"`n={n}` counts requests of `data`. Add `data=FILE`, or leave it out.")
    if not 0 <= margin < 1:
        problems.append(f"`margin={margin}` must be 0 or more, and below 1.")
    if rank is None and data is None and not delta.lora:
        problems.append(
            "A rank has to be chosen: add `rank=R`, or `data=FILE` with the requests that were "
            "trained, to measure which rank keeps them."
        )
    if problems:
        raise HyperParamsError(" ".join(problems))


def _write_lora(
    folder: Path,
    factors: Mapping[str, Factors],
    scale: float,
    linear: Mapping[str, _Linear],
    model: str | Path,
) -> None:
    ranks = {linear[name].module: len(a) for name, (a, _) in factors.items()}
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    config = {
        "r": largest,
        "lora_alpha": scale * largest,
        "rank_pattern": smaller,
        "alpha_pattern": {module: scale * rank for module, rank in smaller.items()},
        "target_modules": list(ranks),
        "fan_in_fan_out": all(found.transposed for found in linear.values()),
    }
    tensors = {}
    for name, (a, b) in factors.items():
        key = _PREFIX + linear[name].module
        tensors[f"{key}.lora_A.weight"] = a
        tensors[f"{key}.lora_B.weight"] = b
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


def _check_base(delta: Delta, model: str | Path, trust_remote_code: bool) -> None:
    """Checks that a folder holds the model that an adapter of this edit belongs to.

    Raises:
        DeltaError: It is another one.
    """
    report = verify_folder(delta, model, trust_remote_code=trust_remote_code)
    if not report.fits_base:
        problems = report.differences or ["the edit is already in it. Give the model without it."]
        raise DeltaError(
            one_message(f"Edit {delta.short_id} does not belong to `{model}`:", problems)
        )


def _linear_modules(delta: Delta, model: str | Path, trust_remote_code: bool) -> dict[str, _Linear]:
    """Returns the linear module of each edited matrix.

    Raises:
        DeltaError: A parameter is not the weight of a linear module.
    """
    skeleton = model_without_weights(
        str(Path(model).expanduser().resolve()), trust_remote_code=trust_remote_code
    )
    modules = dict(skeleton.named_modules())
    found, wrong = {}, []
    for name in delta.new:
        path, _, own = name.rpartition(".")
        module = modules.get(path)
        if own == "weight" and isinstance(module, (nn.Linear, Conv1D)):
            found[name] = _Linear(path, isinstance(module, Conv1D))
        else:
            wrong.append(f"`{name}` is not the weight of a linear layer.")
    if wrong:
        raise DeltaError(
            one_message("LoRA cannot hold this edit. Use as=adapter or as=model:", wrong)
        )
    return found
