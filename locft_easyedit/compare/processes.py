"""The processes of a comparison: one after another, or beside one another on several devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..interrupts import ended_by_sigterm
from ..processes import end_processes, ended_by, last_line, share_of_cores
from .job import JobFolder

_POLL_SECONDS = 0.2


class JobProcess:
    """A job's process and its line on the terminal.

    Args:
        name: The job.
        folder: Where it works.
        environment: Variables besides those of this process.
    """

    def __init__(
        self, name: str, folder: JobFolder, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.folder = folder
        folder.progress.unlink(missing_ok=True)
        variables = os.environ | (environment or {})
        if variables.get("EASYEDIT_HOME"):  # the process works in its own folder
            home = Path(variables["EASYEDIT_HOME"]).expanduser()
            variables["EASYEDIT_HOME"] = str(home.resolve())
        with folder.log.open("ab") as log:
            self.process = subprocess.Popen(
                _command(folder),
                cwd=folder.path,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def running(self) -> bool:
        """Returns whether it has not ended yet."""
        return self.process.poll() is None

    def show(self, bar: tqdm[Any], where: str = "") -> None:
        """Shows how far it is."""
        progress = self.folder.read(self.folder.progress, "phase", "done", "total")
        if progress is None:
            return
        bar.set_description(f"{self.name}{where}: {progress['phase']}", refresh=False)
        bar.total, bar.n = progress["total"] or None, progress["done"]
        bar.refresh()

    def reason(self) -> str | None:
        """Returns in words how it failed; `None` if it did not."""
        status = self.process.returncode
        if status == 0:
            return None
        if status < 0:
            return ended_by(signal.Signals(-status))
        return last_line(self.folder.log) or f"its process ended with status {status}"


def run_process(name: str, folder: JobFolder, progress: bool) -> str | None:
    """Runs a job's process to its end; returns in words how it failed, if it did."""
    with (
        ended_by_sigterm(),
        tqdm(disable=not progress, desc=name, unit="edit", leave=True) as bar,
    ):
        one = JobProcess(name, folder)
        try:
            while one.running():
                one.show(bar)
                time.sleep(_POLL_SECONDS)
            one.show(bar)
        except BaseException:
            end_processes([one.process])
            raise
    return one.reason()


@dataclass
class _Slot:
    """A device, its line on the terminal, and what runs there."""

    device: str
    bar: tqdm[Any]
    running: JobProcess | None = None


def run_processes(
    folders: Mapping[str, JobFolder], devices: Sequence[str], progress: bool
) -> dict[str, str | None]:
    """Runs jobs beside one another, one on each device at a time, in their order.

    Args:
        folders: The jobs' folders by name. The device of each is noted there when one is free.
        devices: Where they run; a device may be named several times.
        progress: Show a line for each device, and one for all.

    Returns:
        For each in words how it failed, or `None`.
    """
    waiting = list(folders)
    reasons: dict[str, str | None] = {}
    hidden = not progress
    with (
        ended_by_sigterm(),
        tqdm(total=len(folders), desc="methods", disable=hidden) as whole,
    ):
        slots = [
            _Slot(device, tqdm(desc=device, unit="edit", position=i, leave=False, disable=hidden))
            for i, device in enumerate(devices, start=1)
        ]
        try:
            while waiting or any(slot.running for slot in slots):
                for slot in slots:
                    one = slot.running
                    if one is not None:
                        one.show(slot.bar, f" on {slot.device}")
                        if one.running():
                            continue
                        reasons[one.name], slot.running = one.reason(), None
                        whole.set_postfix_str(f"done: {', '.join(reasons)}", refresh=False)
                        whole.update()
                    if waiting:
                        slot.running = _started(waiting.pop(0), folders, slot, devices)
                        slot.bar.reset()
                time.sleep(_POLL_SECONDS)
        finally:
            end_processes([slot.running.process for slot in slots if slot.running is not None])
            for slot in slots:
                slot.bar.close()
    return reasons


def _started(
    name: str, folders: Mapping[str, JobFolder], slot: _Slot, devices: Sequence[str]
) -> JobProcess:
    """Returns the process of a job that has this device from now on."""
    folder = folders[name]
    beside = devices.count(slot.device)
    folder.write(folder.job, folder.read(folder.job) | {"device": slot.device, "beside": beside})
    return JobProcess(name, folder, share_of_cores(slot.device, beside))


def _command(folder: JobFolder) -> list[str]:
    return [sys.executable, "-m", "locft_easyedit.compare.worker", str(folder.path.resolve())]
