"""A location study as tables: on the terminal and in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..tables import markdown_text, one_line
from .outcome import LESS_IS_BETTER, STATES, CellOutcome, StudyOutcome
from .places import MODULES

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


def study_table(outcome: StudyOutcome) -> Table:
    """Returns the study for the terminal: the best places, the best of each module, marked cells.

    A place stands with its best rate; 80 columns are enough. Names and reasons are text, never
    markup.
    """
    whole = Table.grid()
    whole.add_row(Text("\n".join(_title(outcome)), style="bold"))
    best = best_places(outcome)
    if best:
        whole.add_row(_places_table(outcome, best[:_TOP], before=True))
        whole.add_row(Text(f"\nThe best layer of each module ({len(best)} places)", style="bold"))
        whole.add_row(_places_table(outcome, best_of_modules(outcome)))
    caption = Text("\n")
    for line in _marked_lines(outcome):
        caption.append(f"{line}\n", style="red")
    meanings = (f"{_COLUMNS[key][0]:<9}{_COLUMNS[key][1]}" for key in _keys(outcome))
    whole.add_row(caption.append("\n".join(meanings), style="dim"))
    return whole


def study_markdown(outcome: StudyOutcome) -> str:
    """Returns the study as GitHub Markdown: the best layer of each module, the best places.

    Cells without figures follow as a list, and what the columns say.
    """
    lines = [f"**{markdown_text(' · '.join(_title(outcome)))}**", ""]
    best = best_places(outcome)
    if best:
        lines += ["The best layer of each module:", ""]
        lines += [*_markdown_rows(outcome, best_of_modules(outcome), module_first=True), ""]
        top = best[:_TOP]
        lines += [f"The best {len(top)} of {len(best)} places, each at its best rate:", ""]
        lines += [*_markdown_rows(outcome, top), ""]
        meanings = "; ".join(f"{key}: {_COLUMNS[key][1]}" for key in _keys(outcome))
        lines += [markdown_text(f"{meanings}."), ""]
    lines += [f"- {markdown_text(line)}" for line in _marked_lines(outcome)]
    return "\n".join(lines).rstrip() + "\n"


def best_places(outcome: StudyOutcome) -> list[CellOutcome]:
    """Returns each place's best cell, the best place first; of equals the one with less drift."""
    return sorted(
        outcome.best_rates(),
        key=lambda one: (-one.figures["score"], one.figures["drift"], one.cell.rank),
    )


def best_of_modules(outcome: StudyOutcome) -> list[CellOutcome]:
    """Returns the best place of each module that has one, in the order of `MODULES`."""
    best = best_places(outcome)
    firsts = (next((b for b in best if b.cell.location.module == name), None) for name in MODULES)
    return [one for one in firsts if one is not None]


def figure_text(key: str, value: float | None) -> str:
    """Returns a figure as text: a share with three decimals, a drift with three digits."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return f"{value:.3g}" if key in LESS_IS_BETTER else f"{value:.3f}"


def study_name(outcome: StudyOutcome) -> str:
    """Returns what was studied, in one line: model, data, edits."""
    edits = "1 edit" if outcome.n == 1 else f"{outcome.n:,} edits"
    model, data = (shortened(name) for name in (outcome.model, outcome.data))
    return f"{model} on {data}, {edits} a cell"


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


def _title(outcome: StudyOutcome) -> list[str]:
    chosen = outcome.chosen()
    choice = "no cell has figures" if chosen is None else f"chosen: {chosen.cell}"
    return [f"Where to edit {study_name(outcome)}", progress_text(outcome), choice]


def _keys(outcome: StudyOutcome) -> list[str]:
    """Returns the figures that any cell has."""
    return [key for key in _COLUMNS if any(key in one.figures for one in outcome.measured)]


def _cells(keys: Sequence[str], figures: Mapping[str, float]) -> list[str]:
    return [figure_text(key, figures.get(key)) for key in keys]


def _places_table(
    outcome: StudyOutcome, rows: Sequence[CellOutcome], *, before: bool = False
) -> Table:
    keys, chosen = _keys(outcome), outcome.chosen()
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("module", no_wrap=True)
    table.add_column("lr", justify="right", no_wrap=True)
    for key in keys:
        table.add_column(_COLUMNS[key][0], justify="right", no_wrap=True)
    if before and outcome.before:
        table.add_row("", "before", "", *_cells(keys, outcome.before), style="dim")
    for one in rows:
        place = one.cell.location
        # The mark stays where there is no colour.
        mark = "> " if one is chosen else ""
        cells = (f"{mark}{place.layer}", place.module, f"{one.cell.lr:g}")
        style = "bold" if one is chosen else ""
        table.add_row(*cells, *_cells(keys, one.figures), style=style)
    return table


def _markdown_rows(
    outcome: StudyOutcome, rows: Sequence[CellOutcome], *, module_first: bool = False
) -> list[str]:
    keys, chosen = _keys(outcome), outcome.chosen()
    places = ["module", "layer"] if module_first else ["layer", "module"]
    signs = [f"{key} {'↓' if key in LESS_IS_BETTER else '↑'}" for key in keys]
    lines = [
        _row([*places, "lr", *signs]),
        _row([":--" if name == "module" else "--:" for name in places] + ["--:"] * (len(keys) + 1)),
    ]
    if outcome.before and not module_first:
        lines.append(_row(["", "before editing", "", *_cells(keys, outcome.before)]))
    for one in rows:
        location = one.cell.location
        named = {"module": location.module.replace("_", "\\_"), "layer": str(location.layer)}
        cells = [*(named[name] for name in places), f"{one.cell.lr:g}", *_cells(keys, one.figures)]
        lines.append(_row([f"**{cell}**" for cell in cells] if one is chosen else cells))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


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
