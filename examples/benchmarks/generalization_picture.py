"""The picture of generalization.py: edits known in other words against what else they moved."""

import math

from locft_easyedit.compare.picture import Point, look, place_labels
from locft_easyedit.tables import one_line

LEAST_KL = 1e-6  # a logarithm needs more than nothing


def picture(cases, model):
    """The figure: a column of panels for each file, one panel for each number of edits.

    Up is better, and so is left: a point is a variant, with the spread over its seeds.

    Args:
        cases: Data, half and number of edits -> its rows, as `generalization_report.summaries`
            gives them.
        model: The model's name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # One look for each variant, in all panels.
    names = dict.fromkeys(row["variant"] for rows in cases.values() for row in rows)
    looks = {name: look(i) for i, name in enumerate(names)}
    columns = {}
    for (data, half, n), rows in cases.items():
        columns.setdefault((data, half), []).append((n, rows))
    most = max(map(len, columns.values()))
    size = (max(5.4 * len(columns), 7), 0.9 + 4.1 * most)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    every = figure.subplots(most, len(columns), squeeze=False)
    labels = []
    for column, ((data, half), panels) in enumerate(columns.items()):
        for axes in every[len(panels) :, column]:
            axes.set_visible(False)
        for axes, (n, rows) in zip(every[:, column], panels, strict=False):
            axes.set_title(f"{one_line(data)} ({half}), {n:,} edits", fontsize=11, parse_math=False)
            labels.append((axes, *draw_panel(axes, rows, looks)))
    title = f"{one_line(model)}: edits known in other words, and what else they move"
    figure.suptitle(title, fontsize=12, parse_math=False)
    # Where a label fits is known once everything else has its place.
    canvas.draw()
    figure.set_layout_engine("none")
    renderer = canvas.get_renderer()
    for axes, points, bars in labels:
        place_labels(axes, points, renderer, [in_pixels(axes, bar) for bar in bars])
    return figure


def draw_panel(axes, rows, looks):
    """Draws the variants of one case.

    Returns:
        The points to label, and each error bar as left, bottom, right and top.
    """
    axes.set(xlabel="KL of the next token on locality prompts, nats ↓ (log scale)",
             ylabel="generalization, % of rephrase prompts ↑")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    rows = [row for row in rows if {"kl", "generalization"} <= row["figures"].keys()]
    if not rows:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no variant has both figures", ha="center", transform=axes.transAxes)
        return [], []
    points, bars = [], []
    for row in rows:
        kl, general = row["figures"]["kl"], row["figures"]["generalization"]
        x, y = max(kl["mean"], LEAST_KL), 100 * general["mean"]
        right, up = kl["sd"] or 0, 100 * (general["sd"] or 0)
        # No share is below 0 or above 100 %; a bar that would reach below no KL at all ends at a
        # tenth of the mean.
        left, down, up = min(right, 0.9 * x), min(up, y), min(up, 100 - y)
        colour, marker = looks[row["variant"]]
        axes.errorbar(x, y, xerr=[[left], [right]], yerr=[[down], [up]], fmt=marker, color=colour,
                      markersize=8, elinewidth=1.2, capsize=2.5, zorder=4)  # fmt: skip
        points.append(Point(x, y, row["variant"]))
        bars += [(x - left, y, x + right, y), (x, y - down, x, y + up)]
    scale_(axes, bars)
    return points, bars


def scale_(axes, bars):
    """Makes the x axis logarithmic, with plain numbers, and leaves room for labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lefts, bottoms, rights, tops = zip(*bars, strict=True)
    low, high = math.log10(min(lefts)), math.log10(max(rights))
    pad = max(0.2 * (high - low), 0.25)
    axes.set(xscale="log", xlim=(10 ** (low - pad), 10 ** (high + pad)))
    wide = high - low + 2 * pad
    subs = (1.0,) if wide > 3 else (1.0, 3.0) if wide > 1.5 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    # At least ten points: differences that mean nothing shall look like it.
    bottom, top = min(bottoms), max(tops)
    room = max(0.12 * (top - bottom), 5 - (top - bottom) / 2, 2)
    axes.set_ylim(max(bottom - room, -4), min(top + room, 104))


def in_pixels(axes, bar):
    """The box of an error bar on the paper, a little wider than its line."""
    from matplotlib.transforms import Bbox

    left, bottom, right, top = bar
    corners = axes.transData.transform([(left, bottom), (right, top)])
    return Bbox(corners).padded(2)
