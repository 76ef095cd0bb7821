"""What of edits that come in commits is still known: a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.output import write_picture
from ..utils.plotting import legend_below, look, new_figure, open_axes
from ..utils.tables import counted, one_line
from .commits import commits_of
from .outcome import Comparison, checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_stream_picture(path: str | Path, comparison: Comparison) -> None:
    """Draws `stream_figure` as a PNG.

    Raises:
        OutputError: The file cannot be written.
    """
    write_picture(path, stream_figure(comparison))


def stream_figure(comparison: Comparison) -> Figure:
    """Returns the figure of a comparison whose edits came in commits, a line a method.

    On the left the reliability of all edits so far after each commit; on the right that of each
    commit's edits after the last one. Methods without figures have no line.
    """
    title = (
        f"{one_line(comparison.model)} on {one_line(comparison.data)}, "
        f"{counted(comparison.n, 'edit')} in commits"
    )
    figure = new_figure(11, 4.6, [title])
    left, right = figure.subplots(1, 2, sharey=True)
    for i, outcome in enumerate(map(checked, comparison.outcomes)):
        if outcome.status != "ok" or not outcome.by_commit:
            continue
        rows = outcome.by_commit
        sizes = [len(commit) for commit in commits_of(comparison.n, len(rows))]
        so_far = [
            sum(value * size for value, size in zip(row, sizes, strict=False))
            / sum(sizes[: len(row)])
            for row in rows
        ]
        colour, marker = look(i)
        steps = range(1, len(rows) + 1)
        for axes, values in ((left, so_far), (right, rows[-1])):
            axes.plot(
                steps, values, color=colour, marker=marker, markersize=5,
                label=one_line(outcome.method),
            )  # fmt: skip
    for axes, heading, label in (
        (left, "all edits so far", "commits so far"),
        (right, "after the last commit", "commit in which an edit came"),
    ):
        open_axes(axes)
        axes.set_title(heading, fontsize=11)
        axes.set(xlabel=label, ylim=(-0.03, 1.05))
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("reliability ↑")
    handles, _ = left.get_legend_handles_labels()
    legend_below(figure, handles)
    for text in (text for legend in figure.legends for text in legend.get_texts()):
        text.set_parse_math(False)
    return figure
