"""A comparison of editing methods as a picture: accuracies, forgetting and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..report import write_picture
from ..tables import one_line
from .outcome import Comparison, Outcome, accuracies, checked, headline

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is too pale for
# white paper and gives way to a grey. Markers differ as well, for print without colour.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F",
)  # fmt: skip
_MARKERS = "osD^vph<"
_GREY = "#666666"
# Without generated answers the teacher-forced accuracies take their place.
_PANELS = (
    (("reliability", "reliability"), ("rewrite_acc", "rewrite_acc")),
    (("generalization", "generalization"), ("rephrase_acc", "rephrase_acc")),
    (("portability", "portability"),),
    (("locality", "locality"),),
    (("capability", "capability"),),
)
_LONGEST_NAME = 22
# Where a label may stand: points from its point, degrees.
_RADII = tuple(range(9, 120, 9))
_ANGLES = (0, 180, 45, 135, -45, -135, 90, -90)
_SMALLEST_COST = 1e-4  # seconds: a logarithm needs more than nothing


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outcomes = [checked(outcome) for outcome in comparison.outcomes]
    panels = _panels(outcomes)
    cost_share = max(1.5, 0.55 * len(panels))
    height = max(3.9, 2.2 + 0.55 * len(outcomes))
    figure = Figure(figsize=(12, height), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    *left, right = figure.subplots(
        1, len(panels) + 1, width_ratios=[1] * len(panels) + [cost_share]
    )
    before = headline(
        Outcome("", after_all=comparison.before, capability=comparison.capability_before)
    )
    for axes, key in zip(left, panels, strict=True):
        _draw_accuracy(axes, key, outcomes, before[key])
    _label_rows(left[0], outcomes)
    for axes in left[1:]:
        axes.tick_params(labelleft=False)
    labels = _draw_cost(right, panels[0], outcomes)
    _draw_titles(figure, comparison, outcomes, any(before[key] is not None for key in panels))
    # Where a label fits is known once everything else has its place.
    canvas.draw()
    figure.set_layout_engine("none")
    place_labels(right, labels, canvas.get_renderer())
    return figure


def _panels(outcomes: list[Outcome]) -> list[str]:
    """Returns the figures that get a panel: those that any method has."""
    rows = [headline(outcome) for outcome in outcomes if outcome.status == "ok"]
    panels = []
    for choices in _PANELS:
        found = [key for key, _ in choices if any(row[key] is not None for row in rows)]
        panels += found[:1]
    return panels or ["reliability"]


def _draw_accuracy(axes: Axes, key: str, outcomes: list[Outcome], before: float | None) -> None:
    """Draws one accuracy of all methods, one row each."""
    axes.set_title(f"{key} ↑", fontsize=11)
    axes.set(xlim=(-0.14, 1.14), ylim=(len(outcomes) - 0.4, -0.6), yticks=range(len(outcomes)))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.hlines(range(len(outcomes)), 0, 1, color="#E6E6E6", linewidth=0.8, zorder=1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if before is not None and math.isfinite(before):
        axes.axvline(before, color=_GREY, linestyle=(0, (3, 2)), linewidth=1.2, zorder=2)
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center"} | _on_white()
    for row, outcome in enumerate(outcomes):
        if outcome.status != "ok":
            continue
        value = headline(outcome)[key]
        if value is None:
            _write_in_row(axes, row, "no figure")
            continue
        colour, marker = look(row)
        each = accuracies(outcome.right_after_each).get(key)
        if each is not None:
            # The hollow marker is the larger one: where nothing is forgotten it is a ring.
            axes.plot([each, value], [row, row], color=colour, linewidth=2, zorder=3)
            hollow: dict[str, Any] = {
                "markersize": 11,
                "markerfacecolor": "white",
                "markeredgewidth": 1.3,
            }
            axes.plot(each, row, marker, color=colour, zorder=4, **hollow)
            below: dict[str, Any] = {
                "xytext": (0, -9.5),
                "va": "top",
                "color": _GREY,
                "fontsize": 8,
            }
            axes.annotate(f"{each:.2f}", (each, row), **below, **style)
        axes.plot(value, row, marker, markersize=6, color=colour, zorder=5)
        above: dict[str, Any] = {"xytext": (0, 8), "va": "bottom", "fontsize": 9}
        axes.annotate(f"{value:.2f}", (value, row), **above, **style)


def _write_in_row(axes: Axes, row: float, text: str) -> None:
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10, "style": "italic"}
    axes.text(0.5, row, text, color=_GREY, **style, **_on_white())


def _label_rows(axes: Axes, outcomes: list[Outcome]) -> None:
    """Writes the methods' names beside the rows, and why a row is empty."""
    axes.set_yticklabels([_name(outcome) for outcome in outcomes], fontsize=10.5, parse_math=False)
    for row, outcome in enumerate(outcomes):
        if outcome.status != "ok":
            axes.get_yticklabels()[row].set_color(_GREY)
            _write_in_row(axes, row, outcome.status)


def _draw_cost(axes: Axes, key: str, outcomes: list[Outcome]) -> list[Point]:
    """Draws seconds per edit against reliability; returns the points and their labels."""
    points = []
    memory_of = {o.peak_memory_of for o in outcomes if o.status == "ok" and o.peak_memory_gib}
    for row, outcome in enumerate(outcomes):
        figures = headline(outcome)
        seconds, value, memory = (figures[k] for k in ("seconds_per_edit", key, "peak_memory_gib"))
        if outcome.status != "ok" or seconds is None or value is None:
            continue
        colour, marker = look(row)
        seconds = max(seconds, _SMALLEST_COST)
        axes.plot(seconds, value, marker, markersize=9, color=colour, zorder=4)
        of = f" ({outcome.peak_memory_of or 'run'})" if len(memory_of) > 1 else ""
        note = "" if memory is None else f"\n{memory:.1f} GiB{of}"
        points.append(Point(seconds, value, _name(outcome) + note))
    title = "cost"
    if len(memory_of) == 1:
        title += f", with the peak memory of the {memory_of.pop() or 'run'}"
    axes.set_title(title, fontsize=11)
    axes.set(ylim=(-0.12, 1.16), xlabel="seconds per edit ↓ (log scale)", ylabel=f"{key} ↑")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    _scale_seconds(axes, [point.x for point in points])
    if not points:
        _write_in_row(axes, 0.5, "no method has both figures")
    return points


def _scale_seconds(axes: Axes, seconds: list[float]) -> None:
    """Makes the x axis logarithmic, with room for labels and plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    logs = [math.log10(x) for x in seconds] or [math.log10(0.5)]
    pad = max(0.25 * (max(logs) - min(logs)), 0.5)
    low, high = min(logs) - pad, max(logs) + pad
    axes.set(xscale="log", xlim=(10**low, 10**high))
    between = (1.0,) if high - low > 3 else (1.0, 3.0) if high - low > 1.5 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=between))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


class Point(NamedTuple):
    """A labelled point of the picture, in the units of its axes."""

    x: float
    y: float
    label: str


def place_labels(
    axes: Axes, points: list[Point], renderer: RendererBase, bars: Sequence[Bbox] = ()
) -> None:
    """Writes a label beside each point, where it covers no point, no other label and no edge.

    Args:
        axes: What the points are drawn in, its place in the figure settled.
        points: The points.
        renderer: What the figure is drawn with.
        bars: What labels keep off besides, in pixels.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent().padded(-5)
    half = 7 / 72 * axes.figure.dpi  # of a marker, in pixels
    centres = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [
        *bars,
        *(Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half) for x, y in centres),
    ]
    for point in points:
        label = axes.annotate(
            point.label, (point.x, point.y), xytext=(0, 0), textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.7, "shrinkB": 5},
            fontsize=9, parse_math=False, zorder=6,
        )  # fmt: skip
        tried: list[tuple[int, float, float]] = []
        for radius, angle in product(_RADII, _ANGLES):
            _move(label, radius, angle)
            label.update_positions(renderer)
            box = Text.get_window_extent(label)  # without the line to the point
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            tried.append((box.count_overlaps(taken) + (0 if inside else 3), radius, angle))
            if not tried[-1][0]:
                break
        _, away, direction = min(tried, key=lambda place: place[0])
        _move(label, away, direction)
        if label.arrow_patch is not None:
            label.arrow_patch.set_visible(away > _RADII[0])
        label.update_positions(renderer)
        taken.append(Text.get_window_extent(label))


def _move(label: Any, radius: float, angle: float) -> None:
    """Puts a label `radius` points from its point, with its nearest edge or corner there."""
    right, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    label.set_position((radius * right, radius * up))
    label.set_ha("left" if right > 0.1 else "right" if right < -0.1 else "center")
    label.set_va("bottom" if up > 0.1 else "top" if up < -0.1 else "center")


def _draw_titles(
    figure: Figure, comparison: Comparison, outcomes: list[Outcome], with_before: bool
) -> None:
    from matplotlib.lines import Line2D

    edits = "1 edit" if comparison.n == 1 else f"{comparison.n:,} edits"
    lines = (
        f"{_shortened(comparison.model, 60)} on {_shortened(comparison.data, 40)}, {edits}",
        f"{comparison.device} ({comparison.dtype}), EasyEdit: {comparison.easyedit}",
    )
    figure.suptitle(
        "\n".join(_shortened(line, 110) for line in lines), fontsize=12, parse_math=False
    )
    line: dict[str, Any] = {"color": _GREY, "marker": "o", "markersize": 7}
    handles = [Line2D([], [], linestyle="none", label="after all edits", **line)]
    if any(outcome.status == "ok" and outcome.right_after_each for outcome in outcomes):
        hollow = Line2D([], [], markerfacecolor="white", label="right after each edit", **line)
        handles.append(hollow)
    if with_before:
        dashes = (0, (3, 2))
        handles.append(Line2D([], [], color=_GREY, linestyle=dashes, label="before editing"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)


def look(row: int) -> tuple[str, str]:
    """Returns the colour and the marker of a row; they come again after eight."""
    return _COLOURS[row % len(_COLOURS)], _MARKERS[row % len(_MARKERS)]


def _name(outcome: Outcome) -> str:
    return _shortened(outcome.method, _LONGEST_NAME)


def _shortened(text: str, length: int) -> str:
    text = one_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _on_white() -> dict[str, Any]:
    return {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}, "zorder": 6}
