"""The output folder of one run: locked, told apart from other runs, gone on with after a kill."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import OutputError, one_message
from .files import LOCK, locked, output_errors
from .hparams import LocFTBFHyperParams
from .identity import digest, settings_of
from .report import prepare_folder, write_json
from .world import SINGLE_PROCESS, World

logger = logging.getLogger(__name__)

_FORMAT = 1
_FILE = "run.json"


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
        value = {
            "format": _FORMAT,
            "finished": self.finished,
            "settings": self.settings,
            "command": self.command,
        }
        write_json(self.path / _FILE, value)


def run_settings(
    hparams: LocFTBFHyperParams, requests: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns what tells one run from another, known before the model is loaded."""
    return {
        "model_name": str(hparams.to_dict()["model_name"]),
        "precision": hparams.dtype or ("float16" if hparams.fp16 else None),
        "number of requests": len(requests),
        "requests": digest(requests),
        **settings_of(hparams),
    }


@contextmanager
def run_folder(
    folder: str | Path,
    settings: dict[str, Any],
    command: dict[str, Any],
    *,
    resume: bool = True,
    world: World = SINGLE_PROCESS,
) -> Iterator[RunFolder]:
    """Yields the output folder of a run, locked; an interrupted run there is gone on with.

    Of several processes the first one opens it, and tells the others what is there.

    Args:
        folder: Made if need be.
        settings: What the run is (see `run_settings`).
        command: What it was started with.
        resume: Go on with what is there; else it is begun anew, whatever is there.
        world: The processes that share the run.

    Raises:
        OutputError: The folder belongs to another run, is in use or cannot be written to.
    """
    with ExitStack() as stack:
        opened = _opened(folder, settings, command, resume=resume)
        yield world.broadcast_from_main(lambda: stack.enter_context(opened))


@contextmanager
def _opened(
    folder: str | Path, settings: dict[str, Any], command: dict[str, Any], *, resume: bool
) -> Iterator[RunFolder]:
    path = prepare_folder(folder)
    with locked(path):
        run = RunFolder(path, settings, command)
        there = _read(path) if resume else None
        if there is not None and not there["finished"] and not run.has_something:
            there = None  # it ended before there was anything to go on from
        if there is not None:
            differences = differences_of(settings, there["settings"])
            if differences:
                state = "finished" if there["finished"] else "interrupted"
                raise OutputError(
                    one_message(
                        f"`output={folder}` holds the {state} run of something else. Choose "
                        "another output, or replace it with resume=false:",
                        differences,
                    )
                )
            run.finished = there["finished"]
            if not run.finished:
                logger.info("Going on with the interrupted run in %s.", path)
        else:
            with output_errors(path):
                if run.checkpoints.exists():
                    shutil.rmtree(run.checkpoints)
        run._write()
        yield run


def differences_of(settings: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Returns a line for each setting that a folder's own (as JSON has them) are not equal to."""
    return [
        f"`{key}` is {settings.get(key)!r}; there it is {there.get(key)!r}."
        for key in sorted({*settings, *there})
        if _plain(settings.get(key)) != there.get(key)
    ]


def unfinished_run(folders: Sequence[Path], command: Mapping[str, Any]) -> Path | None:
    """Returns the folder of an interrupted run that was started with `command`: the latest."""
    found = []
    for path in folders:
        try:
            there = _read(path)
        except OutputError:
            continue  # it is not the one that is looked for
        if there is not None and not there["finished"] and there["command"] == _plain(command):
            found.append(path)
    return max(found, default=None)


def _read(path: Path) -> dict[str, Any] | None:
    """Returns what a folder's `run.json` holds; `None` if there is none.

    Raises:
        OutputError: It is damaged or of another format.
    """
    file = path / _FILE
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        right = value["format"] == _FORMAT and type(value["finished"]) is bool
        right = right and isinstance(value["settings"], dict) and isinstance(value["command"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right:
        raise OutputError(
            f"{file} is damaged or of another version. Choose another output, or begin anew with "
            "resume=false."
        )
    return dict(value)


def _plain(value: Any) -> Any:
    """Returns `value` as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))
