"""What is said of a model's health after an edit, and when it is called damaged.

The thresholds were chosen on SmolLM2-135M-Instruct in float32: 50 edits, batches of 10, at most 25
epochs, the down-projection of one layer; 4e-3 is the rate of its YAML. Text is the perplexity of
the fixed text, after / before (19.8); change the norm of the change over that of the matrix; the
rest is independent of both: next tokens of other text that stay the same, and the tasks
`locft_basics` and `locft_copying` (0.83 and 0.60 before).

    data         layer     lr  reliability    text  change  next tokens  basics  copying
    ZsRE            27   1e-3         0.50    1.11    0.17         0.88    0.79     0.65
    ZsRE            27   4e-3         1.00    1.28    0.30         0.82    0.80     0.75
    ZsRE            27  12e-3         0.98    2.27    0.54         0.66    0.79     0.75
    ZsRE            27  40e-3         1.00    16.3    1.24         0.42    0.69     0.45
    ZsRE            27   0.12         0.96     848    3.70         0.13    0.51     0.10
    ZsRE            15   1e-3         0.78    1.14    0.16         0.82    0.78     0.60
    ZsRE            15   4e-3         1.00    1.43    0.29         0.74    0.78     0.60
    ZsRE            15  12e-3         1.00    2.14    0.52         0.61    0.71     0.55
    CounterFact     27   1e-3         0.88    1.13    0.16         0.80    0.80     0.60
    CounterFact     27   4e-3         1.00    1.52    0.27         0.66    0.80     0.60
    CounterFact     27  12e-3         1.00    3.37    0.52         0.49    0.81     0.35
    CounterFact     27  40e-3         0.98    28.7    1.33         0.25    0.69     0.10
    CounterFact     27   0.12         1.00    5543    3.50         0.07    0.55     0.00

Reliability says nothing about damage. A ratio of 2.5 separates what lost a task from what did not;
the change alone does so only where the matrix moved by more than its own norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .weight_norms import Norms

PERPLEXITY_RATIO = 2.5
RELATIVE_CHANGE = 1.0
_GUESSING = 0.5  # of the vocabulary: a perplexity above it is a guess among that many tokens


@dataclass(frozen=True)
class HealthReport:
    """How a model is after an edit, beside how it was before.

    Attributes:
        perplexity_before: Of the fixed text, before the session's first training of all edits;
            `None` where it was not measured.
        perplexity_after: After the edit. A number that is not finite is one of a broken model.
        matrices: What `change_of` says of each trained parameter, by name.
        damaged: Whether something is beyond what a healthy edit does.
        warnings: What, and what to do about it.
        not_measured: Why there is no perplexity; empty where there is one.
    """

    perplexity_before: float | None
    perplexity_after: float | None
    matrices: dict[str, Norms]
    damaged: bool = False
    warnings: list[str] = field(default_factory=list)
    not_measured: str = ""

    @property
    def perplexity_ratio(self) -> float | None:
        """The perplexity after, over that before."""
        if self.perplexity_before is None or self.perplexity_after is None:
            return None
        return self.perplexity_after / self.perplexity_before

    def to_dict(self) -> dict[str, Any]:
        """Returns the report ready for JSON."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HealthReport:
        """Returns the report that `to_dict` gave.

        Raises:
            KeyError: Something is missing.
        """
        return cls(**{f.name: values[f.name] for f in fields(cls)})


def damages(
    before: float | None,
    after: float | None,
    matrices: Mapping[str, Norms],
    vocabulary: int,
) -> list[str]:
    """Returns what a healthy edit does not do; nothing if all is well.

    Args:
        before: The text's perplexity before the edit; `None` where it was not measured.
        after: The same after it.
        matrices: As in `HealthReport`.
        vocabulary: Tokens that the model knows.
    """
    found = []
    if before is not None and after is not None and math.isfinite(before):
        if not math.isfinite(after):
            found.append(f"the perplexity of ordinary text is {after} ({before:.4g} before)")
        # To a model that guesses, a toy say, this text tells nothing.
        elif after > PERPLEXITY_RATIO * before and before < _GUESSING * vocabulary:
            found.append(
                f"the perplexity of ordinary text rose from {before:.4g} to {after:.4g}, to more "
                f"than {PERPLEXITY_RATIO:g} times"
            )
    for name, norms in matrices.items():
        if "spectral_ratio" not in norms:
            continue  # a bias or a norm's weights may well begin at 0
        change = norms["relative_change"]
        if not change <= RELATIVE_CHANGE:  # NaN as well
            found.append(f"{name} changed by {change:.3g} times its own norm")
    return found
