"""A comparison of editing methods as a table: on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from ..utils.tables import (
    Bold,
    Row,
    counted,
    markdown_code,
    markdown_table,
    markdown_text,
    number_text,
    one_line,
    short_number,
    terminal_table,
)
from .outcome import Comparison, Outcome, accuracies, checked, headline

_NOT_ASKED = "-"
_NO_FIGURE = "?"
_RIGHT_AFTER = "right after"
_MOST_ABREAST = 9  # figures that a terminal of 80 columns holds beside one another
_OF_COMMITS = ("newest_commit", "oldest_commit")
_COSTS = ("seconds_per_edit", "peak_memory_gib")


@dataclass(frozen=True)
class Column:
    """A figure of `headline`: its name and abbreviation as headings, and its meaning."""

    key: str
    name: str
    short: str
    meaning: str

    @property
    def arrow(self) -> str:
        """Where better is."""
        return "↓" if self.key in _COSTS else "↑"


COLUMNS = (
    Column("reliability", "reliability", "rel.", "edited prompts that get the new answer"),
    Column("contains_target", "contains", "has", "edited prompts whose answer contains it"),
    Column("generalization", "generalization", "gen.", "reworded prompts that get it"),
    Column("wrapped_reliability", "in wrappers", "wrap.", "reliability in other texts and in chat"),
    Column("chat_reliability", "in chat", "chat", "reliability in the chat template"),
    Column("portability", "portability", "port.", "questions that follow from an edit"),
    Column("locality", "locality", "loc.", "unchanged tokens on other prompts (teacher-forced)"),
    Column("rewrite_acc", "rewrite_acc", "rewr.", "right tokens of the target (teacher-forced)"),
    Column("rephrase_acc", "rephrase_acc", "reph.", "the same for reworded prompts"),
    Column("newest_commit", "right after its commit", "new", "each commit's edits right after it"),
    Column("oldest_commit", "first commit", "old", "the first commit's edits after the last one"),
    Column("capability", "capability", "cap.", "mean over the capability tasks"),
    Column("seconds_per_edit", "s per edit", "s/edit", "seconds of editing, divided by the edits"),
    Column("peak_memory_gib", "peak GiB", "GiB", "peak memory"),
)


class _Sheet:
    """What both tables show.

    Attributes:
        comparison: The comparison.
        outcomes: Its outcomes, checked.
        figures: For each outcome what its row shows; `None` if it shows a reason instead.
        before: The figures before any edit.
        columns: Columns with a figure in any row.
        memory_of: What the peak memory is of -> methods; one entry, if the figures compare.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.outcomes = [checked(outcome) for outcome in comparison.outcomes]
        self.figures = [headline(one) if _has_figures(one) else None for one in self.outcomes]
        self.before = headline(comparison.before_editing)
        rows = [self.before, *(row for row in self.figures if row)]
        columns = [c for c in COLUMNS if any(row[c.key] is not None for row in rows)]
        self.columns = columns or [COLUMNS[0]]  # a reason needs a place
        self.memory_of: dict[str, list[str]] = {}
        for outcome, row in zip(self.outcomes, self.figures, strict=True):
            if row and row["peak_memory_gib"] is not None:
                methods = self.memory_of.setdefault(outcome.peak_memory_of or "run", [])
                methods.append(one_line(outcome.method))
        self._best = {column.key: self._best_text(column) for column in self.columns}

    def texts(self, values: Mapping[str, float | None], missing: str) -> list[str]:
        """Returns the cells of a row."""
        return [self._text(column, values.get(column.key), missing) for column in self.columns]

    def cells(self, outcome: Outcome, figures: Mapping[str, float | None]) -> list[str]:
        """Returns the cells of a method; the best are bold, figures that look the same are ties."""
        return [
            Bold(text) if outcome.status == "ok" and text == self._best[column.key] else text
            for column, text in zip(self.columns, self.texts(figures, _NO_FIGURE), strict=True)
        ]

    def _text(self, column: Column, value: float | None, missing: str) -> str:
        if value is not None and column.key in _COSTS:
            return short_number(value)
        return number_text(value, ".2f" if self.comparison.n <= 100 else ".3f", missing)

    def _best_text(self, column: Column) -> str:
        """Returns the text of the best value among methods that finished; empty if none is."""
        found = [
            value
            for outcome, row in zip(self.outcomes, self.figures, strict=True)
            if row and outcome.status == "ok" and (value := row[column.key]) is not None
        ]
        # Different kinds of memory do not compare.
        if not found or (column.key == "peak_memory_gib" and len(self.memory_of) > 1):
            return ""
        return self._text(column, min(found) if column.key in _COSTS else max(found), "")


def comparison_table(comparison: Comparison) -> Group:
    """Returns the comparison for the terminal; 80 columns are enough.

    More figures than a line holds go into a second table below the first.
    Below the figures after all edits come, for a method that edits one by one, those right after
    each edit. Names and reasons are text, never markup.
    """
    sheet = _Sheet(comparison)
    rows = [Row(["before", *sheet.texts(sheet.before, _NOT_ASKED)], "dim")]
    for outcome, figures in zip(sheet.outcomes, sheet.figures, strict=True):
        name = one_line(outcome.method)
        if outcome.status != "ok":
            name += f"\n{outcome.status}"
        if figures is None:
            rows.append(Row([name], "red"))
            continue
        rows.append(Row([name, *sheet.cells(outcome, figures)]))
        if outcome.right_after_each:
            each = sheet.texts(accuracies(outcome.right_after_each), "")
            rows.append(Row([_RIGHT_AFTER, *each], "dim"))
    heads = ["method", *(column.short + column.arrow for column in sheet.columns)]
    n_figures = len(sheet.columns)
    size = n_figures if n_figures <= _MOST_ABREAST else (n_figures + 1) // 2
    tables = []
    for first in range(1, n_figures + 1, size):
        part = slice(first, first + size)
        some = [Row([*row.cells[:1], *row.cells[part]], row.style) for row in rows]
        heads_here = [heads[0], *heads[part]]
        tables.append(terminal_table(heads_here, some, compact=True, whole_first=True))
    return Group(Text("\n".join(_title(comparison)), style="bold"), *tables, _caption(sheet))


def comparison_markdown(comparison: Comparison) -> str:
    """Returns the comparison as GitHub Markdown: title, table, legend and a list of notes."""
    sheet = _Sheet(comparison)
    rows = [Row(["before editing", *sheet.texts(sheet.before, _NOT_ASKED)])]
    for outcome, figures in zip(sheet.outcomes, sheet.figures, strict=True):
        if figures is None:
            rows.append(Row([outcome.method, f"{outcome.status}: {_reason(outcome)}"]))
            continue
        name = outcome.method + ("" if outcome.status == "ok" else f" ({outcome.status})")
        each = sheet.texts(accuracies(outcome.right_after_each), "")
        cells = [
            type(cell)(f"{cell} ({right_after} right after each edit)")
            if right_after and column.key in ("reliability", "rewrite_acc")
            else cell
            for column, cell, right_after in zip(
                sheet.columns, sheet.cells(outcome, figures), each, strict=True
            )
        ]
        rows.append(Row([name, *cells]))
    heads = ["method", *(f"{column.name} {column.arrow}" for column in sheet.columns)]
    meanings = "; ".join(f"{name}: {meaning}" for _, name, meaning in _meanings(sheet))
    lines = [f"**{markdown_text(' · '.join(_title(comparison)))}**", ""]
    lines += [*markdown_table(heads, rows), ""]
    lines += [markdown_text(line) + "  " for line in (f"{meanings}.", *_legend(sheet))]
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


def _has_figures(outcome: Outcome) -> bool:
    """Returns whether the row shows figures; a method that failed shows its reason instead."""
    if outcome.status == "not finite":
        return any(value is not None for value in accuracies(outcome.after_all).values())
    return outcome.status == "ok"


def _title(comparison: Comparison) -> list[str]:
    first = f"{comparison.model} on {comparison.data} · {counted(comparison.n, 'edit')}"
    second = f"{comparison.device} ({comparison.dtype}) · EasyEdit: {comparison.easyedit}"
    return [one_line(first), one_line(second)]


def _reason(outcome: Outcome) -> str:
    return one_line(outcome.reason or "").rstrip(".") or "no reason was recorded"


def _meanings(sheet: _Sheet) -> list[tuple[str, str, str]]:
    """Returns the abbreviation, the name and the meaning of each column."""
    several = len(sheet.memory_of) > 1
    kinds = [
        f"of the {kind}" + (f" ({', '.join(methods)})" if several else "")
        for kind, methods in sheet.memory_of.items()
    ]
    memory = f" {' or '.join(kinds)}"
    return [
        (c.short, c.name, c.meaning + (memory if c.key == "peak_memory_gib" else ""))
        for c in sheet.columns
    ]


def _legend(sheet: _Sheet) -> list[str]:
    """Returns what else a reader of the table must know, a sentence or two a line."""
    comparison = sheet.comparison
    signs = "↑ higher, ↓ lower is better; bold: the best of a column among methods that finished"
    if _NOT_ASKED in sheet.texts(sheet.before, _NOT_ASKED):
        signs += f"; {_NOT_ASKED}: not asked for, or not defined before editing"
    if any(row and _NO_FIGURE in sheet.texts(row, _NO_FIGURE) for row in sheet.figures):
        signs += f"; {_NO_FIGURE}: asked for, but this method has no figure"
    lines = [signs + "."]
    absent = [c.name for c in COLUMNS if c not in sheet.columns and c.key not in _OF_COMMITS]
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


def _caption(sheet: _Sheet) -> Text:
    """Returns what stands below the terminal's table, reasons first."""
    caption = Text("\n")
    for outcome in sheet.outcomes:
        if outcome.status != "ok":
            caption.append(f"{one_line(outcome.method)} {outcome.status}", style="red")
            caption.append(f": {_reason(outcome)}.\n")
        for note in _fewer_edits(outcome, sheet.comparison.n):
            caption.append(f"{one_line(outcome.method)}: {note}.\n")
    glossary = [(short, f"{name}: {meaning}") for short, name, meaning in _meanings(sheet)]
    if any(f and o.right_after_each for f, o in zip(sheet.figures, sheet.outcomes, strict=True)):
        glossary.append((_RIGHT_AFTER, "measured right after each edit, before the later ones"))
    lines = [f"{short:<13}{meaning}" for short, meaning in glossary]
    return caption.append("\n".join([*lines, *_legend(sheet)]), style="dim")


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
        phases = ", ".join(f"{phase} {short_number(s)}" for phase, s in outcome.seconds.items())
        notes.append(f"seconds: {phases}")
    texts = [markdown_text(note).rstrip(".") for note in notes]
    return texts + ([f"log: {markdown_code(outcome.log)}"] if outcome.log else [])
