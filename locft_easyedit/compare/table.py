"""A comparison of editing methods as a table: on the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .columns import COLUMNS, Column, cost_text
from .escape import markdown_code, markdown_text, one_line
from .outcome import Comparison, Outcome, accuracies, checked, headline

_NOT_ASKED = "-"
_HOLE = "?"
_RIGHT_AFTER = "right after"


@dataclass(frozen=True)
class _Sheet:
    """What both tables show.

    Attributes:
        columns: Columns with a figure in any row.
        outcomes: The outcomes, checked.
        figures: For each outcome what its row shows; `None` if it shows a reason instead.
        before: The figures before any edit.
        decimals: Of an accuracy.
        best: Key -> the text of the best value.
        memory_of: What the peak memory is of -> methods; one entry, if the figures compare.
    """

    columns: list[Column]
    outcomes: list[Outcome]
    figures: list[dict[str, float | None] | None]
    before: dict[str, float | None]
    decimals: int
    best: dict[str, str]
    memory_of: dict[str, list[str]]

    @property
    def mixed_memory(self) -> bool:
        """Whether the figures are of different kinds of memory, which do not compare."""
        return len(self.memory_of) > 1

    def text(self, column: Column, value: float | None, missing: str) -> str:
        """Returns one cell."""
        if value is None:
            return missing
        if not math.isfinite(value):
            return "NaN" if math.isnan(value) else str(value)
        cost = column.key in ("seconds_per_edit", "peak_memory_gib")
        return cost_text(value) if cost else f"{value:.{self.decimals}f}"

    def texts(self, values: Mapping[str, float | None], missing: str) -> list[str]:
        """Returns the cells of a row."""
        return [self.text(column, values.get(column.key), missing) for column in self.columns]

    def is_best(self, outcome: Outcome, column: Column, text: str) -> bool:
        """Returns whether a cell is bold; figures that look the same are ties."""
        return outcome.status == "ok" and text == self.best.get(column.key)


def comparison_table(comparison: Comparison) -> Table:
    """Returns the comparison as a table for the terminal; 80 columns are enough.

    Below the figures after all edits come, for a method that edits one by one, those right after
    each edit. Names and reasons are text, never markup.
    """
    sheet = _sheet(comparison)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    # The longest status fits; a longer name takes several lines.
    table.add_column("method", overflow="fold", min_width=len("unavailable"))
    for column in sheet.columns:
        table.add_column(column.short + column.arrow, justify="right", no_wrap=True)
    table.add_row(Text("before"), *map(Text, sheet.texts(sheet.before, _NOT_ASKED)), style="dim")
    for outcome, figures in zip(sheet.outcomes, sheet.figures, strict=True):
        name = Text(one_line(outcome.method))
        if outcome.status != "ok":
            name.append(f"\n{outcome.status}", style="red")
        texts = sheet.texts(figures, _HOLE) if figures else []
        cells = [
            Text(text, style="bold" if sheet.is_best(outcome, column, text) else "")
            for column, text in zip(sheet.columns, texts, strict=False)
        ]
        table.add_row(name, *cells)
        if figures and outcome.right_after_each:
            each = sheet.texts(accuracies(outcome.right_after_each), "")
            table.add_row(Text(_RIGHT_AFTER), *map(Text, each), style="dim")
    # Not a title and a caption: these would be squeezed into the width of a narrow table.
    whole = Table.grid()
    whole.add_row(Text("\n".join(_title(comparison)), style="bold"))
    whole.add_row(table)
    whole.add_row(_caption(comparison, sheet))
    return whole


def comparison_markdown(comparison: Comparison) -> str:
    """Returns the comparison as GitHub Markdown: title, table, legend and a list of notes."""
    sheet = _sheet(comparison)
    heads = [markdown_text(f"{column.name} {column.arrow}") for column in sheet.columns]
    lines = [
        f"**{markdown_text(' · '.join(_title(comparison)))}**",
        "",
        _row(["method", *heads]),
        _row([":--", *("--:" for _ in heads)]),
        _row(["before editing", *sheet.texts(sheet.before, _NOT_ASKED)]),
    ]
    for outcome, figures in zip(sheet.outcomes, sheet.figures, strict=True):
        name = markdown_text(outcome.method)
        if figures is None:
            across = f"{outcome.status}: {markdown_text(_reason(outcome))}"
            lines.append(_row([name, across, *("" for _ in heads[1:])]))
        else:
            name += "" if outcome.status == "ok" else f" ({outcome.status})"
            lines.append(_row([name, *_markdown_cells(sheet, outcome, figures)]))
    meanings = "; ".join(f"{name}: {meaning}" for _, name, meaning in _meanings(sheet))
    lines += ["", *(markdown_text(s) + "  " for s in (f"{meanings}.", *_legend(comparison, sheet)))]
    notes = [(outcome, _notes(outcome, comparison.n)) for outcome in sheet.outcomes]
    lines += ["", *(f"- **{markdown_text(o.method)}**: {'; '.join(n)}." for o, n in notes if n)]
    with_hparams = [outcome for outcome in sheet.outcomes if outcome.hparams]
    if with_hparams:
        lines += ["", "<details><summary>Hyper-parameters</summary>", ""]
        for outcome in with_hparams:
            values = ", ".join(f"{key}={value!r}" for key, value in outcome.hparams.items())
            lines.append(f"- **{markdown_text(outcome.method)}**: {markdown_code(values)}")
        lines += ["", "</details>"]
    return "\n".join(lines).rstrip() + "\n"


def _sheet(comparison: Comparison) -> _Sheet:
    outcomes = [checked(outcome) for outcome in comparison.outcomes]
    figures = [headline(o) if _has_figures(o) else None for o in outcomes]
    before = headline(
        Outcome("", after_all=comparison.before, capability=comparison.capability_before)
    )
    rows = [before, *(row for row in figures if row)]
    columns = [column for column in COLUMNS if any(row[column.key] is not None for row in rows)]
    memory_of: dict[str, list[str]] = {}
    for outcome, row in zip(outcomes, figures, strict=True):
        if row and row["peak_memory_gib"] is not None:
            memory_of.setdefault(outcome.peak_memory_of or "run", []).append(outcome.method)
    decimals = 2 if comparison.n <= 100 else 3
    # At least one column: a reason needs a place.
    columns = columns or [COLUMNS[0]]
    sheet = _Sheet(columns, outcomes, figures, before, decimals, {}, memory_of)
    for column in columns:
        found = [
            value
            for outcome, row in zip(outcomes, figures, strict=True)
            if row and outcome.status == "ok" and (value := row[column.key]) is not None
        ]
        if found and not (column.key == "peak_memory_gib" and sheet.mixed_memory):
            best = max(found) if column.higher_is_better else min(found)
            sheet.best[column.key] = sheet.text(column, best, "")
    return sheet


def _has_figures(outcome: Outcome) -> bool:
    """Returns whether the row shows figures; a method that failed shows its reason instead."""
    if outcome.status == "not finite":
        return any(value is not None for value in accuracies(outcome.after_all).values())
    return outcome.status == "ok"


def _markdown_cells(
    sheet: _Sheet, outcome: Outcome, figures: Mapping[str, float | None]
) -> list[str]:
    cells = []
    for column, text in zip(sheet.columns, sheet.texts(figures, _HOLE), strict=True):
        cell = f"**{text}**" if sheet.is_best(outcome, column, text) else text
        right_after = figures.get(f"{column.key}_right_after_each")
        if right_after is not None:
            cell += f" ({sheet.text(column, right_after, '')} right after each edit)"
        cells.append(cell)
    return cells


def _title(comparison: Comparison) -> list[str]:
    edits = "1 edit" if comparison.n == 1 else f"{comparison.n:,} edits"
    first = f"{comparison.model} on {comparison.data} · {edits}"
    second = f"{comparison.device} ({comparison.dtype}) · EasyEdit: {comparison.easyedit}"
    return [one_line(first), one_line(second)]


def _reason(outcome: Outcome) -> str:
    return one_line(outcome.reason or "").rstrip(".") or "no reason was recorded"


def _meanings(sheet: _Sheet) -> list[tuple[str, str, str]]:
    """Returns the abbreviation, the name and the meaning of each column."""
    kinds = [
        f"of the {kind}" + (f" ({', '.join(map(one_line, methods))})" if sheet.mixed_memory else "")
        for kind, methods in sheet.memory_of.items()
    ]
    memory = f" {' or '.join(kinds)}"
    return [
        (c.short, c.name, c.meaning + (memory if c.key == "peak_memory_gib" else ""))
        for c in sheet.columns
    ]


def _legend(comparison: Comparison, sheet: _Sheet) -> list[str]:
    """Returns what else a reader of the table must know, a sentence or two a line."""
    signs = "↑ higher, ↓ lower is better; bold: the best of a column among methods that finished"
    if _NOT_ASKED in sheet.texts(sheet.before, _NOT_ASKED):
        signs += f"; {_NOT_ASKED}: not asked for, or not defined before editing"
    if any(row and _HOLE in sheet.texts(row, _HOLE) for row in sheet.figures):
        signs += f"; {_HOLE}: asked for, but this method has no figure"
    lines = [signs + "."]
    absent = [column.name for column in COLUMNS if column not in sheet.columns]
    if absent:
        lines.append(f"Measured for no method: {', '.join(absent)}.")
    capabilities = [comparison.capability_before, *(o.capability for o in sheet.outcomes)]
    tasks = next((list(c["tasks"]) for c in capabilities if c and c.get("tasks")), [])
    if tasks:
        lines.append(f"Capability tasks: {', '.join(tasks)}.")
    if comparison.versions:
        versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
        lines.append(f"Versions: {versions}.")
    return lines


def _caption(comparison: Comparison, sheet: _Sheet) -> Text:
    """Returns what stands below the terminal's table, reasons first."""
    caption = Text("\n")
    for outcome in sheet.outcomes:
        if outcome.status != "ok":
            caption.append(f"{one_line(outcome.method)} {outcome.status}", style="red")
            caption.append(f": {_reason(outcome)}.\n")
        for note in _fewer_edits(outcome, comparison.n):
            caption.append(f"{one_line(outcome.method)}: {note}.\n")
    glossary = [(short, f"{name}: {meaning}") for short, name, meaning in _meanings(sheet)]
    if any(f and o.right_after_each for f, o in zip(sheet.figures, sheet.outcomes, strict=True)):
        glossary.append((_RIGHT_AFTER, "measured right after each edit, before the later ones"))
    lines = [f"{short:<13}{meaning}" for short, meaning in glossary]
    return caption.append("\n".join([*lines, *_legend(comparison, sheet)]), style="dim")


def _fewer_edits(outcome: Outcome, n: int) -> list[str]:
    comparable = outcome.status not in ("ok", "not finite") or outcome.n_edits == n
    return [] if comparable else [f"{outcome.n_edits:,} of {n:,} edits"]


def _notes(outcome: Outcome, n: int) -> list[str]:
    """Returns the notes of one method as Markdown."""
    notes = [_reason(outcome)] if outcome.status == "not finite" else []
    notes += _fewer_edits(outcome, n)
    if outcome.corpus:
        notes.append(f"key covariances from {outcome.corpus}")
    notes += outcome.notes
    if outcome.seconds:
        phases = ", ".join(
            f"{phase} {cost_text(value)}" for phase, value in outcome.seconds.items()
        )
        notes.append(f"seconds: {phases}")
    texts = [markdown_text(note).rstrip(".") for note in notes]
    return texts + ([f"log: {markdown_code(outcome.log)}"] if outcome.log else [])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
