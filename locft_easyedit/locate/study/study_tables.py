"""A location study as tables: on the terminal and in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...modeling.locations import MODULES
from ...utils.tables import (
    Bold,
    Row,
    counted,
    markdown_table,
    markdown_text,
    number_text,
    one_line,
    terminal_table,
)
from .study_outcome import LESS_IS_BETTER, STATES, CellOutcome, StudyOutcome

_TOP = 10
_MOST_REASONS = 3  # of a state
# The figures of a table: name in it, and what it says. EasyEdit's accuracies are in the CSV.
_COLUMNS = {
    "score": ("score", "harmonic mean of reliability, reworded and exp(-drift); it chooses"),
    "reliability": ("reliab", "generated answers to the edits' prompts that are the target"),
    "reworded": ("reword", "the same of the prompts within other sentences, token by token"),
    "drift": ("drift", "KL divergence on unrelated text, nats a token"),
    "generalization": ("general", "reliability on the data's rephrase prompts"),
    "locality": ("local", "locality prompts whose generated answer is what it was"),
    "portability": ("port", "reliability on the data's portability prompts"),
    "capability": ("capab", "mean over the benchmark tasks"),
}


def study_table(outcome: StudyOutcome) -> Group:
    """Returns the study for the terminal: the best places, the best of each module, marked cells.

    A place stands with its best rate; 80 columns are enough. Names and reasons are text, never
    markup.
    """
    keys, best = _keys(outcome), best_places(outcome)
    parts: list[Text | Table] = [Text("\n".join(_title(outcome)), style="bold")]
    if best:
        heads = ["layer", "module", "lr", *(_COLUMNS[key][0] for key in keys)]
        top = [*_before(outcome, "before"), *_rows(outcome, best[:_TOP], mark="> ")]
        modules = _rows(outcome, best_of_modules(outcome), mark="> ")
        title = f"\nThe best layer of each module ({len(best)} places)"
        parts += [
            terminal_table(heads, top, text_columns=2, compact=True),
            Text(title, style="bold"),
            terminal_table(heads, modules, text_columns=2, compact=True),
        ]
    marked = "".join(f"\n{line}" for line in _marked_lines(outcome))
    meanings = "".join(f"\n{_COLUMNS[key][0]:<9}{_COLUMNS[key][1]}" for key in keys)
    return Group(*parts, Text(marked, style="red"), Text(meanings, style="dim"))


def study_markdown(outcome: StudyOutcome) -> str:
    """Returns the study as GitHub Markdown: the best layer of each module, the best places.

    Cells without figures follow as a list, and what the columns say.
    """
    lines = [f"**{markdown_text(' · '.join(_title(outcome)))}**", ""]
    keys, best = _keys(outcome), best_places(outcome)
    if best:
        arrows = (f"{key} {'↓' if key in LESS_IS_BETTER else '↑'}" for key in keys)
        heads, top = ["layer", "module", "lr", *arrows], best[:_TOP]
        modules = _rows(outcome, best_of_modules(outcome))
        places = [*_before(outcome, "before editing"), *_rows(outcome, top)]
        lines += ["The best layer of each module:", ""]
        lines += [*markdown_table(heads, modules, text_columns=2), ""]
        lines += [f"The best {len(top)} of {len(best)} places, each at its best rate:", ""]
        lines += [*markdown_table(heads, places, text_columns=2), ""]
        meanings = "; ".join(f"{key}: {_COLUMNS[key][1]}" for key in keys)
        lines += [markdown_text(f"{meanings}."), ""]
    lines += [f"- {markdown_text(line)}" for line in _marked_lines(outcome)]
    return "\n".join(lines).rstrip() + "\n"


def best_places(outcome: StudyOutcome) -> list[CellOutcome]:
    """Returns each place's best cell, the best place first; of equals the one with less drift."""
    return sorted(outcome.best_rates(), key=lambda one: one.merit, reverse=True)


def best_of_modules(outcome: StudyOutcome) -> list[CellOutcome]:
    """Returns the best place of each module that has one, in the order of `MODULES`."""
    best = best_places(outcome)
    firsts = (next((b for b in best if b.cell.location.module == name), None) for name in MODULES)
    return [one for one in firsts if one is not None]


def figure_text(key: str, value: float | None) -> str:
    """Returns a figure as text: a share with three decimals, a drift with three digits."""
    return number_text(value, ".3g" if key in LESS_IS_BETTER else ".3f")


def study_name(outcome: StudyOutcome) -> str:
    """Returns what was studied, in one line: model, data, edits."""
    model, data = (shortened(name) for name in (outcome.model, outcome.data))
    return f"{model} on {data}, {counted(outcome.n, 'edit')} a cell"


def shortened(text: str, length: int = 60) -> str:
    """Returns a name in one line, and no longer than that: of a path the end says more."""
    text = one_line(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"


def progress_text(outcome: StudyOutcome) -> str:
    """Returns how much of the study is done, in one line."""
    done = len(outcome.cells)
    text = (
        f"{done:,} cells" if done == outcome.n_cells else f"{done:,} of {outcome.n_cells:,} cells"
    )
    states = Counter(one.state for one in outcome.marked())
    return ", ".join([text, *(f"{states[state]} {state}" for state in STATES if states[state])])


def chosen_text(outcome: StudyOutcome) -> str:
    """Returns which cell is chosen, in one line."""
    chosen = outcome.chosen()
    return "no cell has figures" if chosen is None else f"chosen: {chosen.cell}"


def _title(outcome: StudyOutcome) -> list[str]:
    return [f"Where to edit {study_name(outcome)}", progress_text(outcome), chosen_text(outcome)]


def _keys(outcome: StudyOutcome) -> list[str]:
    """Returns the figures that any cell has."""
    return [key for key in _COLUMNS if any(key in one.figures for one in outcome.measured)]


def _cells(outcome: StudyOutcome, figures: Mapping[str, float]) -> list[str]:
    return [figure_text(key, figures.get(key)) for key in _keys(outcome)]


def _before(outcome: StudyOutcome, name: str) -> list[Row]:
    """Returns the row of the model before any edit, if it was measured."""
    if not outcome.before:
        return []
    return [Row(["", name, "", *_cells(outcome, outcome.before)], "dim")]


def _rows(outcome: StudyOutcome, cells: Sequence[CellOutcome], mark: str = "") -> list[Row]:
    """Returns a row a cell; the chosen one is bold and has a mark, which needs no colour."""
    chosen, rows = outcome.chosen(), []
    for one in cells:
        place = one.cell.location
        texts = [str(place.layer), place.module, f"{one.cell.lr:g}", *_cells(outcome, one.figures)]
        if one is chosen:
            texts = [Bold(text) for text in (mark + texts[0], *texts[1:])]
        rows.append(Row(texts))
    return rows


def _marked_lines(outcome: StudyOutcome) -> list[str]:
    """Returns a line for each state and reason: how many cells have it, and which is the first."""
    found: dict[tuple[str, str], list[CellOutcome]] = {}
    for one in outcome.marked():
        found.setdefault((one.state, one_line(one.reason).rstrip(".")), []).append(one)
    lines = []
    for state in STATES:
        groups = [(reason, cells) for (of, reason), cells in found.items() if of == state]
        groups.sort(key=lambda group: -len(group[1]))
        for reason, cells in groups[:_MOST_REASONS]:
            where = str(cells[0].cell) + (f" and {len(cells) - 1} more" if cells[1:] else "")
            lines.append(f"{state}: {where}" + (f": {reason}." if reason else "."))
        rest = groups[_MOST_REASONS:]
        if rest:
            n_cells = sum(len(cells) for _, cells in rest)
            lines.append(f"{state}: {n_cells} more, for {len(rest)} other reasons.")
    return lines
