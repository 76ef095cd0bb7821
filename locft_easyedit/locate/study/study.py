"""A location study and its folder: what is tried, what is done, and who is at what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...data.readers import read_requests
from ...data.requests import distinct_edits
from ...errors import HyperParamsError, OutputError, one_message
from ...evaluation.records import CompactRecords
from ...evaluation.summary import summarize
from ...modeling.loading import model_without_weights, resolve_device
from ...modeling.locations import Location, find_locations
from ...training.choice import Cell
from ...training.identity import run_settings
from ...training.rewordings.writers import check_writer
from ...utils.files import output_errors
from ...utils.hashing import json_sha256
from ...utils.output import prepare_folder, write_json
from ...utils.run_folder import SettingsFile, differences_of, refuse_differences
from ..experts import fused_locations, one_of
from ..score import read_passages
from .cell import figures_of
from .study_experts import StudyExperts, enough_edits
from .study_outcome import OK, STATES, CellOutcome, StudyOutcome
from .study_settings import (
    ANY_DEVICE,
    RATES,
    StudySettings,
    coarse_to_fine,
    has_low_rank,
    problems_of,
    visited,
)

_FORMAT = 2
# What the cells differ in, or what has no part in them.
_NOT_OF_THE_STUDY = ("layers", "rewrite_module_tmp", "lr", "health_check")


@dataclass
class Study:
    """A study in its folder: any number of processes may work on it at a time.

    Attributes:
        settings: What is asked for.
        path: The folder.
        requests: The edits.
        rates: The learning rates.
        layers: The layers that are visited.
        experts: Single experts that are visited.
        passages: The unrelated text, if it is not the fixed one.
    """

    settings: StudySettings
    path: Path

    def __post_init__(self) -> None:
        """Reads and checks everything; no weights are loaded and nothing is written.

        Raises:
            LocFTError: The settings, the data or the model cannot be used.
        """
        s, h = self.settings, self.settings.hparams
        problems = problems_of(s)
        for device in (h.device, *(s.devices or ())):
            resolve_device(None if device == ANY_DEVICE else device)
        if problems:
            raise HyperParamsError(one_message("This study cannot be made:", problems))
        self.requests = read_requests(s.data, s.n)
        edits = distinct_edits(self.requests, "error" if h.on_conflict == "error" else None).edits
        check_writer(h)
        self.passages = None if s.text is None else read_passages(s.text)
        self._done: dict[str, CellOutcome] = {}
        if s.capability:
            from ...evaluation.capability.prepared_tasks import prepare_tasks  # an extra

            prepare_tasks(s.capability, tasks_dir=s.tasks_dir, limit=s.capability_limit)
        model = model_without_weights(h.model_name, trust_remote_code=h.trust_remote_code)
        locations = find_locations(model)
        if h.tuning == "lora":
            locations = [one for one in locations if has_low_rank(model, one, h.lora_rank)]
        # Which experts are the most promising the weights have to tell: any stands in for them.
        standing_in = [one_of(one, 0) for one in fused_locations(model, locations)]
        places = visited([*locations, *standing_in], s)
        self.layers = {one.layer for one in places}
        self._known = [one for one in places if one not in standing_in]
        sought = {(one.layer, one.module) for one in places if one in standing_in}
        if sought and not enough_edits(len(edits), alone=not self._known):
            sought = set()
        self.experts = StudyExperts(self.path / "experts.json", sought)
        self.rates = sorted(float(r) for r in (s.rates or [h.lr * factor for factor in RATES]))

    @property
    def locations(self) -> list[Location]:
        """The places, in the order in which they are best tried."""
        return coarse_to_fine([*self._known, *self.experts.visited()])

    @property
    def unfinished(self) -> bool:
        """Whether there is something to try, or to find."""
        return self.experts.missing or bool(self.open_cells())

    @property
    def cells_folder(self) -> Path:
        """The folder with a file for each cell that is done."""
        return self.path / "cells"

    @property
    def before(self) -> Path:
        """The file with every record's metrics before an edit."""
        return self.path / "before.jsonl"

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this study and no other; its grid may grow."""
        s = self.settings
        values = run_settings(s.hparams, self.requests)
        return {k: v for k, v in values.items() if k not in _NOT_OF_THE_STUDY} | {
            "text": None if self.passages is None else json_sha256(self.passages),
            "capability": list(s.capability),
            "capability_limit": s.capability_limit,
        }

    def open(self) -> None:
        """Makes the folder this study's, or finds that it is.

        Raises:
            OutputError: It is another study's, damaged, or cannot be written to.
        """
        path = prepare_folder(self.path)
        with output_errors(path):
            self.cells_folder.mkdir(exist_ok=True)
        file, identity = _file_in(path), self.identity
        with self.held("study"):
            found = file.read(study=dict, settings=dict)
            if found is not None:
                refuse_differences(
                    differences_of(identity, found["study"]),
                    f"`output={path}` holds another study. Choose another output, or remove that "
                    "one:",
                )
            settings = self.settings.to_dict()
            settings["data"] = str(Path(settings["data"]).resolve())
            file.write(study=identity, settings=settings)
            self._forget_marks()

    def _forget_marks(self) -> None:
        """Removes what is to be tried again: once, by the one who asks for it."""
        for file in self.cells_folder.glob("*.json") if self.settings.retry else ():
            found = self._outcome(file)
            if found is not None and found.state != OK:
                file.unlink()
        self._done.clear()

    @contextmanager
    def held(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Context manager that locks this part of the folder; yields whether it could.

        The system ends it with the process, however that ends. Without `wait` it yields `False`
        where another process has the part.
        """
        folder = self.path / "locks"
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{name}.lock", timeout=-1 if wait else 0)
            with suppress(Timeout):
                lock.acquire()
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def all_cells(self) -> list[Cell]:
        """Returns the cells of the grid that is asked for."""
        return [Cell(location, rate) for location in self.locations for rate in self.rates]

    def open_rates(self, location: Location) -> list[float]:
        """Returns the rates with which a place was not tried yet."""
        return [rate for rate in self.rates if self.result(Cell(location, rate)) is None]

    def open_cells(self) -> list[Cell]:
        """Returns the cells that were not tried yet."""
        done = self._all_done()
        return [cell for cell in self.all_cells() if cell.key not in done]

    def _all_done(self) -> dict[str, CellOutcome]:
        """Returns all outcomes in the folder by their keys; a file is read once."""
        for file in self.cells_folder.glob("*.json"):
            if file.stem not in self._done and (found := self._outcome(file)) is not None:
                self._done[file.stem] = found
        return self._done

    def result(self, cell: Cell) -> CellOutcome | None:
        """Returns what a cell found; `None` if it is to be tried."""
        file = self.cells_folder / f"{cell.key}.json"
        if cell.key not in self._done and (found := self._outcome(file)) is not None:
            self._done[cell.key] = found
        return self._done.get(cell.key)

    def begin(self, cell: Cell) -> None:
        """Notes that this process is at a cell now, for the one that has started it."""
        write_json(self._at(os.getpid()), cell.key)

    def at(self, process: int) -> Cell | None:
        """Returns the cell that a process was at; `None` if it was at none."""
        try:
            values = json.loads(self._at(process).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return next((cell for cell in self.all_cells() if cell.key == values), None)

    def _at(self, process: int) -> Path:
        return self.path / "locks" / f"at-{process}.json"

    def write(self, outcome: CellOutcome) -> None:
        """Keeps what a cell found.

        Raises:
            OutputError: It cannot be written.
        """
        value = {"format": _FORMAT, **outcome.to_dict()}
        write_json(self.cells_folder / f"{outcome.cell.key}.json", value)
        self._done[outcome.cell.key] = outcome

    def outcome(self) -> StudyOutcome:
        """Returns what was found so far, cells of former grids included."""
        cells = list(self._all_done().values())
        planned = sorted({*self.all_cells(), *(one.cell for one in cells)}, key=lambda c: c.rank)
        records = CompactRecords.read(self.before, self.identity) or ()
        before = summarize({"pre": record} for record in records)["pre"]
        return StudyOutcome(
            model=Path(str(self.settings.hparams.model_name)).name,
            data=Path(self.settings.data).stem,
            n=len(self.requests),
            cells=sorted(cells, key=lambda one: one.cell.rank),
            n_cells=len(planned),
            before=figures_of(before),
            planned=planned,
        )

    @staticmethod
    def _outcome(file: Path) -> CellOutcome | None:
        """Returns the outcome in a file; `None` if there is none, or none that can be read."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                return None
            found = CellOutcome.from_dict(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return found if found.state in STATES and f"{found.cell.key}.json" == file.name else None


def load_study(folder: Path) -> Study:
    """Returns the study whose folder this is, as it was asked for last.

    Raises:
        OutputError: There is none, or it is damaged or of another version.
    """
    file = _file_in(folder)
    found = file.read(study=dict, settings=dict)
    if found is None:
        raise OutputError(f"{folder} holds no study: it has no {file.path.name}. Check its path.")
    try:
        settings = StudySettings.from_dict(found["settings"])
    except (KeyError, TypeError) as error:
        raise file.unusable(f"{type(error).__name__}: {error}") from error
    return Study(settings, folder)


def _file_in(folder: Path) -> SettingsFile:
    return SettingsFile(folder / "study.json", _FORMAT, "Choose another output, or remove it.")
