"""The names of what is measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import HyperParamsError

METRICS = ("accuracy", "generated", "wrapped", "ppl", "fluency")
DEFAULT_METRICS = ("accuracy", "generated", "wrapped")


def check_metrics(metrics: Sequence[str]) -> None:
    """Checks names of metrics.

    Raises:
        HyperParamsError: One is unknown, or there is none.
    """
    if not metrics or any(name not in METRICS for name in metrics):
        raise HyperParamsError(
            f"`metrics={list(metrics)}` must be one or more of {', '.join(METRICS)}."
        )
