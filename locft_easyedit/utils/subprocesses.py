"""Worker processes: started on devices, watched, told of when they die, and ended.

Every one works by itself: what it finds, and how far it is, goes into files that its job names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import output_errors
from .signals import ended_by_sigterm

_POLL_SECONDS = 0.2
_TERMINATE_SECONDS = 10  # between asking a process to end and ending it


@dataclass(frozen=True)
class Worker:
    """A process that does a part of the work.

    Attributes:
        name: What it does.
        slot: Which of the devices of its pool it is on, from 0.
        log: The file that has what it prints.
        process: The process.
    """

    name: str
    slot: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def killed_by(self) -> signal.Signals | None:
        """The signal that has ended it; `None` if none did."""
        status = self.process.returncode
        return signal.Signals(-status) if status is not None and status < 0 else None

    @property
    def failure(self) -> str | None:
        """In words how it failed: the last line of its log, or the signal; `None` if it did not."""
        if self.process.returncode in (None, 0):
            return None
        if self.killed_by is not None:
            killed = self.killed_by == signal.SIGKILL
            hint = " (the system does so when memory runs out)" if killed else ""
            return f"its process was ended by {self.killed_by.name}{hint}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return last or f"its process ended with status {self.process.returncode}"


class WorkerPool:
    """Workers beside one another, one on each device at a time. See `worker_pool`.

    Attributes:
        devices: Where they work, by slot; a device may be named several times.
        running: Those that had not ended when it was last looked, by slot.
    """

    def __init__(self, devices: Sequence[str | None]) -> None:
        self.devices = devices
        self.running: dict[int, Worker] = {}

    def start(
        self,
        slot: int,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Worker:
        """Returns a worker that has started in a free slot; what it prints is added to `log`.

        Its `environment` comes on top of that of this process.

        Raises:
            OutputError: The log cannot be written.
        """
        device = self.devices[slot]
        cores = _share_of_cores(device, self.devices.count(device))
        variables = os.environ | cores | dict(environment or {})
        with output_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                process = subprocess.Popen(
                    command, cwd=folder, env=variables, stdout=file, stderr=subprocess.STDOUT
                )
        worker = self.running[slot] = Worker(name, slot, log, process)
        return worker

    def wait(self) -> list[Worker]:
        """Waits for a fraction of a second; returns the workers that have ended meanwhile."""
        time.sleep(_POLL_SECONDS)
        ended = [one for one in self.running.values() if one.process.poll() is not None]
        for worker in ended:
            del self.running[worker.slot]
        return ended


@contextmanager
def worker_pool(devices: Sequence[str | None]) -> Iterator[WorkerPool]:
    """Context manager that gives a pool; Ctrl-C, SIGTERM or an error within ends its workers."""
    pool = WorkerPool(devices)
    with ended_by_sigterm():
        try:
            yield pool
        finally:
            _end([worker.process for worker in pool.running.values()])


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Ends processes that may still run, and waits until they are gone."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=_TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _share_of_cores(device: str | None, n_beside: int) -> dict[str, str]:
    """Returns variables for one of `n_beside` processes on a device.

    On a CPU each of them would take all cores, and all would be slower; unless the environment says
    how many it shall take.
    """
    if device != "cpu" or n_beside < 2 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_beside))}
