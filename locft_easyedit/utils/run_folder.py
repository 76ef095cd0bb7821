"""A folder's results and the settings they were made with: the same goes on, another is refused.

The settings lie as JSON beside the results (`SettingsFile`). A run that is about to add results
compares them with its own and refuses what differs (`refuse_differences`). `run_folder` is such a
folder for one run: locked, and gone on with after a kill.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LocFTError, OutputError, one_message
from .files import LOCK, locked, output_errors
from .output import prepare_folder, write_json
from .parsing import is_file, json_of, text_of

logger = logging.getLogger(__name__)

_MOST_BYTES = 2**24  # of a settings file
_FORMAT = 2
_REMEDY = "Choose another output, or begin anew with resume=false."


@dataclass(frozen=True)
class SettingsFile:
    """A JSON file that says what the results beside it were made with.

    Attributes:
        path: The file.
        format: Number of the form of its values; a file with another number is refused.
        remedy: What to do about a file that cannot be used.
        error: What is raised about one.
    """

    path: Path
    format: int
    remedy: str
    error: type[LocFTError] = OutputError

    def write(self, **values: Any) -> None:
        """Writes the file, whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        write_json(self.path, {"format": self.format, **values})

    def read(self, **kinds: type) -> dict[str, Any] | None:
        """Returns what the file holds under these names, of these types; `None` without a file.

        Raises:
            LocFTError: Of the kind `error`: the file is damaged or of another version.
        """
        if not is_file(self.path):
            return None
        try:
            values = json_of(text_of(self.path, self.error, most=_MOST_BYTES))
            if values["format"] != self.format:
                raise ValueError(f"its format is {values['format']!r}, not {self.format}")
            found = {name: values[name] for name in kinds}
        except (ValueError, KeyError, TypeError) as error:
            raise self.unusable(error) from error
        for name, kind in kinds.items():
            if type(found[name]) is not kind:
                raise self.unusable(f"`{name}` is no {kind.__name__}")
        return found

    def unusable(self, reason: object) -> LocFTError:
        """Returns the error of a file that cannot be used, to be raised."""
        return self.error(f"{self.path} is damaged or of another version ({reason}). {self.remedy}")


def differences_of(now: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Returns a line for each setting that is another one than was found, compared as JSON."""
    return [
        f"`{key}={found.get(key)!r}` there; now {now.get(key)!r}."
        for key in sorted({*now, *found})
        if _text(now.get(key)) != _text(found.get(key))
    ]


def refuse_differences(
    differences: Sequence[str], title: str, error: type[LocFTError] = OutputError
) -> None:
    """Refuses what was made with other settings; see `differences_of`.

    Raises:
        LocFTError: Of the kind `error`: there are differences.
    """
    if differences:
        raise error(one_message(title, differences))


@dataclass
class RunFolder:
    """The output folder of one run.

    Attributes:
        path: The folder.
        settings: What the run is: model, edits and hyper-parameters with an effect on the result.
        command: The values it was started with, by which `unfinished_run` finds it.
        finished: Whether all its results are written.
    """

    path: Path
    settings: dict[str, Any]
    command: dict[str, Any]
    finished: bool = False

    @property
    def checkpoints(self) -> Path:
        """The folder for what an interrupted run goes on from."""
        return self.path / "checkpoint"

    @property
    def has_something(self) -> bool:
        """Whether there is something to go on from."""
        folder = self.checkpoints
        return folder.is_dir() and any(file.name != LOCK for file in folder.iterdir())

    def finish(self) -> None:
        """Declares the results written; what an interrupted run would need is removed.

        Raises:
            OutputError: The folder cannot be written to.
        """
        self.finished = True
        self._write()
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _write(self) -> None:
        _file_in(self.path).write(
            finished=self.finished, settings=self.settings, command=self.command
        )


@contextmanager
def run_folder(
    folder: str | Path,
    settings: dict[str, Any],
    command: dict[str, Any],
    *,
    resume: bool = True,
    once: Callable[[Callable[[], RunFolder]], RunFolder] = lambda open_folder: open_folder(),
) -> Iterator[RunFolder]:
    """Context manager that gives the output folder of a run, locked.

    An interrupted run of the same settings is gone on with; without `resume` it is begun anew,
    whatever is there. `once` calls what opens the folder, in one of several processes, and returns
    what it gives in all of them.

    Raises:
        OutputError: The folder belongs to another run, is in use or cannot be written to.
    """
    with ExitStack() as stack:
        opened = _opened(folder, settings, command, resume=resume)
        yield once(lambda: stack.enter_context(opened))


@contextmanager
def _opened(
    folder: str | Path, settings: dict[str, Any], command: dict[str, Any], *, resume: bool
) -> Iterator[RunFolder]:
    path = prepare_folder(folder)
    with locked(path):
        run = RunFolder(path, settings, command)
        found = _read(path) if resume else None
        if found is not None and not found["finished"] and not run.has_something:
            found = None  # it ended before there was anything to go on from
        if found is not None:
            run.finished = found["finished"]
            refuse_differences(
                differences_of(settings, found["settings"]),
                f"`output={folder}` holds the {'finished' if run.finished else 'interrupted'} run "
                "of something else. Choose another output, or replace it with resume=false:",
            )
            if not run.finished:
                logger.info("Going on with the interrupted run in %s.", path)
        elif run.checkpoints.exists():
            with output_errors(path):
                shutil.rmtree(run.checkpoints)
        run._write()
        yield run


def unfinished_run(folders: Sequence[Path], command: Mapping[str, Any]) -> Path | None:
    """Returns the folder of an interrupted run that was started with `command`: the latest."""
    runs = []
    for path in folders:
        try:
            found = _read(path)
        except OutputError:
            continue  # it is not the one that is looked for
        if found and not found["finished"] and _text(found["command"]) == _text(command):
            runs.append(path)
    return max(runs, default=None)


def _file_in(folder: Path) -> SettingsFile:
    return SettingsFile(folder / "run.json", _FORMAT, _REMEDY)


def _read(folder: Path) -> dict[str, Any] | None:
    return _file_in(folder).read(finished=bool, settings=dict, command=dict)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
