"""The files of a location study: every cell as CSV and JSON, the chosen place as hparams."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import yaml

from ...errors import PlaceError
from ...hparams import REQUIRED_IN_FILE, LocFTBFHyperParams
from ...utils.files import output_errors, write_atomically
from ...utils.tables import one_line
from .study_outcome import FIGURES, StudyOutcome
from .study_tables import figure_text, progress_text, study_name

PHASES = ("training", "metrics")
CSV_COLUMNS = (
    *("layer", "module", "lr", "state", "reason"),
    *FIGURES,
    *("epochs", "converged", *(f"{phase}_seconds" for phase in PHASES), "parameters"),
    "rewrite_module_tmp",
)


def write_cells_csv(path: str | Path, outcome: StudyOutcome) -> None:
    """Writes the cells that are done as CSV, one a row, by layer, module and rate.

    The columns are always `CSV_COLUMNS`; a figure that a cell does not have is empty, one that is
    NaN `nan`. Several templates of a place are separated by a space.

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
    model_name = hparams.model_name if isinstance(hparams.model_name, str) else outcome.model
    found = chosen.cell.applied(hparams)
    written = dataclasses.replace(found, model_name=model_name, api_key=None)
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
