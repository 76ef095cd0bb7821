"""A study from the process that was started: others work, this one watches and tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..errors import LocFTError, one_message
from ..files import output_errors
from ..interrupts import ended_by_sigterm
from ..processes import end_processes, ended_by, last_line, share_of_cores
from .outcome import FAILED, OUT_OF_MEMORY, CellOutcome, StudyOutcome
from .settings import ANY_DEVICE
from .study import Study

_POLL_SECONDS = 0.3


def locate(study: Study, *, progress: bool = True) -> StudyOutcome:
    """Tries what was not tried yet, and returns all there is.

    Interrupted, the same call goes on: what is lost is the cell that was being tried.

    Args:
        study: The study.
        progress: Show a progress bar, with the time left.

    Raises:
        LocFTError: The folder is another study's, or the cells could not be tried.
    """
    study.open()
    if study.open_cells():
        reasons = _work(study, progress)
        if reasons and study.open_cells():
            raise LocFTError(one_message("The study could not be finished:", reasons))
    return study.outcome()


@dataclass
class _Worker:
    """A process that works on the study, and the file that has what it prints."""

    device: str
    log: Path
    process: subprocess.Popen[bytes]


def _work(study: Study, progress: bool) -> list[str]:
    """Lets a process on each device work until nothing is left to try; returns what went wrong."""
    n_all, n_open = len(study.all_cells()), len(study.open_cells())
    reasons, workers = [], []
    with (
        ended_by_sigterm(),
        tqdm(
            total=n_all,
            initial=n_all - n_open,
            desc="location study",
            unit="cell",
            disable=not progress,
        ) as bar,
    ):
        try:
            workers = [_start(study, device, i) for i, device in enumerate(_devices(study))]
            while workers:
                _pause()
                bar.update(n_all - len(study.open_cells()) - bar.n)
                for i, one in reversed(list(enumerate(workers))):
                    status = one.process.poll()
                    if status is None:
                        continue
                    if status < 0 and _marked(study, one, signal.Signals(-status)):
                        # One cell was too much for it; the others are still to be tried.
                        workers[i] = _start(study, one.device, i)
                        continue
                    if status != 0:
                        said = last_line(one.log) or "it said nothing"
                        reasons.append(f"{one.device}: {said} (see {one.log})")
                    del workers[i]
        finally:
            end_processes([one.process for one in workers])
        bar.update(n_all - len(study.open_cells()) - bar.n)
    return reasons


def _pause() -> None:
    time.sleep(_POLL_SECONDS)


def _devices(study: Study) -> list[str]:
    """Returns where processes work, one for each; a device may be named several times."""
    settings = study.settings
    if settings.devices is not None:
        return [str(device) for device in settings.devices]
    own = settings.hparams.device
    return [ANY_DEVICE if own is None else str(own)]


def _start(study: Study, device: str, number: int) -> _Worker:
    log = study.path / "logs" / f"{device.replace(':', '-')}-{number}.txt"
    environment = os.environ | share_of_cores(device, _devices(study).count(device))
    with output_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                _command(study, device), stdout=file, stderr=subprocess.STDOUT, env=environment
            )
    return _Worker(device, log, process)


def _command(study: Study, device: str) -> list[str]:
    return [sys.executable, "-m", "locft_easyedit.locate.worker", str(study.path), device]


def _marked(study: Study, worker: _Worker, number: signal.Signals) -> bool:
    """Marks the cell at which a process was killed; returns whether it was at one."""
    cell = study.at(worker.process.pid)
    if cell is None or study.result(cell) is not None:
        return False
    if number == signal.SIGKILL:
        study.write(CellOutcome(cell, OUT_OF_MEMORY, ended_by(number)))
    else:
        reason = f"{ended_by(number)} (see {worker.log})"
        study.write(CellOutcome(cell, FAILED, reason))
    return True
