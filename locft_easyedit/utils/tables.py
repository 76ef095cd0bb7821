"""Tables for the terminal and for Markdown, and the text of others made safe in them.

A command says its columns and rows once: `terminal_table` and `markdown_table` show them. rich,
which draws from Python's random numbers when it is imported, is imported when a table is made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# Control sequences of a terminal, as a worker's last words may hold them.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
# An underscore inside a word is no emphasis: rewrite_acc stays readable.
_MARKDOWN = re.compile(r"[\\`*\[\]<>#|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


class Bold(str):
    """The text of a cell that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        cells: Its texts, in the order of the columns; those that are missing are empty.
        style: How the terminal shows it, in words of rich such as `dim`.
        section: Whether the terminal draws a line above it.
    """

    cells: Sequence[str]
    style: str = ""
    section: bool = False


def terminal_table(
    columns: Sequence[str],
    rows: Iterable[Row],
    *,
    title: str | None = None,
    caption: str | None = None,
    text_columns: int = 1,
    header: bool = True,
    compact: bool = False,
    whole_first: bool = False,
) -> Table:
    """Returns a table for the terminal; nothing in it is taken for markup.

    The first `text_columns` hold texts, which are broken where they are too long; the others hold
    numbers, at the right and never broken. `compact` leaves out the frame, for many columns, and
    `whole_first` breaks no word of the first column, which somebody may want to copy.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(title, style="table.title"),
        caption=None if caption is None else Text(caption, style="table.caption"),
        title_justify="left",
        show_header=header,
    )
    if compact:
        table.box, table.show_edge, table.pad_edge = SIMPLE_HEAD, False, False
        table.padding = (0, 1, 0, 0)
    rows = list(rows)
    for i, heading in enumerate(columns):
        if i == 0 and whole_first:
            words = (word for row in rows if row.cells for word in row.cells[0].split())
            longest = max(map(len, words), default=0)
            table.add_column(Text(heading), overflow="fold", min_width=longest)
        elif i < text_columns:
            table.add_column(Text(heading), overflow="fold")
        else:
            table.add_column(Text(heading), justify="right", no_wrap=True)
    for row in rows:
        if row.section:
            table.add_section()
        cells = (Text(cell, "bold" if isinstance(cell, Bold) else "") for cell in row.cells)
        table.add_row(*cells, style=row.style)
    return table


def markdown_table(
    columns: Sequence[str], rows: Iterable[Row], *, text_columns: int = 1
) -> list[str]:
    """Returns the lines of a table in GitHub Markdown; nothing in it is taken for markup.

    All but the first `text_columns` are aligned right. Styles and sections of rows play no part.
    """
    lines = [[markdown_text(heading) for heading in columns]]
    lines.append([":--" if i < text_columns else "--:" for i in range(len(columns))])
    for row in rows:
        cells = [markdown_text(cell) for cell in row.cells]
        marked = zip(cells, row.cells, strict=True)
        cells = [f"**{cell}**" if cell and isinstance(of, Bold) else cell for cell, of in marked]
        lines.append(cells + [""] * (len(columns) - len(cells)))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def number_text(value: float | None, form: str = ".3f", missing: str = "-") -> str:
    """Returns a number as the text of a cell, in the format `form`; `missing` for `None`."""
    if value is None:
        return missing
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return format(value, form)


def short_number(value: float) -> str:
    """Returns a number, 0 or more, with about three digits and never in the exponential form."""
    if 0 < value < 0.001:
        return "<0.001"
    decimals = 0 if value == 0 or value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return number_text(value, f".{decimals}f")


def counted(n: int, noun: str) -> str:
    """Returns a number with its noun, as in `1 edit` and `3,000 edits`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def one_line(text: str) -> str:
    """Returns `text` without line breaks and control characters."""
    return " ".join(_CONTROL.sub(" ", _ANSI.sub("", text)).split())


def markdown_text(text: str) -> str:
    """Returns `text` in one line, with nothing in it that Markdown or a table takes for its own."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def markdown_code(text: str) -> str:
    """Returns `text` as a code span, fenced by more backticks than it holds in a row."""
    text = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
