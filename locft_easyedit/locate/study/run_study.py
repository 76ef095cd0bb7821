"""A study from the process that was started: others work, this one watches and tells."""

from __future__ import annotations

import signal
import sys

from ...errors import LocFTError, one_message
from ...utils.progress import progress_bar
from ...utils.subprocesses import Worker, WorkerPool, worker_pool
from .study import Study
from .study_outcome import FAILED, OUT_OF_MEMORY, CellOutcome, StudyOutcome
from .study_settings import ANY_DEVICE

_WORKER = "locft_easyedit.locate.study.study_worker"


def locate(study: Study, *, progress: bool = True) -> StudyOutcome:
    """Tries what was not tried yet, and returns all there is.

    Interrupted, the same call goes on: what is lost is the cell that was being tried.

    Raises:
        LocFTError: The folder is another study's, or the cells could not be tried.
    """
    study.open()
    if study.unfinished and (reasons := _work(study, progress)) and study.unfinished:
        raise LocFTError(one_message("The study could not be finished:", reasons))
    return study.outcome()


def _work(study: Study, progress: bool) -> list[str]:
    """Lets a process on each device work until nothing is left to try; returns what went wrong."""
    n_all, n_open = len(study.all_cells()), len(study.open_cells())
    reasons = []
    with (
        worker_pool(_devices(study)) as pool,
        progress_bar(
            total=n_all,
            initial=n_all - n_open,
            desc="location study",
            unit="cell",
            show=progress,
        ) as bar,
    ):
        for slot in range(len(pool.devices)):
            _start(study, pool, slot)
        while pool.running:
            for worker in pool.wait():
                if worker.killed_by is not None and _marked(study, worker):
                    # One cell was too much for it; the others are still to be tried.
                    _start(study, pool, worker.slot)
                elif worker.failure is not None:
                    device = pool.devices[worker.slot]
                    reasons.append(f"{device}: {worker.failure} (see {worker.log})")
            bar.total = len(study.all_cells())  # with the experts that were found meanwhile
            bar.update(bar.total - len(study.open_cells()) - bar.n)
    return reasons


def _start(study: Study, pool: WorkerPool, slot: int) -> None:
    device = str(pool.devices[slot])
    log = study.path / "logs" / f"{device.replace(':', '-')}-{slot}.txt"
    pool.start(slot, "location study", _command(study, device), log)


def _command(study: Study, device: str) -> list[str]:
    return [sys.executable, "-m", _WORKER, str(study.path), device]


def _devices(study: Study) -> list[str]:
    """Returns where processes work, one for each; a device may be named several times."""
    settings = study.settings
    if settings.devices is not None:
        return [str(device) for device in settings.devices]
    own = settings.hparams.device
    return [ANY_DEVICE if own is None else str(own)]


def _marked(study: Study, worker: Worker) -> bool:
    """Marks the cell at which a process was killed; returns whether it was at one."""
    cell = study.at(worker.process.pid)
    if cell is None or study.result(cell) is not None:
        return False
    reason = str(worker.failure)
    if worker.killed_by == signal.SIGKILL:
        study.write(CellOutcome(cell, OUT_OF_MEMORY, reason))
    else:
        study.write(CellOutcome(cell, FAILED, f"{reason} (see {worker.log})"))
    return True
