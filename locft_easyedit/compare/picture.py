"""A comparison of editing methods as a picture: accuracies, forgetting and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.output import write_picture
from ..utils.plotting import (
    GREY,
    PALE,
    handle,
    legend_below,
    look,
    new_figure,
    open_axes,
    plain_log_ticks,
)
from ..utils.tables import counted, one_line
from .outcome import Comparison, Outcome, accuracies, checked, headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Without generated answers the teacher-forced accuracies take their place.
_PANELS = (
    ("reliability", "rewrite_acc"),
    ("generalization", "rephrase_acc"),
    ("chat_reliability",),
    ("portability",),
    ("locality",),
    ("capability",),
)
_TITLES = {"chat_reliability": "in chat"}
_LONGEST_NAME = 22
_SMALLEST_COST = 1e-4  # seconds: a logarithm needs more than nothing
_DASHES: dict[str, Any] = {"color": GREY, "linestyle": (0, (3, 2)), "linewidth": 1.2}
Figures = Mapping[str, float | None]


def write_comparison_picture(path: str | Path, comparison: Comparison) -> None:
    """Draws the comparison as one PNG, 1800 pixels wide.

    Raises:
        OutputError: The file cannot be written.
    """
    write_picture(path, comparison_figure(comparison))


def comparison_figure(comparison: Comparison) -> Figure:
    """Returns the figure: on the left each accuracy by method, on the right what an edit costs.

    A filled marker is the model after all edits; a hollow one, joined to it, the same figure right
    after each edit: the line between them is what later edits undid. A dashed line is the model
    before editing. A method without figures has its status in their place.
    """
    outcomes = [checked(outcome) for outcome in comparison.outcomes]
    rows = [headline(outcome) if outcome.status == "ok" else {} for outcome in outcomes]
    before = headline(comparison.before_editing)
    measured = {key for row in rows for key, value in row.items() if value is not None}
    panels = (next((key for key in keys if key in measured), None) for keys in _PANELS)
    keys = [key for key in panels if key] or ["reliability"]
    first = f"{_shortened(comparison.model, 60)} on {_shortened(comparison.data, 40)}"
    where = f"{comparison.device} ({comparison.dtype}), EasyEdit: {comparison.easyedit}"
    title = (f"{first}, {counted(comparison.n, 'edit')}", _shortened(where, 110))
    figure = new_figure(12, max(3.9, 2.2 + 0.55 * len(outcomes)), title)
    widths = [1.0] * len(keys) + [max(1.8, 0.5 * len(keys))]
    *left, right = figure.subplots(1, len(widths), width_ratios=widths)
    for axes, key in zip(left, keys, strict=True):
        _draw_accuracy(axes, key, outcomes, rows)
        if (value := before[key]) is not None and math.isfinite(value):
            axes.axvline(value, zorder=2, **_DASHES)
        axes.tick_params(labelleft=axes is left[0])
    left[0].set_yticklabels(map(_name, outcomes), fontsize=10.5, parse_math=False)
    _draw_cost(right, keys[0], outcomes, rows)
    handles = [handle("after all edits", "o")]
    if any(row and outcome.right_after_each for row, outcome in zip(rows, outcomes, strict=True)):
        handles.append(handle("right after each edit", "o", hollow=True, linestyle="-"))
    if any(before[key] is not None for key in keys):
        handles.append(handle("before editing", "", **_DASHES))
    legend_below(figure, handles)
    return figure


def _draw_accuracy(
    axes: Axes, key: str, outcomes: Sequence[Outcome], rows: Sequence[Figures]
) -> None:
    """Draws one accuracy of all methods, one row each."""
    axes.set_title(f"{_TITLES.get(key, key)} ↑", fontsize=11)
    axes.set(xlim=(-0.14, 1.14), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.grid(color=PALE, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    on_white: dict[str, Any] = {
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}, "ha": "center",
        "zorder": 6,
    }  # fmt: skip
    for i, (outcome, row) in enumerate(zip(outcomes, rows, strict=True)):
        value = row.get(key)
        if value is None:
            text = "no figure" if row else outcome.status
            axes.text(0.5, i, text, color=GREY, va="center", size=9, **on_white)
            continue
        colour, marker = look(i)
        each = accuracies(outcome.right_after_each).get(key)
        if each is not None:
            # The hollow marker is the larger one: where nothing is forgotten it is a ring.
            axes.plot([each, value], [i, i], color=colour, linewidth=2)
            axes.plot(each, i, marker, color=colour, markersize=11, markerfacecolor="white")
            below: dict[str, Any] = {"xytext": (0, -9.5), "textcoords": "offset points"}
            axes.annotate(
                f"{each:.2f}", (each, i), va="top", color=GREY, fontsize=8, **below, **on_white
            )
        axes.plot(value, i, marker, markersize=6, color=colour, zorder=5)
        above: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points"}
        axes.annotate(f"{value:.2f}", (value, i), va="bottom", fontsize=9, **above, **on_white)


def _draw_cost(axes: Axes, key: str, outcomes: Sequence[Outcome], rows: Sequence[Figures]) -> None:
    """Draws seconds per edit against reliability; the legend has the methods and their memory."""
    memory_of = {o.peak_memory_of or "run" for o, row in zip(outcomes, rows, strict=True)
                 if row.get("peak_memory_gib")}  # fmt: skip
    for i, (outcome, row) in enumerate(zip(outcomes, rows, strict=True)):
        seconds, value, memory = map(row.get, ("seconds_per_edit", key, "peak_memory_gib"))
        if seconds is None or value is None:
            continue
        label = _name(outcome)
        if memory is not None:
            kind = f" ({outcome.peak_memory_of or 'run'})" if len(memory_of) > 1 else ""
            label += f"\n{memory:.1f} GiB{kind}"
        colour, marker = look(i)
        point = max(seconds, _SMALLEST_COST), value
        axes.plot(*point, marker, markersize=9, color=colour, label=label, alpha=0.85)
    of_one = f", with the peak memory of the {min(memory_of)}" if len(memory_of) == 1 else ""
    axes.set_title(f"cost{of_one}", fontsize=11)
    axes.set(xlabel="seconds per edit ↓ (log scale)", ylabel=f"{key} ↑", ylim=(-0.08, 1.08))
    axes.set(xscale="log")
    open_axes(axes)
    if axes.lines:
        axes.margins(x=0.15)
        plain_log_ticks(axes.xaxis)
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
    else:
        style: dict[str, Any] = {"ha": "center", "color": GREY, "style": "italic"}
        axes.text(0.5, 0.5, "no method has both figures", transform=axes.transAxes, **style)


def _name(outcome: Outcome) -> str:
    return _shortened(outcome.method, _LONGEST_NAME)


def _shortened(text: str, length: int) -> str:
    text = one_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"
