"""A location study as heat maps: every place of the model, a panel for each figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report import write_picture
from .outcome import DIVERGED, FAILED, OUT_OF_MEMORY, CellOutcome, StudyOutcome
from .places import MODULES, Location
from .table import progress_text, study_name

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (
    ("reliability", "reliability ↑ (the edits' prompts)"),
    ("generalization", "generalization ↑ (the data's rephrase prompts)"),
    ("reworded", "reworded ↑ (the prompts within other sentences)"),
    ("locality", "locality ↑ (same answer as before)"),
    ("portability", "portability ↑"),
    ("capability", "capability ↑"),
    ("drift", "drift ↓ (KL on unrelated text, nats a token; log scale)"),
    ("score", "score ↑ (harmonic mean of reliability, reworded, exp(-drift)): it chooses"),
)
# Both rise evenly in lightness, and colour-blind readers tell their ends apart.
_SHARES, _DRIFTS = "viridis", "cividis_r"
_PENDING = "#E4E4E4"
_MARKS = {DIVERGED: "xxxx", OUT_OF_MEMORY: "////", FAILED: "...."}
_MARK_EDGE, _MARK_FACE = "#8A1C1C", "#FFFFFF"
_LEAST_SPAN = 0.1  # of a colour scale: differences that mean nothing shall look like it
LEAST_DRIFT = 1e-6  # a logarithm needs more than nothing
_MOST_WRITTEN = 16  # layers up to which every field has its figure written in it
_MOST_TITLE_LINES = 3  # of one that is broken


def write_heat_maps(path: str | Path, outcome: StudyOutcome) -> None:
    """Draws the study as one PNG, a panel for each figure: modules by layers.

    Raises:
        OutputError: The file cannot be written.
    """
    write_picture(path, heat_figure(outcome))


def heat_figure(outcome: StudyOutcome) -> Figure:
    """Returns the figure; each place has the colour of its cell with the best score.

    A place without figures is hatched by what happened to it, light grey if it is not measured
    yet, and blank if the model does not have it. The chosen place has a frame in every panel.
    """
    from matplotlib.figure import Figure

    panels = [(key, title) for key, title in _PANELS if _is_drawn(key, outcome)]
    panels = panels or [("score", _PANELS[-1][1])]
    grid = _Grid(outcome)
    width = min(max(7.0, 2.6 + 0.27 * len(grid.layers)), 14.0)
    height = 1.5 + len(panels) * (0.62 + 0.24 * len(grid.modules))
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    every = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for axes, (key, title) in zip(every, panels, strict=True):
        _draw_panel(axes, key, title, grid)
    every[-1].set_xlabel("layer")
    _draw_titles(figure, outcome, grid)
    return figure


def _is_drawn(key: str, outcome: StudyOutcome) -> bool:
    has = {name for one in outcome.measured for name in one.figures}
    # Rewordings by template are for the choice; they stand in where the data has no rephrases.
    return key in has and not (key == "reworded" and "generalization" in has)


class _Grid:
    """Which place is where in a panel, and what is known of it.

    Attributes:
        modules: The rows, from the top.
        layers: The columns: the layers that the study visits.
        best: Place -> its best cell.
        marked: Place without figures -> what happened to it.
        pending: Places that are not measured yet.
        chosen: The chosen cell.
    """

    def __init__(self, outcome: StudyOutcome) -> None:
        self.best = {one.cell.location: one for one in outcome.best_rates()}
        self.marked: dict[Location, str] = {}
        for one in outcome.marked():
            if one.cell.location not in self.best:
                self.marked.setdefault(one.cell.location, one.state)
        planned = {cell.location for cell in outcome.planned}
        places = planned | self.best.keys() | self.marked.keys()
        self.modules = [name for name in MODULES if any(p.module == name for p in places)] or [""]
        self.layers = sorted({place.layer for place in places}) or [0]
        unknown = not planned and len(outcome.cells) < outcome.n_cells
        if unknown:  # any layer below may still come
            self.layers = list(range(self.layers[-1] + 1))
        self.pending = [
            (layer, module)
            for layer, module in self._missing()
            if unknown or any((p.layer, p.module) == (layer, module) for p in planned)
        ]
        self.chosen = outcome.chosen()

    def position(self, place: Location) -> tuple[int, int]:
        """Returns the column and the row of a place."""
        return self.layers.index(place.layer), self.modules.index(place.module)

    def values(self, key: str) -> np.ndarray:
        """Returns a figure of all places, [modules, layers]; NaN where there is none."""
        values = np.full((len(self.modules), len(self.layers)), math.nan)
        for place, one in self.best.items():
            column, row = self.position(place)
            values[row, column] = one.figures.get(key, math.nan)
        return values

    def _missing(self) -> list[tuple[int, str]]:
        there = {(p.layer, p.module) for p in (*self.best, *self.marked)}
        every = ((layer, module) for layer in self.layers for module in self.modules)
        return [place for place in every if place not in there]


def _draw_panel(axes: Axes, key: str, title: str, grid: _Grid) -> None:
    from matplotlib.patches import Rectangle

    values = grid.values(key)
    shown = np.ma.masked_invalid(np.maximum(values, LEAST_DRIFT) if key == "drift" else values)
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", **_scale(key, shown))
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_yticks(range(len(grid.modules)), grid.modules, fontsize=9)
    columns = range(0, len(grid.layers), 1 if len(grid.layers) <= 40 else 5)
    axes.set_xticks(columns, [str(grid.layers[column]) for column in columns])
    axes.tick_params(axis="x", labelsize=9 if len(grid.layers) <= 32 else 8, labelbottom=True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if shown.count():
        bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        if key == "drift":
            _label_logs(bar, shown)
    for layer, module in grid.pending:
        corner = (grid.layers.index(layer) - 0.5, grid.modules.index(module) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=_PENDING, edgecolor="none"))
    for place, state in grid.marked.items():
        column, row = grid.position(place)
        style: dict[str, Any] = {"facecolor": _MARK_FACE, "edgecolor": _MARK_EDGE, "linewidth": 0}
        corner = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, hatch=_MARKS.get(state, "++"), **style))
    # White lines between the fields, above their colours and marks.
    axes.set_xticks(np.arange(0.5, len(grid.layers) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(grid.modules) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if len(grid.layers) <= _MOST_WRITTEN:
        _write_figures(axes, key, values, image)
    if grid.chosen is not None:
        _frame(axes, *grid.position(grid.chosen.cell.location))


def _scale(key: str, shown: np.ma.MaskedArray) -> dict[str, Any]:
    """Returns the colours of a panel, over what its places have."""
    from matplotlib.colors import LogNorm

    low, high = (float(shown.min()), float(shown.max())) if shown.count() else (0.0, 1.0)
    if key == "drift":
        return {"cmap": _DRIFTS, "norm": LogNorm(max(low, LEAST_DRIFT), max(high, 2 * low, 1e-5))}
    if high - low < _LEAST_SPAN:
        low = max(0.0, min((low + high - _LEAST_SPAN) / 2, 1 - _LEAST_SPAN))
        high = max(high, low + _LEAST_SPAN)
    return {"cmap": _SHARES, "vmin": low, "vmax": high}


def _label_logs(bar: Any, shown: np.ma.MaskedArray) -> None:
    """Writes plain numbers at the bar of a log scale: every power of ten, more within two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(float(shown.max()) / float(shown.min()))
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _write_figures(axes: Axes, key: str, values: np.ndarray, image: Any) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        red, green, blue, _ = image.cmap(image.norm(max(value, LEAST_DRIFT)))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = f"{value:.1g}" if key == "drift" else f"{value:.2f}"
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
        axes.text(column, row, text, color="white" if dark else "black", **style)


def _frame(axes: Axes, column: int, row: int) -> None:
    """Draws a frame that shows on every colour: black around white."""
    from matplotlib.patches import Rectangle

    for colour, linewidth in (("black", 4.5), ("white", 1.8)):
        style: dict[str, Any] = {"edgecolor": colour, "linewidth": linewidth, "zorder": 5}
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, clip_on=False, **style)
        )


def draw_title(figure: Figure, lines: Sequence[str]) -> None:
    """Writes lines above a figure, broken where they are too long; nothing in them is a formula."""
    # So many characters an inch at this size.
    most = int(10.5 * min(figure.get_figwidth() - 0.3, 9))
    broken = [part for line in lines for part in textwrap.wrap(line, most)[:_MOST_TITLE_LINES]]
    figure.suptitle("\n".join(broken), fontsize=11.5, parse_math=False)


def chosen_text(chosen: CellOutcome | None) -> str:
    """Returns what a picture says of the chosen cell."""
    return "no cell has figures" if chosen is None else f"chosen: {chosen.cell}"


def _draw_titles(figure: Figure, outcome: StudyOutcome, grid: _Grid) -> None:
    from matplotlib.patches import Patch

    lines = [
        f"Where to edit {study_name(outcome)}",
        f"{progress_text(outcome)}; each place at the learning rate with the best score",
        chosen_text(grid.chosen),
    ]
    draw_title(figure, lines)
    style: dict[str, Any]
    handles = []
    if grid.chosen is not None:
        handles.append(Patch(facecolor="white", edgecolor="black", linewidth=1.8, label="chosen"))
    for state, hatch in _MARKS.items():
        if state in grid.marked.values():
            style = {"facecolor": _MARK_FACE, "edgecolor": _MARK_EDGE}
            handles.append(Patch(hatch=hatch, linewidth=0, label=state, **style))
    if grid.pending:
        handles.append(Patch(facecolor=_PENDING, label="not measured yet"))
    if handles:
        style = {"loc": "outside lower center", "ncols": len(handles), "frameon": False}
        figure.legend(handles=handles, fontsize=9.5, **style)
