"""A location study as a trade-off: what a cell generalizes against what it moves besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import write_picture
from .outcome import CellOutcome, StudyOutcome
from .picture import LEAST_DRIFT, chosen_text, draw_title
from .places import MODULES
from .table import progress_text, study_name

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The whole MLP and the whole layer stand out: they are more than one matrix.
_MARKERS = dict(zip(MODULES, ("<", ">", "^", "d", "v", "p", "h", "8", "o", "s", "P"), strict=True))
_GREY = "#666666"
_RELIABLE = 0.9
_MOST_LABELS = 16
_APART = 0.3  # inches between two numbers, about
_AXES = {
    "generalization": "generalization ↑ (generated, the data's rephrase prompts)",
    "reworded": "reworded ↑ (the prompts within other sentences)",
}


def write_front(path: str | Path, outcome: StudyOutcome) -> None:
    """Draws all cells of the study as one PNG: drift against generalization, and their front.

    Raises:
        OutputError: The file cannot be written.
    """
    write_picture(path, front_figure(outcome))


def front_figure(outcome: StudyOutcome) -> Figure:
    """Returns the figure: a marker a cell, by module; its colour is the layer's depth.

    A hollow marker learned less than nine tenths of its edits. The line joins the cells that no
    other beats in both figures; they have numbers, which the list beside them explains. A star is
    the chosen cell.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw_title(
        figure,
        [
            f"What an edit costs, by place: {study_name(outcome)}",
            f"{progress_text(outcome)}; {chosen_text(outcome.chosen())}",
        ],
    )
    key = generality_key(outcome)
    axes.set(xlabel="drift ↓ (KL on unrelated text, nats a token; log scale)", ylabel=_AXES[key])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    points = _drawable(outcome, key)
    if not points:
        axes.set(xticks=[], yticks=[])
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": _GREY, "fontsize": 12}
        axes.text(0.5, 0.5, "no cell has figures", transform=axes.transAxes, **style)
        return figure
    front = pareto_front(outcome)
    _scale_axes(axes, points, key)
    _draw_cells(axes, points, key)
    named = _numbered(axes, front, key, outcome.chosen())
    _draw_front(axes, front, key, named)
    handles = _legend_of_markers(points)
    chosen = outcome.chosen()
    if chosen is not None and chosen in points:
        star: dict[str, Any] = {"color": "#D55E00", "markersize": 17, "markeredgecolor": "white"}
        axes.plot(*_point(chosen, key), "*", zorder=6, linestyle="none", label="chosen", **star)
        handles.append(axes.lines[-1])
    _write_lists(figure, front, named, key, handles)
    return figure


def generality_key(outcome: StudyOutcome) -> str:
    """Returns which figure stands for generalization: `reworded` if the data has no rephrases."""
    has = any("generalization" in one.figures for one in outcome.measured)
    return "generalization" if has else "reworded"


def pareto_front(outcome: StudyOutcome) -> list[CellOutcome]:
    """Returns the cells that no other beats in drift and generalization both, by drift.

    Of cells with the same two figures the first by layer, module and rate is there.
    """
    key = generality_key(outcome)
    front: list[CellOutcome] = []
    ordered = sorted(
        _drawable(outcome, key),
        key=lambda one: (one.figures["drift"], -one.figures[key], one.cell.rank),
    )
    for one in ordered:
        if not front or one.figures[key] > front[-1].figures[key]:
            front.append(one)
    return front


def _drawable(outcome: StudyOutcome, key: str) -> list[CellOutcome]:
    """Returns the cells that have a finite number for both axes."""
    both = ("drift", key)
    return [
        one
        for one in outcome.measured
        if all(math.isfinite(one.figures.get(name, math.nan)) for name in both)
    ]


def _point(one: CellOutcome, key: str) -> tuple[float, float]:
    return max(one.figures["drift"], LEAST_DRIFT), one.figures[key]


def _scale_axes(axes: Axes, points: Sequence[CellOutcome], key: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    logs = [math.log10(_point(one, key)[0]) for one in points]
    heights = [one.figures[key] for one in points]
    pad = max(0.04 * (max(logs) - min(logs)), 0.12)
    axes.set(xscale="log", xlim=(10 ** (min(logs) - pad), 10 ** (max(logs) + pad)))
    room = max(0.07 * (max(heights) - min(heights)), 0.02)
    axes.set_ylim(min(heights) - room, max(heights) + room)
    wide = max(logs) - min(logs) > 2.5
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_cells(axes: Axes, points: Sequence[CellOutcome], key: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    deepest = max(one.cell.location.layer for one in points)
    scale, colours = Normalize(0, max(deepest, 1)), colormaps["viridis"]
    for one in points:
        colour = colours(scale(one.cell.location.layer))
        hollow = one.figures["reliability"] < _RELIABLE
        style: dict[str, Any] = {"markeredgecolor": colour, "markeredgewidth": 1.0}
        style["markerfacecolor"] = "none" if hollow else colour
        axes.plot(*_point(one, key), _MARKERS[one.cell.location.module], markersize=6.5, **style)
    bar = axes.figure.colorbar(ScalarMappable(scale, colours), ax=axes, pad=0.01, aspect=35)
    bar.set_label("layer")
    bar.outline.set_visible(False)
    step = next(n for n in (1, 2, 5, 10, 20, deepest) if deepest / n <= 8)
    bar.set_ticks(list(range(0, deepest + 1, step)))


def _draw_front(
    axes: Axes, front: Sequence[CellOutcome], key: str, named: Sequence[tuple[int, CellOutcome]]
) -> None:
    """Draws the steps of the front, and the numbers of its cells."""
    xs, ys = zip(*(_point(one, key) for one in front), strict=True)
    right = axes.get_xlim()[1]
    axes.step([*xs, right], [*ys, ys[-1]], where="post", color=_GREY, linewidth=1.2, zorder=1)
    style: dict[str, Any] = {"textcoords": "offset points", "xytext": (-5, 5), "ha": "right"}
    for number, one in named:
        text = axes.annotate(str(number), _point(one, key), fontsize=9, zorder=7, **style)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.7})


def _numbered(
    axes: Axes, front: Sequence[CellOutcome], key: str, chosen: CellOutcome | None
) -> list[tuple[int, CellOutcome]]:
    """Returns the front's cells that get a number: not two that would stand on one another.

    The best in generalization and the chosen one are always among them.
    """
    dots = [axes.transData.transform(_point(one, key)) for one in front]
    on_paper = [dot / axes.figure.dpi for dot in dots]
    apart, kept = _APART, list(range(len(front)))
    while True:
        kept = []
        for i in reversed(range(len(front))):
            near = kept and math.dist(on_paper[i], on_paper[kept[-1]]) < apart
            if not near or front[i] is chosen:
                kept.append(i)
        if len(kept) <= _MOST_LABELS:
            break
        apart *= 1.2
    return list(enumerate((front[i] for i in reversed(kept)), start=1))


def _legend_of_markers(points: Sequence[CellOutcome]) -> list[Any]:
    from matplotlib.lines import Line2D

    there = {one.cell.location.module for one in points}
    plain: dict[str, Any] = {"color": _GREY, "linestyle": "none", "markersize": 7}
    handles = [
        Line2D([], [], marker=_MARKERS[name], label=name, **plain)
        for name in MODULES
        if name in there
    ]
    if any(one.figures["reliability"] < _RELIABLE for one in points):
        label = f"reliability below {_RELIABLE:g}"
        hollow = Line2D([], [], marker="o", markerfacecolor="none", label=label, **plain)
        handles.append(hollow)
    return handles


def _write_lists(
    figure: Figure,
    front: Sequence[CellOutcome],
    named: Sequence[tuple[int, CellOutcome]],
    key: str,
    handles: Sequence[Any],
) -> None:
    """Writes the front's cells beside the picture, and the legend below it."""
    from matplotlib.lines import Line2D

    title = "the front" if len(named) == len(front) else f"the front ({len(named)} of {len(front)})"
    rows = [
        Line2D([], [], linestyle="none", label=f"{number:>2}  {one.cell}\n     {_pair(one, key)}")
        for number, one in named
    ]
    style: dict[str, Any] = {"frameon": False, "handlelength": 0, "handletextpad": 0}
    figure.legend(
        handles=rows, loc="outside right upper", title=title, fontsize=8, alignment="left", **style
    )
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=7, frameon=False, fontsize=9.5
    )


def _pair(one: CellOutcome, key: str) -> str:
    return f"{one.figures[key]:.2f} at drift {one.figures['drift']:.2g}"
