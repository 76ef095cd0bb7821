"""A location study as heat maps: every place of the model, a panel for each figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...modeling.locations import MODULES, Location
from ...utils.output import write_picture
from ...utils.plotting import legend_below, new_figure, plain_log_ticks
from .study_outcome import DIVERGED, FAILED, OUT_OF_MEMORY, StudyOutcome
from .study_tables import chosen_text, progress_text, study_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_PANELS = {
    "reliability": "reliability ↑ (the edits' prompts)",
    "generalization": "generalization ↑ (the data's rephrase prompts)",
    "reworded": "reworded ↑ (the prompts within other sentences)",
    "locality": "locality ↑ (same answer as before)",
    "portability": "portability ↑",
    "capability": "capability ↑",
    "drift": "drift ↓ (KL on unrelated text, nats a token; log scale)",
    "score": "score ↑ (harmonic mean of reliability, reworded, exp(-drift)): it chooses",
}
_MARKED: dict[str, Any] = {"facecolor": "white", "edgecolor": "#8A1C1C", "linewidth": 0}
_PENDING = "not measured yet"
_STATES: dict[str, dict[str, Any]] = {
    DIVERGED: {"hatch": "xxxx", **_MARKED},
    OUT_OF_MEMORY: {"hatch": "////", **_MARKED},
    FAILED: {"hatch": "....", **_MARKED},
    _PENDING: {"facecolor": "#E4E4E4"},
}
_LEAST_SPAN = 0.1  # of a colour scale: differences that mean nothing shall look like it
LEAST_DRIFT = 1e-6  # a logarithm needs more than nothing
_MOST_WRITTEN = 16  # layers up to which every field has its figure written in it


def write_heat_maps(path: str | Path, outcome: StudyOutcome) -> None:
    """Draws the study as one PNG, a panel for each figure: modules by layers.

    Raises:
        OutputError: The file cannot be written.
    """
    write_picture(path, heat_figure(outcome))


def heat_figure(outcome: StudyOutcome) -> Figure:
    """Returns the figure; each place has the colour of its cell with the best score.

    A place without figures is hatched by what happened to it, light grey if it is not measured
    yet, and blank if the study does not visit it. The chosen place has a frame in every panel.
    """
    from matplotlib.patches import Patch

    best = {one.cell.location: one for one in outcome.best_rates()}
    states = {cell.location: _PENDING for cell in outcome.planned}
    states |= {one.cell.location: one.state for one in reversed(outcome.marked())}
    states = {place: state for place, state in states.items() if place not in best}
    places = [*best, *states]
    modules = [name for name in MODULES if any(p.module == name for p in places)] or [""]
    layers = sorted({place.layer for place in places}) or [0]
    chosen = outcome.chosen()
    measured = {key for one in outcome.measured for key in one.figures} or {"score"}
    if "generalization" in measured:  # what the rewordings by template stand in for
        measured.discard("reworded")
    panels = [key for key in _PANELS if key in measured]
    title = [
        f"Where to edit {study_name(outcome)}",
        f"{progress_text(outcome)}; each place at the learning rate with the best score",
        chosen_text(outcome),
    ]
    width = min(max(7.0, 2.6 + 0.27 * len(layers)), 14.0)
    figure = new_figure(width, 1.5 + len(panels) * (0.62 + 0.24 * len(modules)), title)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(rows, panels, strict=True):
        values = np.full((len(modules), len(layers)), math.nan)
        for place, one in best.items():
            values[_field(place, modules, layers)] = one.figures.get(key, math.nan)
        _draw_values(axes, key, np.maximum(values, LEAST_DRIFT) if key == "drift" else values)
        for place, state in states.items():
            _add_field(axes, _field(place, modules, layers), **_STATES[state])
        if chosen is not None:
            field = _field(chosen.cell.location, modules, layers)
            # Black around white shows on every colour.
            for colour, linewidth in (("black", 4.5), ("white", 1.8)):
                style = {"fill": False, "clip_on": False, "zorder": 5}
                _add_field(axes, field, edgecolor=colour, linewidth=linewidth, **style)
        axes.set_yticks(range(len(modules)), modules, fontsize=9)
        step = 1 if len(layers) <= 40 else 5
        axes.set_xticks(range(0, len(layers), step), layers[::step], fontsize=8)
        axes.tick_params(length=0, labelbottom=True)
    rows[-1].set_xlabel("layer")
    legend = [Patch(label=state, **style) for state, style in _STATES.items()
              if state in states.values()]  # fmt: skip
    if chosen is not None:
        legend.insert(0, Patch(facecolor="white", edgecolor="black", linewidth=2, label="chosen"))
    legend_below(figure, legend)
    return figure


def _field(place: Location, modules: list[str], layers: list[int]) -> tuple[int, int]:
    """Returns the row and the column of a place."""
    return modules.index(place.module), layers.index(place.layer)


def _add_field(axes: Axes, field: tuple[int, int], **style: Any) -> None:
    """Draws a rectangle over a field."""
    from matplotlib.patches import Rectangle

    row, column = field
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **style))


def _draw_values(axes: Axes, key: str, values: np.ndarray) -> None:
    """Draws a figure of all places, [modules, layers]; NaN where there is none."""
    from matplotlib.colors import LogNorm

    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    # Both rise evenly in lightness, and colour-blind readers tell their ends apart.
    scale: dict[str, Any] = {"cmap": "viridis"}
    if key == "drift":
        low = max(low, LEAST_DRIFT)
        scale = {"cmap": "cividis_r", "norm": LogNorm(low, max(high, 2 * low, 1e-5))}
    else:
        scale["vmin"] = max(0.0, min(low, high - _LEAST_SPAN))
        scale["vmax"] = max(high, scale["vmin"] + _LEAST_SPAN)
    image = axes.imshow(
        np.ma.masked_invalid(values), aspect="auto", interpolation="nearest", **scale
    )
    axes.set_title(_PANELS[key], fontsize=11, loc="left")
    axes.spines[:].set_visible(False)
    if finite.size:
        bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        if key == "drift":
            plain_log_ticks(bar.ax.yaxis)
    # White lines between the fields, above their colours and marks.
    axes.set_xticks(np.arange(0.5, values.shape[1] - 1), minor=True)
    axes.set_yticks(np.arange(0.5, values.shape[0] - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if values.shape[1] > _MOST_WRITTEN:
        return
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        red, green, blue, _ = image.cmap(image.norm(value))
        colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
        text = f"{value:.1g}" if key == "drift" else f"{value:.2f}"
        axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=7)
