"""`locft evaluate`: all metrics of a model, edited by whatever method, without editing anything."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch

from ..data.readers import read_requests
from ..delta.apply import check_fits
from ..delta.delta import Delta
from ..distributed.world import get_world
from ..errors import DataError, HyperParamsError
from ..evaluation.divergence import BeforeEdit
from ..evaluation.evaluation import (
    SharedMeasurement,
    finish_,
    shared_evaluation,
)
from ..evaluation.metric_names import DEFAULT_METRICS, check_metrics
from ..evaluation.predictions import EvalConfig
from ..evaluation.prompts import Metrics
from ..evaluation.report import flat, metrics_table, seconds_table
from ..evaluation.summary import summarize
from ..modeling.loading import load_causal_lm
from ..utils.output import prepare_folder, show, write_json
from ..utils.parsing import is_file
from ..utils.timing import Stopwatch
from .arguments import read_arguments


@dataclass(kw_only=True)
class EvaluateConfig:
    """The arguments of `locft evaluate`."""

    model: str
    data: str
    n: Optional[int] = None  # noqa: UP045
    delta: Optional[str] = None  # noqa: UP045
    original: Optional[str] = None  # noqa: UP045
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))
    batch_size: int = 64
    row_tokens: int = 64
    device: Optional[str] = None  # noqa: UP045
    dtype: str = "float32"
    model_parallel: bool = False
    trust_remote_code: bool = False
    output: str = "outputs/evaluate"


def main(arguments: Sequence[str]) -> int:
    """Runs `locft evaluate`; returns the exit status: 1 if figures are no numbers."""
    config = read_arguments(EvaluateConfig, arguments, command="evaluate", positional=("model",))
    return run_evaluate(config)


def run_evaluate(config: EvaluateConfig) -> int:
    """Measures as `config` says, prints the table and writes `metrics.json`.

    Raises:
        LocFTError: Something in the arguments, the data or the model cannot be used.
    """
    _check(config)
    watch = Stopwatch()
    requests = read_requests(config.data, config.n)
    original: Sequence[Metrics] | None = None
    if config.original is not None and is_file(config.original):
        original = _stored(config, requests)
    delta = Delta.load(config.delta) if config.delta is not None else None
    world = get_world()
    before_edit = BeforeEdit(requests) if "wrapped" in config.metrics else None
    output = Path(world.broadcast_from_main(lambda: str(prepare_folder(config.output))))
    if config.original is not None and original is None:
        model, tokenizer = _load(config, config.original)
        watch.lap("loading")
        evaluation = _evaluation(config, model, tokenizer, requests, before_edit)
        original = evaluation.measure("before")
        watch.lap("metrics before")
        del evaluation
        del model, tokenizer
        gc.collect()  # the evaluation's own references to the model go in circles
        torch.cuda.empty_cache()
    model, tokenizer = _load(config, config.model)
    evaluation = _evaluation(config, model, tokenizer, requests, before_edit)
    watch.lap("loading")
    if delta is not None:
        check_fits(delta, model)
        if original is None:
            original = evaluation.measure("before")
            watch.lap("metrics before")
        delta.apply_(model)
    measured = evaluation.measure("after" if original else "")
    watch.lap("metrics after" if original else "metrics")
    records: list[dict[str, Any]] = [
        {"case_id": i, "requested_rewrite": request, "pre": {}, "post": post}
        for i, (request, post) in enumerate(zip(requests, measured, strict=True))
    ]
    for record, pre in zip(records, original or [], strict=bool(original)):
        try:
            finish_(pre, record["post"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"`original={config.original}` does not hold the metrics of these records "
                f"({type(error).__name__}: {error}). Measure the original model again."
            ) from error
        record["pre"] = pre
    summary = summarize(records)
    written = output / "metrics.json"

    def report() -> int:
        write_json(written, {"summary": summary, "seconds": watch.seconds, "records": records})
        show(metrics_table(summary), seconds_table(watch.seconds))
        sys.stdout.write(f"metrics: {written}\n")
        return _report_not_finite(summary)

    return world.broadcast_from_main(report)


def _check(config: EvaluateConfig) -> None:
    problems = []
    if config.batch_size < 1 or config.row_tokens < 1:
        problems.append("`batch_size` and `row_tokens` must be 1 or more.")
    if config.delta is not None and config.original is not None:
        problems.append("`delta` is measured against MODEL itself. Leave `original` out.")
    try:
        check_metrics(config.metrics)
    except HyperParamsError as error:
        problems.append(str(error))
    if problems:
        raise HyperParamsError(" ".join(problems))


def _load(config: EvaluateConfig, name: str) -> tuple[Any, Any]:
    return load_causal_lm(
        name,
        device=config.device,
        dtype=config.dtype,
        model_parallel=config.model_parallel,
        trust_remote_code=config.trust_remote_code,
    )


def _evaluation(
    config: EvaluateConfig,
    model: Any,
    tokenizer: Any,
    requests: list[dict[str, Any]],
    before_edit: BeforeEdit | None,
) -> SharedMeasurement:
    world = get_world()
    how = EvalConfig(config.batch_size, config.row_tokens, progress=world.is_main_process)
    return shared_evaluation(
        world, model, tokenizer, requests, how, metrics=config.metrics, before_edit=before_edit
    )


def _is_file(name: str | None) -> bool:
    return name is not None and is_file(name)


def _stored(config: EvaluateConfig, requests: list[dict[str, Any]]) -> list[Metrics]:
    """Returns the metrics of an earlier run on the same records.

    Raises:
        DataError: The file is no such run, or of other records.
    """
    path = Path(str(config.original))
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["records"]
        same = [record["requested_rewrite"] for record in records] == requests
        metrics: list[Metrics] = [_with_nan(record["post"]) for record in records]
        edited = any(record["pre"] for record in records)
        if not all(isinstance(entry, dict) for entry in metrics):
            raise TypeError("`post` is not a mapping")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"`original={path}` is no metrics.json of `locft evaluate` ({type(error).__name__}: "
            f"{error}). Give one, or the original model's folder."
        ) from error
    if not same:
        raise DataError(
            f"`original={path}` was measured on other records than data={config.data} n={config.n}."
            " Measure the original model on these."
        )
    if edited:
        raise DataError(
            f"`original={path}` was measured on an edited model. Give the metrics.json of the "
            "model before editing, or its folder."
        )
    if path.resolve() == (Path(config.output) / "metrics.json").resolve():
        raise DataError(
            f"`original={path}` is the file that this run would write. Choose another `output`."
        )
    needed = {"accuracy": "rewrite_acc", "generated": "generated", "wrapped": "wrapped"}
    lacking = [
        n for n in config.metrics if any(needed.get(n, "locality") not in m for m in metrics)
    ]
    if lacking:
        raise DataError(
            f"`original={path}` was measured without {', '.join(lacking)}. Measure the original "
            "model again with the same `metrics`."
        )
    return metrics


def _with_nan(value: Any) -> Any:
    """Returns what JSON gave, with NaN where it has null: that is how NaN was written."""
    if isinstance(value, dict):
        return {key: _with_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    return float("nan") if value is None else value


def _report_not_finite(summary: Mapping[str, Any]) -> int:
    """Returns the exit status; says which means are no numbers."""
    figures = flat(summary.get("post", {}))
    wrong = [name for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        sys.stderr.write(
            f"locft evaluate: {', '.join(wrong)} are no finite numbers: the model is damaged, or "
            "its numbers are too large for this dtype (try dtype=bfloat16 or float32).\n"
        )
    return 1 if wrong else 0
