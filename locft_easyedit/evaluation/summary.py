"""Means over records: EasyEdit's summary, and the generated metrics beside it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_PLAIN = ("rewrite_acc", "rephrase_acc", "rewrite_ppl", "ood_acc")
_SECTIONS = ("locality", "portability", "fluency", "generated", "wrapped")
# Values of all records that have them, by section (empty for the plain ones), key and, where the
# value is a mapping, its key; else empty.
_Columns = dict[tuple[str, str, str], "array[float]"]


def summarize(metrics: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the means that EasyEdit's `summary_metrics` prints, fluency and `generated` besides.

    Args:
        metrics: A dictionary for each record, with `pre` and `post`; looked at once, in order.

    Returns:
        For `pre` and `post`: `rewrite_acc`, `rephrase_acc`, `rewrite_ppl`, `ood_acc`, and the
        entries of `locality` and `portability` that end in `acc`, where records have them;
        `fluency` and the figures under `generated` and `wrapped` as well, those of each wrapper
        under `reliability_in`. A mean is over the records that have
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
                if section in ("locality", "portability"):
                    if key.endswith("acc"):
                        _add(columns, section, key, value)
                    continue
                # A figure, or one for each wrapper.
                for name, figure in (value if isinstance(value, Mapping) else {"": value}).items():
                    if _is_number(figure):
                        _add(columns, section, key, figure, name)


def _add(columns: _Columns, section: str, key: str, value: Any, name: str = "") -> None:
    columns.setdefault((section, key, name), array("d")).append(float(np.mean(value)))


def _means(columns: _Columns) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for key in _PLAIN:
        if ("", key, "") in columns:
            means[key] = float(np.mean(columns["", key, ""]))
    for section in _SECTIONS:
        own: dict[str, Any] = {}
        for (of, key, name), values in columns.items():
            if of == section and name:
                own.setdefault(key, {})[name] = float(np.mean(values))
            elif of == section:
                own[key] = float(np.mean(values))
        if own:
            means[section] = own
    return means


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
