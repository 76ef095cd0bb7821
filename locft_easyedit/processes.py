"""Processes that do a part of the work: how they ended, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PATIENCE = 10  # seconds between asking a process to end and ending it


def end_processes(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Ends processes that may still run, and waits until they are gone."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def share_of_cores(device: str, n_beside: int) -> dict[str, str]:
    """Returns variables for one of `n_beside` processes on a device.

    On a CPU each of them would take all cores, and all would be slower; unless somebody has said
    how many it shall take.
    """
    if device != "cpu" or n_beside < 2 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n_beside))}


def ended_by(number: signal.Signals) -> str:
    """Returns in words that a signal has ended a process."""
    hint = " (the system does so when memory runs out)" if number == signal.SIGKILL else ""
    return f"its process was ended by {number.name}{hint}"


def last_line(log: Path) -> str:
    """Returns the last line of a log that says something; empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
