"""The files of a location study: every cell as CSV and JSON, the chosen place as hparams."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..compare.outcome_fields import Kind, decoded, encoded, is_number, problems_of
from ..errors import DataError, PlaceError, one_message
from ..files import output_errors, write_atomically
from ..hparams import REQUIRED_IN_FILE, LocFTBFHyperParams
from ..reading import is_file, json_of, text_of
from ..tables import one_line
from .outcome import FIGURES, OK, STATES, Cell, CellOutcome, StudyOutcome
from .places import MODULES
from .table import figure_text, progress_text, study_name

PHASES = ("training", "metrics")
CSV_COLUMNS = (
    *("layer", "module", "lr", "state", "reason"),
    *FIGURES,
    *("epochs", "converged", *(f"{phase}_seconds" for phase in PHASES), "parameters"),
    "rewrite_module_tmp",
)
# A cell with figures has these; without them nothing could be chosen.
_ALWAYS = FIGURES[:4]


def write_cells_csv(path: str | Path, outcome: StudyOutcome) -> None:
    """Writes the cells that are done as CSV, one a row, by layer, module and rate.

    The columns are always `CSV_COLUMNS`; a figure that a cell does not have is empty, one that is
    no number `nan`. Several templates of a place are separated by a space.

    Raises:
        OutputError: The file cannot be written.
    """
    written = io.StringIO()
    writer = csv.DictWriter(written, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in sorted(outcome.cells, key=lambda one: one.cell.rank):
        place = one.cell.location
        writer.writerow(
            {
                "layer": place.layer,
                "module": place.module,
                "lr": one.cell.lr,
                "state": one.state,
                "reason": one_line(one.reason),
                **{key: one.figures[key] for key in FIGURES if key in one.figures},
                "epochs": one.epochs,
                "converged": str(one.converged).lower(),
                **{f"{phase}_seconds": one.seconds.get(phase, "") for phase in PHASES},
                "parameters": one.parameters,
                "rewrite_module_tmp": " ".join(place.templates),
            }
        )
    with output_errors(path):
        write_atomically(path, written.getvalue().encode("utf-8", "backslashreplace"))


def write_study(path: str | Path, outcome: StudyOutcome) -> None:
    """Writes the study as JSON; NaN and infinity become `{"not finite": "nan"}`.

    Raises:
        OutputError: The file cannot be written.
    """
    # By way of JSON: tuples become the lists that `encoded` looks into.
    values = encoded(json.loads(json.dumps(dataclasses.asdict(outcome))))
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with output_errors(path):
        write_atomically(path, text.encode("utf-8", "backslashreplace"))


def read_study(path: str | Path) -> StudyOutcome:
    """Returns the study that `write_study` wrote.

    Raises:
        DataError: The file cannot be read, or fields are missing, unknown or of another kind (all
            in one error).
    """
    if not is_file(path):
        raise DataError(f"`{path}` is not a file. Give the JSON file of a location study.")
    try:
        value = decoded(json_of(text_of(path, DataError), unique_keys=True))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}. Correct the JSON."
        ) from error
    except (ValueError, RecursionError) as error:
        raise (
            error
            if isinstance(error, DataError)
            else DataError(f"{path} does not parse: {error}. Correct the JSON.")
        ) from error
    problems = _problems(value)
    if problems:
        title = f"{path} is no location study, or is damaged. Run it again, or mend the file:"
        raise DataError(one_message(title, problems))
    cells = [CellOutcome.from_dict(cell) for cell in value["cells"]]
    planned = tuple(map(Cell.from_dict, value["planned"]))
    return StudyOutcome(**{**value, "cells": cells, "planned": planned})


def write_chosen_yaml(
    path: str | Path, outcome: StudyOutcome, hparams: LocFTBFHyperParams
) -> LocFTBFHyperParams:
    """Writes hparams with the chosen place and rate, for `--config-name PATH` and EasyEdit.

    They hold what a file must have and what differs from the defaults; `api_key`, a secret, stays
    out. Where `hparams.model_name` is a loaded model, the study's name of it takes its place.

    Args:
        path: The YAML file.
        outcome: The study.
        hparams: What its cells were trained with, but for the place and the rate.

    Returns:
        What the file holds.

    Raises:
        PlaceError: No cell has figures.
        OutputError: The file cannot be written.
    """
    chosen = outcome.chosen()
    if chosen is None:
        raise PlaceError(
            f"None of the {len(outcome.cells)} cells that are done has figures: no place can be "
            "chosen. Try smaller learning rates, or wait for more cells."
        )
    place = chosen.cell.location
    model_name = hparams.model_name if isinstance(hparams.model_name, str) else outcome.model
    changes: dict[str, Any] = {
        "model_name": model_name,
        "layers": [place.layer],
        "rewrite_module_tmp": place.rewrite_module_tmp,
        "lr": chosen.cell.lr,
        "api_key": None,
    }
    written = dataclasses.replace(hparams, **changes)
    values = {
        f.name: getattr(written, f.name)
        for f in dataclasses.fields(LocFTBFHyperParams)
        if f.name in REQUIRED_IN_FILE or getattr(written, f.name) != f.default
    }
    figures = (f"{key} {figure_text(key, chosen.figures[key])}" for key in FIGURES
               if key in chosen.figures)  # fmt: skip
    comment = [
        f"The place and the rate with the best score for {study_name(outcome)}.",
        f"Found by a location study: {progress_text(outcome)}.",
        f"Its figures: {', '.join(figures)}.",
    ]
    text = "".join(f"# {line}\n" for line in comment)  # names are in one line
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1000}
    text += yaml.safe_dump(values, default_flow_style=None, **style)  # lists in one line
    with output_errors(path):
        write_atomically(path, text.encode("utf-8"))
    return written


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_numbers(value: Any, names: tuple[str, ...] | None = None) -> bool:
    return isinstance(value, Mapping) and all(
        is_number(number) and (names is None or name in names) for name, number in value.items()
    )


def _is_cell(value: Any) -> bool:
    return not problems_of(value, _CELL_KINDS, "") and not problems_of(
        value["location"], _LOCATION_KINDS, ""
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _kind(what: str, holds: Callable[[Any], bool]) -> Kind:
    return what, holds


_TEXT = _kind("a text", lambda value: isinstance(value, str))
_COUNT = _kind("a whole number, 0 or more", _is_count)
_LIST = _kind("a list", lambda value: isinstance(value, list))
_NUMBERS = _kind("a mapping of numbers", _is_numbers)
_FIGURES = _kind(
    f"a mapping of numbers named {', '.join(FIGURES)}", lambda value: _is_numbers(value, FIGURES)
)
_LOCATION_KINDS = {
    "layer": _COUNT,
    "module": _kind(f"one of {', '.join(MODULES)}", lambda value: value in MODULES),
    "templates": _kind("a list of texts", _is_texts),
}
_CELL_KINDS = {
    "location": _kind("a mapping", lambda value: isinstance(value, Mapping)),
    "lr": _kind("a number above 0", lambda value: is_number(value) and value > 0),
}
_CELL = _kind("a place (`layer`, `module`, `templates`) and `lr`", _is_cell)
_OUTCOME_KINDS = {
    "cell": _CELL,
    "state": _kind(f"one of {', '.join(STATES)}", lambda value: value in STATES),
    "reason": _TEXT,
    "figures": _FIGURES,
    "epochs": _COUNT,
    "converged": _kind("true or false", lambda value: isinstance(value, bool)),
    "seconds": _NUMBERS,
    "parameters": _COUNT,
}
_STUDY_KINDS = {
    "model": _TEXT,
    "data": _TEXT,
    "n": _COUNT,
    "cells": _LIST,
    "n_cells": _COUNT,
    "before": _FIGURES,
    "planned": _kind(
        "a list of cells", lambda value: isinstance(value, list) and all(map(_is_cell, value))
    ),
}


def _problems(value: Any) -> list[str]:
    """Returns what keeps `value` from being a study."""
    problems = problems_of(value, _STUDY_KINDS, "the study")
    rows = value.get("cells") if isinstance(value, Mapping) else None
    for i, row in enumerate(rows if isinstance(rows, list) else []):
        found = problems_of(row, _OUTCOME_KINDS, f"cells[{i}]")
        if not found and row["state"] == OK:
            missing = [key for key in _ALWAYS if key not in row["figures"]]
            found = [f"cells[{i}] is {OK} and has no `{key}`." for key in missing]
        problems += found
    return problems
