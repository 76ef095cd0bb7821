"""What a run leaves to look at: tables on the terminal, `metrics.json`, the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.output import write_picture
from ..utils.plotting import GREY, new_figure, open_axes
from ..utils.tables import Row, number_text, terminal_table

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.health_report import HealthReport


_LABELS = {
    "rewrite_acc": "rewrite_acc (teacher-forced)",
    "rephrase_acc": "rephrase_acc (teacher-forced)",
    "rewrite_ppl": "rewrite_ppl (perplexity of the target)",
    "fluency.ngram_entropy": "fluency (n-gram entropy)",
    "generated.reliability": "reliability (generated)",
    "generated.generalization": "generalization (generated)",
    "generated.reliability_at_first_stop": 'reliability (answers cut at their first ".")',
    "generated.generalization_at_first_stop": 'generalization (answers cut at their first ".")',
    "generated.contains_target": "answer contains the target",
    "generated.old_answer": "answer contains the old answer",
    "generated.portability": "portability (generated)",
    "generated.locality": "locality (same generated answer)",
    "wrapped.reliability": "reliability in wrappers (mean)",
    "wrapped.chat_reliability": "reliability in chat (mean)",
    "wrapped.chat_contains_target": "answer in chat contains the target",
    "wrapped.chat_generalization": "generalization in chat",
    "wrapped.chat_locality": "locality in chat (same answer)",
    "wrapped.locality_kl": "locality: KL(before || after) in nats",
    "wrapped.chat_locality_kl": "locality in chat: KL in nats",
}


def metrics_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table of the means before and after the edit (see `summarize`).

    Without figures from before there is one column.
    """
    pre, post = flat(summary.get("pre", {})), flat(summary.get("post", {}))
    columns = {"before": pre, "after": post} if pre else {"value": post}
    # Locality compares with the model before the edit: it has no value of its own there.
    rows = [
        Row([metric_label(key), *(number_text(means.get(key)) for means in columns.values())])
        for key in dict.fromkeys([*pre, *post])
    ]
    return terminal_table(["metric", *columns], rows, title="Metrics: means over all edits")


def metric_label(key: str) -> str:
    """Returns what a table calls a mean of a dotted name (see `flat`)."""
    wrapper = key.removeprefix("wrapped.reliability_in.")
    if wrapper != key:
        return f"  reliability in `{wrapper}`"
    return _LABELS.get(key, key.replace(".", ": ", 1))


def health_table(report: HealthReport) -> Table:
    """Returns a table of what an edit did to the model besides; see `HealthReport`."""
    figures = (report.perplexity_before, report.perplexity_after, report.perplexity_ratio)
    rows = [Row(["perplexity of a fixed text", *(number_text(f, ".4g") for f in figures)])]
    for name, norms in report.matrices.items():
        rows.append(Row([f"{name}: norm", "", "", f"{norms['norm_ratio']:.4g}"]))
        if "spectral_ratio" in norms:
            ratio = f"{norms['spectral_ratio']:.4g}"
            rows.append(Row(["  largest singular value", "", "", ratio]))
        rows.append(Row(["  norm of the change", "", "", f"{norms['relative_change']:.4g}"]))
    return terminal_table(
        ["", "before", "after", "after / before"],
        rows,
        title="Health of the edited model" + (": it looks damaged" if report.damaged else ""),
        caption=f"No perplexity: {report.not_measured}." if report.not_measured else None,
    )


def seconds_table(seconds: Mapping[str, float], within: Mapping[str, float] | None = None) -> Table:
    """Returns a table of the seconds that each phase took, and of parts `within` these."""
    rows = [Row([phase, f"{value:.1f}"]) for phase, value in seconds.items()]
    rows.append(Row(["sum", f"{sum(seconds.values()):.1f}"]))
    for i, (phase, value) in enumerate((within or {}).items()):
        rows.append(Row([f"of which {phase}", f"{value:.1f}"], section=i == 0))
    return terminal_table(["phase", "seconds"], rows, title="Seconds")


def flat(means: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns nested means under dotted names."""
    out: dict[str, float] = {}
    for key, value in means.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = float(value)
    return out


def write_loss_curve(path: Path, losses: Sequence[float], threshold: float) -> None:
    """Draws the mean loss of each epoch as a PNG, with the threshold that ends training.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator  # slow to import, and needed only here

    figure = new_figure(6, 3.6, ["LocFT-BF training loss"])
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, marker="o", markersize=4, label="mean loss")
    if threshold > 0:
        axes.axhline(threshold, color=GREY, linestyle="--", linewidth=1, label="stops below")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="cross-entropy of target tokens")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_axes(axes)
    axes.legend()
    write_picture(path, figure)
