"""What a comparison of editing methods found: one `Outcome` a method, and its JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean
from typing import Any

from ..errors import DataError
from ..utils.json_fields import plain

_GENERATED = ("reliability", "contains_target", "generalization", "portability")
# Figures of an outcome, and of these the mappings in which `None` is a figure that got lost.
_FIGURES = ("after_all", "right_after_each", "by_commit", "capability", "seconds",
            "seconds_per_edit", "peak_memory_gib")  # fmt: skip
_NEVER_NONE = ("after_all", "right_after_each", "seconds")


@dataclass
class Outcome:
    """What one method did; a row of the table.

    Mappings are copied into plain values that JSON has: numbers of other libraries become numbers,
    anything else its text.

    Attributes:
        method: Its name.
        status: `ok`, `failed`, `unavailable` or `not finite` (see `checked`).
        reason: Why it is not `ok`, in one line; a traceback belongs in `log`.
        n_edits: Edits that were made.
        after_all: Means after all edits, nested as `summarize` returns them for `post`.
        right_after_each: Means of what was measured right after each edit, for methods that edit
            one by one.
        by_commit: For edits that come in commits: after each commit the reliability (generated) of
            each commit so far.
        capability: `tasks` and their `mean`, as `measure_capability` returns them.
        seconds: Seconds by phase.
        seconds_per_edit: What the comparison counts as the cost of an edit.
        peak_memory_gib: Peak memory in GiB.
        peak_memory_of: `GPU` or `process`.
        corpus: The text that the key covariances come from.
        hparams: Hyper-parameters.
        notes: What a reader should know, a sentence each.
        log: The file with everything that the method printed.
    """

    method: str
    status: str = "ok"
    reason: str | None = None
    n_edits: int = 0
    after_all: dict[str, Any] = field(default_factory=dict)
    right_after_each: dict[str, Any] | None = None
    by_commit: list[list[float]] = field(default_factory=list)
    capability: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_per_edit: float | None = None
    peak_memory_gib: float | None = None
    peak_memory_of: str | None = None
    corpus: str | None = None
    hparams: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    log: str | None = None

    def __post_init__(self) -> None:
        _make_plain_(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name: what JSON can hold, and NaN."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """Returns the outcome that `to_dict` made `values` of.

        Raises:
            DataError: They are not an outcome's fields.
        """
        differing = {f.name for f in fields(cls)} ^ set(values)
        if differing:
            raise DataError(
                f"The result of {values.get('method', 'a method')} is damaged or of another "
                f"version: {', '.join(sorted(differing))} is missing or unknown. Remove the folder "
                "of that method from `output` to have it compared anew."
            )
        return cls(**values)


@dataclass
class Comparison:
    """Several methods on one model and the same edits.

    Attributes:
        model: The model's name or folder.
        data: The name of the data.
        n: Edits.
        easyedit: Which EasyEdit, such as "PyPI release 0.0.1.dev0".
        device: Where it ran.
        dtype: Type of the weights.
        versions: Package -> version.
        before: Means before any edit, nested as `Outcome.after_all`.
        capability_before: As `Outcome.capability`.
        outcomes: One for each method.
    """

    model: str
    data: str
    n: int
    easyedit: str
    device: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    capability_before: dict[str, Any] | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        _make_plain_(self)

    @property
    def before_editing(self) -> Outcome:
        """The model before any edit, as if that were a method."""
        return Outcome("before", after_all=self.before, capability=self.capability_before)


def headline(outcome: Outcome) -> dict[str, float | None]:
    """Returns the figures of the outcome's row of the table; `None` where there is none.

    Those of `accuracies` after all edits, `capability`, `seconds_per_edit` and `peak_memory_gib`;
    of edits in commits the reliability of the first commit after the last one (`oldest_commit`),
    and the mean of each right after it (`newest_commit`).
    """
    commits = outcome.by_commit
    return accuracies(outcome.after_all) | {
        "oldest_commit": commits[-1][0] if commits else None,
        "newest_commit": fmean(row[-1] for row in commits) if commits else None,
        "capability": _number((outcome.capability or {}).get("mean")),
        "seconds_per_edit": _number(outcome.seconds_per_edit),
        "peak_memory_gib": _number(outcome.peak_memory_gib),
    }


def accuracies(means: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Returns the accuracies among nested means, `None` where there is none.

    `reliability`, `contains_target`, `generalization` and `portability` are those of the generated
    answers, `wrapped_reliability` and `chat_reliability` those in wrappers; `locality` is the mean
    over EasyEdit's locality accuracies, NaN if one of them is no number.
    """
    means = means or {}
    generated, locality = means.get("generated") or {}, means.get("locality") or {}
    wrapped = means.get("wrapped") or {}
    unchanged = [_number(v) for key, v in locality.items() if key.endswith("acc")]
    numbers = [math.nan if value is None else value for value in unchanged]
    return {
        **{key: _number(generated.get(key)) for key in _GENERATED},
        "wrapped_reliability": _number(wrapped.get("reliability")),
        "chat_reliability": _number(wrapped.get("chat_reliability")),
        "locality": sum(numbers) / len(numbers) if numbers else None,
        **{key: _number(means.get(key)) for key in ("rewrite_acc", "rephrase_acc")},
    }


def checked(outcome: Outcome) -> Outcome:
    """Returns the outcome; `not finite`, naming the figures, if one is NaN or infinite.

    An outcome that is not `ok` is returned as it is: its reason says more.
    """
    if outcome.status != "ok":
        return outcome
    found = [
        line
        for name in _FIGURES
        for line in _not_finite(getattr(outcome, name), name, none_counts=name in _NEVER_NONE)
    ]
    if outcome.capability is not None and outcome.capability.get("mean") is None:
        why = outcome.capability.get("reason")
        found.append("capability.mean is None" + (f" ({why})" if why else ""))
    if not found:
        return outcome
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    reason = f"Measured, but no finite number: {', '.join(found[:5])}{more}."
    return replace(outcome, status="not finite", reason=reason)


def _not_finite(value: Any, name: str, *, none_counts: bool = False) -> list[str]:
    """Returns the dotted names of numbers under `value` that are none, and what they are.

    With `none_counts` an entry of a mapping that is `None` counts: writing NaN as JSON's null is
    how such a figure usually gets lost.
    """
    if isinstance(value, Mapping):
        found = []
        for key, entry in value.items():
            if entry is None and none_counts:
                found.append(f"{name}.{key} is None")
            found += _not_finite(entry, f"{name}.{key}", none_counts=none_counts)
        return found
    if isinstance(value, list):
        return [f for i, entry in enumerate(value) for f in _not_finite(entry, f"{name}[{i}]")]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{name} is {value}"]
    return []


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None


def _make_plain_(record: Outcome | Comparison) -> None:
    for f in fields(record):
        if f.name != "outcomes":
            setattr(record, f.name, plain(getattr(record, f.name)))
