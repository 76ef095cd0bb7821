"""A location study as a trade-off: what a cell generalizes against what it moves besides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...modeling.locations import MODULES
from ...utils.output import write_picture
from ...utils.plotting import GREY, handle, legend_below, new_figure, open_axes, plain_log_ticks
from .heat_maps import LEAST_DRIFT
from .study_outcome import CellOutcome, StudyOutcome
from .study_tables import chosen_text, progress_text, study_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MATRICES = ("<", ">", "^", "d", "v", "p", "h", "8", "o")
_SHARED = tuple((corners, 1, 0) for corners in (3, 4, 5, 6))  # stars
_EXPERT = ("X", "H", "D", (7, 1, 0))
# The whole MLP and the whole layer stand out: they are more than one matrix.
_MARKERS: dict[str, Any] = dict(
    zip(MODULES, (*_MATRICES, *_SHARED, *_EXPERT, "s", "P"), strict=True)
)
_RELIABLE = 0.9
_MOST_NUMBERS = 16
_LABELS = {
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
    title = (
        f"What an edit costs, by place: {study_name(outcome)}",
        f"{progress_text(outcome)}; {chosen_text(outcome)}",
    )
    figure = new_figure(11, 6.4, title)
    axes, key = figure.subplots(), generality_key(outcome)
    axes.set(xlabel="drift ↓ (KL on unrelated text, nats a token; log scale)", ylabel=_LABELS[key])
    axes.set_xscale("log")
    open_axes(axes)
    cells = _drawable(outcome, key)
    if not cells:
        axes.set(xticks=[], yticks=[])
        style: dict[str, Any] = {"ha": "center", "color": GREY, "fontsize": 12}
        axes.text(0.5, 0.5, "no cell has figures", transform=axes.transAxes, **style)
        return figure
    _draw_cells(axes, cells, key)
    modules = {one.cell.location.module for one in cells}
    handles = [handle(name, _MARKERS[name]) for name in MODULES if name in modules]
    if any(one.figures["reliability"] < _RELIABLE for one in cells):
        handles.append(handle(f"reliability below {_RELIABLE:g}", "o", hollow=True))
    chosen = outcome.chosen()
    if chosen in cells:
        star: dict[str, Any] = {"color": "#D55E00", "markersize": 17, "markeredgecolor": "white"}
        axes.plot(*_point(chosen, key), "*", zorder=6, **star)
        handles.append(handle("chosen", "*", **star))
    plain_log_ticks(axes.xaxis)
    front = pareto_front(outcome)
    numbered = _numbered(front, chosen)
    _draw_front(axes, front, numbered, key)
    listed = [
        handle(f"{i:>2}  {one.cell}\n     {one.figures[key]:.2f} at drift "
               f"{one.figures['drift']:.2g}", "")
        for i, one in numbered.items()
    ]  # fmt: skip
    some = "" if len(numbered) == len(front) else f" ({len(numbered)} of {len(front)})"
    style = {"loc": "outside right upper", "alignment": "left", "frameon": False, "fontsize": 8}
    figure.legend(
        handles=listed, title=f"the front{some}", handlelength=0, handletextpad=0, **style
    )
    legend_below(figure, handles)
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
    return [
        one
        for one in outcome.measured
        if all(math.isfinite(one.figures.get(name, math.nan)) for name in ("drift", key))
    ]


def _point(one: CellOutcome, key: str) -> tuple[float, float]:
    return max(one.figures["drift"], LEAST_DRIFT), one.figures[key]


def _numbered(front: Sequence[CellOutcome], chosen: CellOutcome | None) -> dict[int, CellOutcome]:
    """Returns the cells of the front that get a number: of a long one some, evenly.

    The best in generalization and the chosen one are always among them.
    """
    last, steps = len(front) - 1, min(len(front), _MOST_NUMBERS - 1) - 1
    kept = {round(i * last / steps) for i in range(steps)} | {last}
    cells = [one for i, one in enumerate(front) if i in kept or one is chosen]
    return dict(enumerate(cells, start=1))


def _draw_cells(axes: Axes, cells: Sequence[CellOutcome], key: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    deepest = max(one.cell.location.layer for one in cells)
    depth = Normalize(0, max(deepest, 1))
    colours = ScalarMappable(depth, "viridis")
    for one in cells:
        colour = colours.cmap(float(depth(one.cell.location.layer)))
        face = "none" if one.figures["reliability"] < _RELIABLE else colour
        style: dict[str, Any] = {"color": colour, "markerfacecolor": face, "markersize": 6.5}
        axes.plot(*_point(one, key), marker=_MARKERS[one.cell.location.module], **style)
    bar = axes.figure.colorbar(colours, ax=axes, pad=0.01, aspect=35, label="layer")
    bar.locator = MaxNLocator(8, integer=True)
    bar.outline.set_visible(False)


def _draw_front(
    axes: Axes, front: Sequence[CellOutcome], numbered: Mapping[int, CellOutcome], key: str
) -> None:
    """Draws the steps of the front, and the numbers of its cells."""
    xs, ys = zip(*(_point(one, key) for one in front), strict=True)
    left, right = axes.get_xlim()
    axes.step([*xs, right], [*ys, ys[-1]], where="post", color=GREY, linewidth=1.2, zorder=1)
    axes.set_xlim(left, right)
    style: dict[str, Any] = {"textcoords": "offset points", "xytext": (-5, 5), "ha": "right"}
    for number, one in numbered.items():
        text = axes.annotate(str(number), _point(one, key), fontsize=9, zorder=7, **style)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.7})
