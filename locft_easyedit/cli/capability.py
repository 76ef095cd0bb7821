"""`locft capability`: general capability of a model, or of an edited one beside its original."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, List, Optional, Union  # noqa: UP035

from ..errors import HyperParamsError
from ..evaluation.capability.metrics import PAPER_TASKS
from ..hparams_rules import DTYPES
from .arguments import read_arguments

# What `capability.json` says of how the figures were made.
_SETTINGS = ("tasks", "tasks_dir", "limit", "num_fewshot", "batch_size", "dtype")


# OmegaConf reads these annotations at run time and knows no PEP 604 unions on Python 3.10.
@dataclass(kw_only=True)
class CapabilityConfig:
    """What the command accepts; see `help.CAPABILITY`."""

    model: str
    original: Optional[str] = None  # noqa: UP045
    tasks: List[str] = field(default_factory=lambda: list(PAPER_TASKS))  # noqa: UP006
    tasks_dir: Optional[str] = None  # noqa: UP045
    limit: Optional[int] = None  # noqa: UP045
    num_fewshot: Optional[int] = None  # noqa: UP045
    batch_size: int = 8
    device: Optional[Union[int, str]] = None  # noqa: UP007, UP045
    dtype: str = "float32"
    model_parallel: bool = False
    trust_remote_code: bool = False
    output: str = "outputs/capability"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise HyperParamsError(f"`dtype={self.dtype}` must be one of {', '.join(DTYPES)}.")
        if self.batch_size < 1:
            raise HyperParamsError(f"`batch_size={self.batch_size}` must be 1 or more.")


def main(arguments: Sequence[str]) -> int:
    """Runs `locft capability`; returns the exit status.

    Raises:
        LocFTError: The arguments, the tasks or a model cannot be used.
    """
    config = read_arguments(
        CapabilityConfig, arguments, command="capability", positional=("model",)
    )
    run_capability(config)
    return 0


def run_capability(config: CapabilityConfig) -> None:
    """Measures as `config` says, prints the table and writes `capability.json`.

    Raises:
        LocFTError: The tasks, a model or the folder cannot be used; tasks and folder are checked
            before a model is loaded.
    """
    from ..evaluation.capability.harness import capability_table
    from ..evaluation.capability.prepared_tasks import prepare_tasks
    from ..modeling.loading import resolve_device
    from ..utils.output import prepare_folder, show, write_json

    models = {"before": config.original, "after": config.model}
    if config.original is None:
        models = {"model": config.model}
    resolve_device(config.device)
    output = prepare_folder(config.output)
    ready = prepare_tasks(
        config.tasks,
        tasks_dir=config.tasks_dir,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
    )
    results = {label: _measured(str(name), ready, config) for label, name in models.items()}
    path = output / "capability.json"
    content = {
        "models": models,
        "results": results,
        "settings": {key: getattr(config, key) for key in _SETTINGS}
        | {"lm_eval": version("lm_eval")},
    }
    write_json(path, content)
    show(capability_table(results))
    for label, result in results.items():
        for name, entry in result["tasks"].items():
            if "reason" in entry:
                sys.stdout.write(f"{label}, {name}: no value, because {entry['reason']}\n")
    sys.stdout.write(f"capability: {path}\n")


def _measured(name: str, ready: Any, config: CapabilityConfig) -> dict[str, Any]:
    """Returns the result of one model, which is gone from memory afterwards."""
    import torch

    from ..evaluation.capability.harness import measure_prepared
    from ..modeling.loading import load_causal_lm

    model, tokenizer = load_causal_lm(
        name,
        device=config.device,
        dtype=config.dtype,
        model_parallel=config.model_parallel,
        trust_remote_code=config.trust_remote_code,
    )
    result = measure_prepared(model, tokenizer, ready, batch_size=config.batch_size)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return result
