"""Means over records: EasyEdit's summary, and the generated metrics beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def summarize(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the means that EasyEdit's `summary_metrics` prints, fluency and `generated` besides.

    Args:
        metrics: A dictionary for each record, with `pre` and `post`.

    Returns:
        For `pre` and `post`: `rewrite_acc`, `rephrase_acc`, `rewrite_ppl`, `ood_acc`, and the
        entries of `locality` and `portability` that end in `acc`, where records have them;
        `fluency` and the figures under `generated` as well. A mean is over the records that have
        the metric, after a mean over a record's prompts.
    """
    return {phase: _phase([m.get(phase, {}) for m in metrics]) for phase in ("pre", "post")}


def _phase(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for key in ("rewrite_acc", "rephrase_acc", "rewrite_ppl", "ood_acc"):
        _add_mean(means, key, [record[key] for record in records if key in record])
    for section in ("locality", "portability", "fluency", "generated"):
        parts = [record[section] for record in records if isinstance(record.get(section), Mapping)]
        numeric = {
            key: None
            for part in parts
            for key, value in part.items()
            if (
                key.endswith("acc") if section in ("locality", "portability") else _is_number(value)
            )
        }
        section_means: dict[str, Any] = {}
        for key in numeric:
            _add_mean(section_means, key, [part[key] for part in parts if key in part])
        if section_means:
            means[section] = section_means
    return means


def _add_mean(means: dict[str, Any], key: str, values: list[Any]) -> None:
    """Adds the mean of the values; a value may be a list with one entry a prompt."""
    if values:
        means[key] = float(np.mean([np.mean(value) for value in values]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
