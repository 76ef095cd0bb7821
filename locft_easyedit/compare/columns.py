"""The columns of a comparison's table: which figures, under which names, in which form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A figure of `headline`: its name and abbreviation as heads, and its meaning."""

    key: str
    name: str
    short: str
    meaning: str
    higher_is_better: bool = True

    @property
    def arrow(self) -> str:
        """Where better is."""
        return "↑" if self.higher_is_better else "↓"


COLUMNS = (
    Column("reliability", "reliability", "rel.", "edited prompts that get the new answer"),
    Column("contains_target", "contains", "has", "edited prompts whose answer contains it"),
    Column("generalization", "generalization", "gen.", "reworded prompts that get it"),
    Column("portability", "portability", "port.", "questions that follow from an edit"),
    Column("locality", "locality", "loc.", "unchanged tokens on other prompts (teacher-forced)"),
    Column("rewrite_acc", "rewrite_acc", "rewr.", "right tokens of the target (teacher-forced)"),
    Column("rephrase_acc", "rephrase_acc", "reph.", "the same for reworded prompts"),
    Column("capability", "capability", "cap.", "mean over the capability tasks"),
    Column(
        "seconds_per_edit",
        "s per edit",
        "s/edit",
        "seconds of editing, divided by the edits",
        False,
    ),
    Column("peak_memory_gib", "peak GiB", "GiB", "peak memory", False),
)


def cost_text(value: Any) -> str:
    """Returns about three digits, never in the exponential form."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return str(value)
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    if value < 0.001:
        return "<0.001"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
