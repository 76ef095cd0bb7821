"""General capability of a model in memory, measured by lm-evaluation-harness.

An edited model should lose none of it. The paper (arXiv 2509.22072) reports the mean of
`PAPER_TASKS`; `locft_basics` and `locft_copying` are small tasks of our own that need no download.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ...utils.progress import progress_bar
from ...utils.tables import Row, terminal_table
from .metrics import PAPER_TASKS, choose_metric, scale_of
from .prepared_tasks import CapabilityError, PreparedTasks, prepare_tasks
from .surroundings import errors_only, model_kept, padded_copy, surroundings_kept


def measure_capability(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Returns how well a model does each task, and the mean: `prepare_tasks`, `measure_prepared`.

    Raises:
        MissingDependencyError: lm_eval is not installed.
        CapabilityError: The tasks or settings cannot be used; nothing was run.
    """
    ready = prepare_tasks(
        tasks, tasks_dir=tasks_dir, limit=limit, num_fewshot=num_fewshot, progress=progress
    )
    return measure_prepared(model, tokenizer, ready, batch_size=batch_size, progress=progress)


def measure_prepared(
    model: Any, tokenizer: Any, ready: PreparedTasks, *, batch_size: int = 8, progress: bool = True
) -> dict[str, Any]:
    """Returns how well a model does each task of `prepare_tasks`, and the mean.

    The model, its tokenizer and the program's random states are left as they were.

    Args:
        model: A causal language model, on its device.
        tokenizer: Its tokenizer; no chat template is applied.
        ready: The tasks; they are the same for the next model.
        batch_size: Prompts run together.
        progress: Show progress bars.

    Returns:
        `tasks`: name -> `metric` (the harness's, with its filter), `value` (0 to 1), `stderr`
        (`None` where the harness has no closed form, as for BLEU), `n` (documents),
        `num_fewshot` (`None` if a group's tasks differ) and `all` (every metric in the harness's
        own scale); and `mean`, over these tasks. A value that is NaN or infinite is `None`, with
        `reason`, and so is the mean then.

    Raises:
        CapabilityError: The batch size is below 1, or the model's context too short for a task.
    """
    from lm_eval.models.huggingface import HFLM

    if batch_size < 1:
        raise CapabilityError(f"`batch_size={batch_size}` must be 1 or more.")
    entries = {}
    with model_kept(model), surroundings_kept(progress=progress):
        with errors_only():
            lm = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=padded_copy(tokenizer),
                batch_size=batch_size,
            )
        _check_context(lm, ready)
        bar = progress_bar(ready.rows, desc="capability", unit="task")
        for name in bar:
            bar.set_postfix_str(name)
            entries[name] = _measure(lm, name, ready)
    missing = [name for name, entry in entries.items() if entry["value"] is None]
    if missing:
        reason = f"without a value: {', '.join(missing)}"
        return {"tasks": entries, "mean": None, "reason": reason}
    return {"tasks": entries, "mean": float(np.mean([e["value"] for e in entries.values()]))}


class _NaNWatch:
    """A forward hook that sees NaN among logits; a greedy choice or an argmax hides it."""

    def __init__(self) -> None:
        self.seen = torch.tensor(False)

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        self.seen = self.seen.to(output.logits.device) | output.logits.isnan().any()


def _check_context(lm: Any, ready: PreparedTasks) -> None:
    """Raises if a task generates more tokens than the model's context holds."""
    from lm_eval.models.utils import normalize_gen_kwargs

    for name, row in ready.rows.items():
        for task in row["tasks"].values():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            settings = task.get_config("generation_kwargs") or {}
            n_new = normalize_gen_kwargs(settings, lm.max_gen_toks)["max_gen_toks"]
            if n_new >= lm.max_length:
                raise CapabilityError(
                    f"`{task.task_name}` generates up to {n_new} tokens, and the model's context "
                    f"holds {lm.max_length} with the prompt. Leave out `{name}`."
                )


def _measure(lm: Any, name: str, ready: PreparedTasks) -> dict[str, Any]:
    """Returns the entry of one task or group; seeds are those of the harness's command."""
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in ready.rows[name]["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    watch = _NaNWatch()
    hook = lm.model.register_forward_hook(watch)
    try:
        # Not `simple_evaluate`: it also runs git and other programs to describe the machine, and
        # returns nothing in a process whose LOCAL_RANK is not 0.
        results = lm_eval.evaluate(
            lm,
            ready.rows[name],
            limit=ready.limit,
            bootstrap_iters=100,  # 0 would leave out the closed forms as well
            log_samples=False,
        )
    finally:
        hook.remove()
    reported = results["results"][name]
    metrics = {
        key: float(value)
        for key, value in reported.items()
        if "," in key and "_stderr," not in key and isinstance(value, Real)
    }
    key = choose_metric(name, metrics)
    scale = scale_of(key) if key else 1.0
    value = metrics[key] / scale if key else math.nan
    error = reported.get((key or "").replace(",", "_stderr,", 1))
    shots = set(results["n-shot"].values())
    entry: dict[str, Any] = {
        "metric": _plain(key) if key else "none",
        "value": value,
        "stderr": _finite(float(error) / scale) if isinstance(error, Real) else None,
        "n": sum(number["effective"] for number in results["n-samples"].values()),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "all": {_plain(one): _finite(number) for one, number in metrics.items()},
    }
    reason = None
    if watch.seen:
        reason = "the model gave NaN"
    elif key is None:
        reason = f"the harness reported no metric that counts, but {', '.join(metrics) or 'none'}"
    elif not 0 <= value <= 1:  # NaN as well
        reason = f"{entry['metric']}={value} is no share between 0 and 1"
    if reason:
        entry |= {"value": None, "stderr": None, "reason": reason}
    return entry


def _plain(key: str) -> str:
    """Returns a `metric,filter` key without the filter where there is none."""
    return key.removesuffix(",none")


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def capability_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table of tasks and their mean, one column a model, with the change at the end.

    Args:
        results: Heading -> what `measure_prepared` returned for the same tasks, for example
            `before` and `after`. The change is that of the last against the first.
    """
    first, *_ = measured = list(results.values())
    rows = []
    for name, about in first["tasks"].items():
        entries = [result["tasks"][name] for result in measured]
        values = [(entry["value"], entry["stderr"]) for entry in entries]
        rows.append(Row([name, about["metric"], str(about["n"]), *_cells(values)]))
    means = _cells([(result["mean"], None) for result in measured])
    rows.append(Row(["mean", "", "", *means], section=True))
    return terminal_table(
        ["task", "metric", "n", *results, *(["change"] if len(results) > 1 else [])],
        rows,
        title="Capability: shares between 0 and 1",
        text_columns=2,
    )


def _cells(values: Sequence[tuple[float | None, float | None]]) -> list[str]:
    """Returns a row's values with their standard errors, and the change if there are several."""
    cells = [
        ("no value" if value is None else f"{value:.3f}")
        + ("" if error is None else f" ± {error:.3f}")
        for value, error in values
    ]
    if len(values) > 1:
        first, last = values[0][0], values[-1][0]
        cells.append("-" if first is None or last is None else f"{last - first:+.3f}")
    return cells
