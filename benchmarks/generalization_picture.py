"""The picture of generalization.py: edits known in other words against what else they moved."""

from locft_easyedit.utils.plotting import legend_below, look, new_figure, open_axes, plain_log_ticks
from locft_easyedit.utils.tables import one_line

LEAST_KL = 1e-6  # a logarithm needs more than nothing


def picture(cases, model):
    """The figure: a column of panels for each file, one panel for each number of edits.

    Up is better, and so is left: a point is a variant, with the spread over its seeds.

    Args:
        cases: Data, half and number of edits -> its rows, as `generalization_report.summaries`
            gives them.
        model: The model's name.
    """
    # One look for each variant, in all panels.
    names = dict.fromkeys(row["variant"] for rows in cases.values() for row in rows)
    looks = {name: look(i) for i, name in enumerate(names)}
    columns = {}
    for (data, half, n), rows in cases.items():
        columns.setdefault((data, half), []).append((n, rows))
    most = max(map(len, columns.values()))
    title = f"{one_line(model)}: edits known in other words, and what else they move"
    figure = new_figure(max(5.4 * len(columns), 7), 1.3 + 4.1 * most, [title])
    every = figure.subplots(most, len(columns), squeeze=False)
    for column, ((data, half), panels) in enumerate(columns.items()):
        for axes in every[len(panels) :, column]:
            axes.set_visible(False)
        for axes, (n, rows) in zip(every[:, column], panels, strict=False):
            axes.set_title(f"{one_line(data)} ({half}), {n:,} edits", fontsize=11, parse_math=False)
            draw_panel(axes, rows, looks)
    markers = {text: item for axes in every.flat
               for item, text in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    legend_below(figure, [markers[name] for name in names if name in markers])
    return figure


def draw_panel(axes, rows, looks):
    """Draws the variants of one case, each with the spread over its seeds."""
    axes.set(xlabel="KL of the next token on locality prompts, nats ↓ (log scale)",
             ylabel="generalization, % of rephrase prompts ↑", xscale="log")  # fmt: skip
    open_axes(axes)
    rows = [row for row in rows if {"kl", "generalization"} <= row["figures"].keys()]
    if not rows:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no variant has both figures", ha="center", transform=axes.transAxes)
        return
    bars = []
    for row in rows:
        kl, general = row["figures"]["kl"], row["figures"]["generalization"]
        x, y = max(kl["mean"], LEAST_KL), 100 * general["mean"]
        right, up = kl["sd"] or 0, 100 * (general["sd"] or 0)
        # No share is below 0 or above 100 %; a bar that would reach below no KL at all ends at a
        # tenth of the mean.
        left, down, up = min(right, 0.9 * x), min(up, y), min(up, 100 - y)
        colour, marker = looks[row["variant"]]
        style = {"fmt": marker, "color": colour, "markersize": 8, "elinewidth": 1.2}
        axes.errorbar(x, y, xerr=[[left], [right]], yerr=[[down], [up]], label=row["variant"],
                      capsize=2.5, **style)  # fmt: skip
        bars.append((x - left, y - down, x + right, y + up))
    # At least ten points: differences that mean nothing shall look like it.
    lefts, bottoms, rights, tops = zip(*bars, strict=True)
    room = max(0.12 * (max(tops) - min(bottoms)), 5 - (max(tops) - min(bottoms)) / 2, 2)
    axes.set_ylim(max(min(bottoms) - room, -4), min(max(tops) + room, 104))
    axes.set_xlim(min(lefts) / 1.5, max(rights) * 1.5)
    plain_log_ticks(axes.xaxis)
