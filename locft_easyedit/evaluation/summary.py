"""Means over records: EasyEdit's summary, and the generated metrics beside it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_PLAIN = ("rewrite_acc", "rephrase_acc", "rewrite_ppl", "ood_acc")
_SECTIONS = ("locality", "portability", "fluency", "generated")
# Values of all records that have them, by section (empty for the plain ones) and key.
_Columns = dict[tuple[str, str], "array[float]"]


def summarize(metrics: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the means that EasyEdit's `summary_metrics` prints, fluency and `generated` besides.

    Args:
        metrics: A dictionary for each record, with `pre` and `post`; looked at once, in order.

    Returns:
        For `pre` and `post`: `rewrite_acc`, `rephrase_acc`, `rewrite_ppl`, `ood_acc`, and the
        entries of `locality` and `portability` that end in `acc`, where records have them;
        `fluency` and the figures under `generated` as well. A mean is over the records that have
        the metric, after a mean over a record's prompts.
    """
    columns: dict[str, _Columns] = {"pre": {}, "post": {}}
    for record in metrics:
        for phase, found in columns.items():
            _collect(record.get(phase, {}), found)
    return {phase: _means(found) for phase, found in columns.items()}


def _collect(record: Mapping[str, Any], columns: _Columns) -> None:
    """Adds a record's values, each the mean over its prompts, to their columns."""
    for key in _PLAIN:
        if key in record:
            _add(columns, "", key, record[key])
    for section in _SECTIONS:
        part = record.get(section)
        if isinstance(part, Mapping):
            for key, value in part.items():
                shares = section in ("locality", "portability")
                if key.endswith("acc") if shares else _is_number(value):
                    _add(columns, section, key, value)


def _add(columns: _Columns, section: str, key: str, value: Any) -> None:
    columns.setdefault((section, key), array("d")).append(float(np.mean(value)))


def _means(columns: _Columns) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for key in _PLAIN:
        if ("", key) in columns:
            means[key] = float(np.mean(columns["", key]))
    for section in _SECTIONS:
        own = {key: float(np.mean(v)) for (s, key), v in columns.items() if s == section}
        if own:
            means[section] = own
    return means


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
