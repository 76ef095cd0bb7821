"""What the pictures share: the figure and its title, colours, legends, plain numbers on log scales.

matplotlib, slow to import, is imported when something is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


GREY, PALE = "#666666", "#E6E6E6"
# Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is too pale for
# white paper and gives way to a grey. Markers differ as well, for print without colour.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F",
)  # fmt: skip
_MARKERS = "osD^vph<"


def new_figure(width: float, height: float, title: Sequence[str]) -> Figure:
    """Returns an empty figure of so many inches, drawn without a display.

    The lines of the title are broken where they are too long; nothing in them is a formula.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    fits = int(10.5 * (min(width, 9.3) - 0.3))  # characters of this size
    lines = [part for line in title for part in textwrap.wrap(line, fits)[:3]]
    figure.suptitle("\n".join(lines), fontsize=11.5, parse_math=False)
    return figure


def look(i: int) -> tuple[str, str]:
    """Returns the i-th colour and marker; they come again after eight."""
    return _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]


def open_axes(axes: Axes) -> None:
    """Leaves of the frame the two axes alone, with a pale grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def plain_log_ticks(axis: Axis) -> None:
    """Writes plain numbers at a log scale that has its limits: more of them if it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0,) if math.log10(high / low) > 2.5 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def handle(label: str, marker: str, *, hollow: bool = False, **style: Any) -> Line2D:
    """Returns what a legend shows beside a label: a marker, grey unless `style` says otherwise."""
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"color": GREY, "linestyle": "none", "markersize": 7}
    if hollow:
        grey["markerfacecolor"] = "none"
    return Line2D([], [], marker=marker, label=label, **grey | style)


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Writes a legend below everything."""
    style: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9.5}
    if handles:
        figure.legend(handles=list(handles), ncols=min(len(handles), 7), **style)
