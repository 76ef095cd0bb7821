"""The processes of a comparison: one after another, or beside one another on several devices."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from ..easyedit.peers.yamls import easyedit_folder
from ..utils.progress import progress_bar
from ..utils.subprocesses import Worker, WorkerPool, worker_pool
from .job import JobFolder


def run_process(name: str, folder: JobFolder, progress: bool) -> str | None:
    """Runs a job's process to its end; returns in words how it failed, if it did."""
    with progress_bar(show=progress, desc=name, unit="edit") as bar, worker_pool([None]) as pool:
        worker = _start(pool, 0, name, folder)
        while pool.running:
            pool.wait()
            _show(bar, name, folder)
    return worker.failure


def run_processes(
    folders: Mapping[str, JobFolder], devices: Sequence[str], progress: bool
) -> dict[str, str | None]:
    """Runs jobs beside one another, one on each device at a time, in their order.

    A device may be named several times. Which one a job has is noted in its folder.

    Returns:
        For each job in words how it failed, or `None`.
    """
    waiting = list(folders)
    failures: dict[str, str | None] = {}
    with ExitStack() as stack:
        whole = stack.enter_context(progress_bar(total=len(folders), desc="methods", show=progress))
        bars = [
            stack.enter_context(
                progress_bar(desc=device, unit="edit", position=i, leave=False, show=progress)
            )
            for i, device in enumerate(devices, start=1)
        ]
        pool = stack.enter_context(worker_pool(devices))
        while waiting or pool.running:
            for slot in set(range(len(devices))) - set(pool.running):
                if waiting:
                    name = waiting.pop(0)
                    _start(pool, slot, name, folders[name])
                    bars[slot].reset()
            looked_at = list(pool.running.values())
            for worker in pool.wait():
                failures[worker.name] = worker.failure
                whole.set_postfix_str(f"done: {', '.join(failures)}", refresh=False)
                whole.update()
            for worker in looked_at:
                label = f"{worker.name} on {devices[worker.slot]}"
                _show(bars[worker.slot], label, folders[worker.name])
    return failures


def _start(pool: WorkerPool, slot: int, name: str, folder: JobFolder) -> Worker:
    """Starts the process of a job that has this device from now on."""
    folder.progress.unlink(missing_ok=True)
    device = pool.devices[slot]
    if device is not None:
        noted = {"device": device, "beside": pool.devices.count(device)}
        folder.write(folder.job, folder.read(folder.job) | noted)
    home = easyedit_folder()
    environment = {} if home is None else {"EASYEDIT_HOME": str(home)}  # it works elsewhere
    return pool.start(
        slot, name, _command(folder), folder.log, folder=folder.path, environment=environment
    )


def _show(bar: tqdm[Any], label: str, folder: JobFolder) -> None:
    """Shows how far a job is."""
    progress = folder.read(folder.progress, "phase", "done", "total")
    if progress is not None:
        bar.set_description(f"{label}: {progress['phase']}", refresh=False)
        bar.total, bar.n = progress["total"] or None, progress["done"]
        bar.refresh()


def _command(folder: JobFolder) -> list[str]:
    return [sys.executable, "-m", "locft_easyedit.compare.worker", str(folder.path.resolve())]
