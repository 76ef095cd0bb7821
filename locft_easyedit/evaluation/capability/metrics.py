"""Which metric of a task counts as its capability, as a share between 0 and 1."""

from __future__ import annotations

from collections.abc import Collection

# Those of "Fine-tuning Done Right in Model Editing" (arXiv 2509.22072), as the harness names them.
PAPER_TASKS = ("mmlu", "nq_open", "sst2", "wmt16-de-en", "gsm8k")
OWN_TASKS = ("locft_basics", "locft_copying")

# Task -> the harness's `metric,filter`. The paper names the tasks, not the metrics: these are
# the ones that each task's own paper reports, and the following choices are ours.
# - wmt16-de-en: BLEU, divided by 100 so that it is a share like the others.
# - gsm8k: the last number of the answer (flexible-extract), so that an answer counts whose form
#   is not the "#### 42" of the examples; strict-match stands beside it under `all`.
_CHOSEN = {
    "mmlu": "acc,none",
    "nq_open": "exact_match,remove_whitespace",
    "sst2": "acc,none",
    "wmt16-de-en": "bleu,none",
    "gsm8k": "exact_match,flexible-extract",
}

# For every other task the first of these that it has, and of its filters the first of these, or
# else the one that the task names first.
SHARES = ("acc_norm", "acc", "exact_match", "em", "f1", "bleu", "chrf")
_FILTERS = ("none", "flexible-extract")

# Metrics that the harness gives in per cent.
_SCALES = {"bleu": 100.0, "chrf": 100.0}


def choose_metric(task: str, keys: Collection[str]) -> str | None:
    """Returns which of a task's `metric,filter` keys counts; `None` if none can.

    Args:
        task: Its name in the harness.
        keys: What the harness reports for it, in its order.
    """
    if _CHOSEN.get(task) in keys:
        return _CHOSEN[task]
    for metric in SHARES:
        own = [key for key in keys if key.partition(",")[0] == metric]
        if own:
            preferred = [f"{metric},{name}" for name in _FILTERS]
            return next((key for key in preferred if key in own), own[0])
    return None


def scale_of(key: str) -> float:
    """Returns what the value of a `metric,filter` key is divided by to be a share."""
    return _SCALES.get(key.partition(",")[0], 1.0)
