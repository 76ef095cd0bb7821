"""A study from the process that was started: others work, this one watches and tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import LocFTError, one_message
from ..files import output_errors
from ..interrupts import ended_by_sigterm
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
                        reasons.append(f"{one.device}: {_last_line(one.log)} (see {one.log})")
                    del workers[i]
        finally:
            _end(workers)
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
    environment = dict(os.environ)
    n_on_cpu = _devices(study).count("cpu")
    if device == "cpu" and n_on_cpu > 1:
        # Else each of them would take all cores, and all would be slower.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_on_cpu)))
    with output_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                _command(study, device), stdout=file, stderr=subprocess.STDOUT, env=environment
            )
    return _Worker(device, log, process)


def _command(study: Study, device: str) -> list[str]:
    return [sys.executable, "-m", "locft_easyedit.locate.worker", str(study.path), device]


def _end(workers: list[_Worker]) -> None:
    for one in workers:
        one.process.terminate()
    for one in workers:
        try:
            one.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


def _marked(study: Study, worker: _Worker, number: signal.Signals) -> bool:
    """Marks the cell at which a process was killed; returns whether it was at one."""
    cell = study.at(worker.process.pid)
    if cell is None or study.result(cell) is not None:
        return False
    if number == signal.SIGKILL:
        reason = "its process was ended by SIGKILL (the system does so when memory runs out)"
        study.write(CellOutcome(cell, OUT_OF_MEMORY, reason))
    else:
        reason = f"its process was ended by {number.name} (see {worker.log})"
        study.write(CellOutcome(cell, FAILED, reason))
    return True


def _last_line(log: Path) -> str:
    lines: Any = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
