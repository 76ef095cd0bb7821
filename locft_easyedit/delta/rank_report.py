"""What the search for a rank leaves to look at: a table, `ranks.json` and `ranks.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..report import write_picture
from .ranks import RankSearch


def ranks_table(search: RankSearch) -> Table:
    """Returns a table of the ranks that were measured; the chosen one has a mark."""
    title = f"Generated reliability of {search.n_edits} edits, by rank"
    table = Table(title=title, title_justify="left")
    for heading in ("rank", "reliability", "left out of the change", "factors"):
        table.add_column(heading, justify="right")
    for figure in search.figures:
        mark = "> " if figure.rank == search.chosen else ""
        table.add_row(
            f"{mark}{figure.rank}",
            f"{figure.reliability:.3f}",
            f"{100 * figure.error:.1f} %",
            f"{figure.n_bytes / 2**20:.2f} MiB",
            end_section=figure is search.figures[-1],
        )
    table.add_row("whole edit", f"{search.full:.3f}", "0.0 %", "-")
    return table


def ranks_record(search: RankSearch) -> dict[str, Any]:
    """Returns the search, ready for JSON."""
    return {
        "chosen": search.chosen,
        "margin": search.margin,
        "edits": search.n_edits,
        "full_reliability": search.full,
        "ranks": [
            {
                "rank": figure.rank,
                "reliability": figure.reliability,
                "relative_error": figure.error,
                "bytes": figure.n_bytes,
            }
            for figure in search.figures
        ],
    }


def write_ranks_picture(path: Path, search: RankSearch) -> None:
    """Draws reliability over rank as a PNG, with what was needed and what was chosen.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and needed only here
    from matplotlib.ticker import ScalarFormatter

    picture = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axes = picture.subplots()
    ranks = [figure.rank for figure in search.figures]
    axes.plot(ranks, [f.reliability for f in search.figures], marker="o", markersize=4)
    axes.axhline(search.full, color="gray", linewidth=1, label=f"whole edit: {search.full:.3f}")
    needed = f"within {search.margin:g} of it"
    axes.axhline(search.needed, color="gray", linestyle="--", linewidth=1, label=needed)
    [chosen] = [figure for figure in search.figures if figure.rank == search.chosen]
    axes.plot(
        [chosen.rank],
        [chosen.reliability],
        marker="o",
        markersize=9,
        markerfacecolor="none",
        color="tab:red",
        linestyle="none",
        label=f"chosen: rank {chosen.rank}",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks(_ticks(ranks))
    axes.minorticks_off()
    axes.set(
        xlabel="rank",
        ylabel="reliability (generated)",
        title=f"How much rank {search.n_edits} edits need",
        ylim=(-0.03, 1.03),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_picture(path, picture)


def _ticks(ranks: list[int]) -> list[int]:
    """Returns the powers of two that the ranks reach."""
    ticks = [1]
    while ticks[-1] < max(ranks):
        ticks.append(2 * ticks[-1])
    return ticks
