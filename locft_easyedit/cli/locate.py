"""`locft locate`: the location study, and an hparams YAML with the place that it finds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from ..hparams import LocFTBFHyperParams
from ..locate.study.heat_maps import write_heat_maps
from ..locate.study.pareto import write_front
from ..locate.study.run_study import locate
from ..locate.study.study import Study
from ..locate.study.study_files import write_cells_csv, write_chosen_yaml
from ..locate.study.study_outcome import StudyOutcome
from ..locate.study.study_settings import StudySettings
from ..locate.study.study_tables import study_markdown, study_table
from ..utils.files import output_errors, write_atomically
from ..utils.json_fields import write_dataclass
from ..utils.output import show
from .application import run_application


@dataclass(kw_only=True)
class LocateConfig(LocFTBFHyperParams):
    """The hyper-parameters, and what the command needs besides."""

    data: str = MISSING
    n: Optional[int] = None  # noqa: UP045
    output: str = "outputs/locate"
    sweep_layers: Optional[list[int]] = None  # noqa: UP045
    every: int = 1
    sweep_modules: Optional[list[str]] = None  # noqa: UP045
    sweep_lrs: Optional[list[float]] = None  # noqa: UP045
    text: Optional[str] = None  # noqa: UP045
    capability: list[str] = field(default_factory=list)
    capability_limit: Optional[int] = None  # noqa: UP045
    tasks_dir: Optional[str] = None  # noqa: UP045
    devices: Optional[list[Any]] = None  # noqa: UP045
    retry: bool = False
    worker: int = 0  # tells the jobs of a multirun apart, and nothing else


# Keys of the command that `StudySettings` has under another name.
_RENAMED = {"sweep_layers": "layers", "sweep_modules": "modules", "sweep_lrs": "rates"}


def main(arguments: Sequence[str]) -> int:
    """Runs `locft locate`; returns the exit status."""
    return run_application(arguments, command="locate", config_class=LocateConfig, job=run_locate)


def run_locate(hparams: LocFTBFHyperParams, command: dict[str, Any], output: Path) -> None:
    """Makes a study, prints its table and writes its files; place and rate are not used.

    Raises:
        LocFTError: Something cannot be used, and nothing has run; or a file cannot be written.
    """
    values = {
        _RENAMED.get(key, key): value
        for key, value in command.items()
        if key not in ("output", "worker")
    }
    study = Study(StudySettings(hparams, **values), output)
    study.open()  # from here on the folder is this study's, and may be written to
    try:
        outcome = locate(study)
    except BaseException:
        if (found := study.outcome()).cells:
            write_study_files(output, found, hparams)  # what there is can be looked at
        raise
    written = write_study_files(output, outcome, hparams)
    show(study_table(outcome))
    for what, path in written.items():
        sys.stdout.write(f"{what}: {path}\n")


def write_study_files(
    folder: Path, outcome: StudyOutcome, hparams: LocFTBFHyperParams
) -> dict[str, Path]:
    """Writes all that there is to see of a study into its folder; returns what is where.

    Raises:
        OutputError: A file cannot be written.
    """
    names = {"figures": "outcome.json", "cells": "cells.csv", "tables": "study.md"}
    names |= {"heat maps": "heat_maps.png", "trade-off": "front.png"}
    paths = {what: folder / name for what, name in names.items()}
    write_dataclass(paths["figures"], outcome)
    write_cells_csv(paths["cells"], outcome)
    with output_errors(paths["tables"]):
        write_atomically(paths["tables"], study_markdown(outcome).encode())
    write_heat_maps(paths["heat maps"], outcome)
    write_front(paths["trade-off"], outcome)
    if outcome.chosen() is not None:
        paths["hyper-parameters with the place found"] = folder / "hparams.yaml"
        write_chosen_yaml(folder / "hparams.yaml", outcome, hparams)
    return paths
