"""General capability of a model in memory, measured by lm-evaluation-harness.

An edited model should lose none of it. The paper (arXiv 2509.22072) reports the mean of
`PAPER_TASKS`; `locft_basics` and `locft_copying` are small tasks of our own that need no download.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from .metrics import PAPER_TASKS, choose_metric, scale_of
from .prepare import CapabilityError, ReadyTask, ReadyTasks, prepare_tasks
from .surroundings import logging_kept, model_kept, padded_copy, random_states_kept, replaced

__all__ = [
    "PAPER_TASKS",
    "CapabilityError",
    "capability_table",
    "measure_capability",
    "measure_ready",
    "prepare_tasks",
]


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
    """Returns how well a model does each task, and the mean.

    The model, its tokenizer and the program's random states are left as they were.

    Args:
        model: A causal language model, on its device.
        tokenizer: Its tokenizer; no chat template is applied.
        tasks: Names of the harness, of `tasks_dir`, `locft_basics` or `locft_copying`.
        tasks_dir: A folder with the harness's YAMLs.
        limit: Documents of each task at most; of a group, of each task below it.
        num_fewshot: Solved examples in each prompt; `None` is each task's own number.
        batch_size: Prompts run together.
        progress: Show progress bars.

    Returns:
        `tasks`: name -> `metric` (the harness's, with its filter), `value` (0 to 1), `stderr`
        (`None` where the harness has no closed form, as for BLEU), `n` (documents),
        `num_fewshot` (`None` if a group's tasks differ) and `all` (every metric in the harness's
        own scale); and `mean`, over these tasks. A value that is no number is `None`, with
        `reason`, and so is the mean then.

    Raises:
        MissingDependencyError: lm_eval is not installed.
        CapabilityError: The tasks or settings cannot be used; nothing was run.
    """
    ready = prepare_tasks(
        tasks, tasks_dir=tasks_dir, limit=limit, num_fewshot=num_fewshot, progress=progress
    )
    return measure_ready(model, tokenizer, ready, batch_size=batch_size, progress=progress)


def measure_ready(
    model: Any, tokenizer: Any, ready: ReadyTasks, *, batch_size: int = 8, progress: bool = True
) -> dict[str, Any]:
    """Returns what `measure_capability` does, for tasks of `prepare_tasks`.

    Args:
        model: A causal language model, on its device.
        tokenizer: Its tokenizer.
        ready: The tasks; they are the same for the next model.
        batch_size: Prompts run together.
        progress: Show progress bars.

    Raises:
        CapabilityError: The batch size is below 1, or the model's context too short for a task.
    """
    if batch_size < 1:
        raise CapabilityError(f"`batch_size={batch_size}` must be 1 or more.")
    with model_kept(model), random_states_kept(), logging_kept():
        with logging_kept(quiet=True):
            lm = _in_memory_model(model, padded_copy(tokenizer), batch_size, progress)
        _check_context(lm, ready)
        entries = {row.name: _measure(lm, row, ready.limit, progress) for row in ready.rows}
    missing = [name for name, entry in entries.items() if entry["value"] is None]
    if missing:
        reason = f"without a value: {', '.join(missing)}"
        return {"tasks": entries, "mean": None, "reason": reason}
    return {"tasks": entries, "mean": float(np.mean([e["value"] for e in entries.values()]))}


def capability_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table of tasks and their mean, one column a model, with the change at the end.

    Args:
        results: Heading -> what `measure_capability` returned, for example `before` and `after`.
            The change is that of the last against the first.
    """
    table = Table(title="Capability: shares between 0 and 1", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    table.add_column("n", justify="right")
    for heading in results:
        table.add_column(heading, justify="right")
    if len(results) > 1:
        table.add_column("change", justify="right")
    measured = list(results.values())
    names = list(dict.fromkeys(name for result in measured for name in result["tasks"]))
    for i, name in enumerate(names):
        entries = [result["tasks"].get(name, {}) for result in measured]
        about = next(entry for entry in entries if entry)
        cells = [_with_error(entry) for entry in entries]
        values = [entry.get("value") for entry in entries]
        table.add_row(
            name, about["metric"], str(about["n"]), *cells, *_change(values),
            end_section=i == len(names) - 1,
        )  # fmt: skip
    means = [result["mean"] for result in measured]
    table.add_row("mean", "", "", *(_share(mean) for mean in means), *_change(means))
    return table


def _share(value: float | None) -> str:
    return "no value" if value is None else f"{value:.3f}"


def _with_error(entry: Mapping[str, Any]) -> str:
    if not entry:
        return "-"
    stderr = entry["stderr"]
    return _share(entry["value"]) + ("" if stderr is None else f" ± {stderr:.3f}")


def _change(values: Sequence[float | None]) -> list[str]:
    if len(values) < 2:
        return []
    first, last = values[0], values[-1]
    return ["-" if first is None or last is None else f"{last - first:+.3f}"]


class _NaNWatch(LogitsProcessor):
    """Counts sequences for which the model gave NaN; a greedy choice hides it."""

    def __init__(self) -> None:
        self.seen: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = scores.isnan().any(dim=-1)  # [B]
        self.seen = found if self.seen is None else self.seen | found
        return scores


def _in_memory_model(model: Any, tokenizer: Any, batch_size: int, progress: bool) -> Any:
    """Returns the harness's view of a model, which counts prompts with NaN in `n_nan`."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):
        n_nan = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=not progress)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=not progress)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            options["disable_tqdm"] = not progress
            answers = super()._loglikelihood_tokens(requests, *args, **options)
            self.n_nan += sum(math.isnan(value) for value, _ in answers)
            return answers

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=not progress)

        def _model_generate(self, *args: Any, **options: Any) -> Any:
            watch = _NaNWatch()
            options["logits_processor"] = LogitsProcessorList([watch])
            output = super()._model_generate(*args, **options)
            self.n_nan += 0 if watch.seen is None else int(watch.seen.sum())
            return output

    return InMemory(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)


def _check_context(lm: Any, ready: ReadyTasks) -> None:
    """Raises if a task generates more tokens than the model's context holds."""
    from lm_eval.models.utils import normalize_gen_kwargs

    for row in ready.rows:
        for name, task in row.tasks.items():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            settings = normalize_gen_kwargs(
                task.get_config("generation_kwargs") or {}, lm.max_gen_toks
            )
            if settings["max_gen_toks"] >= lm.max_length:
                raise CapabilityError(
                    f"`{name}` generates up to {settings['max_gen_toks']} tokens, and the model's "
                    f"context holds {lm.max_length} with the prompt. Leave out `{row.name}`."
                )


def _measure(lm: Any, row: ReadyTask, limit: int | None, progress: bool) -> dict[str, Any]:
    """Returns the entry of one row; seeds as the harness's own command does."""
    import lm_eval.api.task
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in row.tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    lm.n_nan = 0
    bar = functools.partial(tqdm, desc=f"{row.name}: prompts", leave=False, disable=not progress)
    with replaced(lm_eval.api.task, "tqdm", bar):
        results = evaluate(
            lm,
            {"tasks": row.tasks, "groups": row.groups},
            limit=limit,
            bootstrap_iters=100,  # 0 would leave out the closed forms as well
            log_samples=False,
        )
    return _entry(row, results, lm.n_nan)


def _entry(row: ReadyTask, results: Mapping[str, Any], n_nan: int) -> dict[str, Any]:
    reported = results["results"][row.name]
    metrics = {
        key: float(value)
        for key, value in reported.items()
        if "," in key and "_stderr," not in key and isinstance(value, Real)
    }
    key = choose_metric(row.name, metrics)
    scale = scale_of(key) if key else 1.0
    value = metrics[key] / scale if key else math.nan
    metric, _, name = (key or ",").partition(",")
    error = reported.get(f"{metric}_stderr,{name}")
    shots = {results["n-shot"].get(task, 0) for task in row.tasks}
    entry: dict[str, Any] = {
        "metric": _plain(key) if key else "none",
        "value": value,
        "stderr": _finite(float(error) / scale) if isinstance(error, Real) else None,
        "n": sum(results["n-samples"][task]["effective"] for task in row.tasks),
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "all": {_plain(one): _finite(number) for one, number in metrics.items()},
    }
    reason = None
    if n_nan:
        reason = f"the model gave NaN for {n_nan} prompts"
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
