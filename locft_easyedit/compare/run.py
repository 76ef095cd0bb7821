"""Editing methods side by side: one process each, results kept: a run can be taken up again.

The order: the model is measured before any edit, once; the key covariances that methods need are
taken in one pass; then each method edits the original weights and is measured.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import LocFTError, OutputError, one_message
from ..files import locked
from ..interrupts import ended_by_sigterm
from ..processes import end_processes, ended_by, last_line
from ..reading import is_file
from .job import BEFORE, STATISTICS, Job, JobFolder
from .outcome import Comparison, Outcome
from .plan import Settings, planned

_POLL_SECONDS = 0.2
_BEFORE = {"n", "easyedit", "device", "versions", "summary", "capability", "records"}
_FOLDERS = {BEFORE: "before", STATISTICS: "statistics"}


def compare(settings: Settings) -> Comparison:
    """Runs what has not run yet, and returns all there is.

    Methods that fail are rows with the reason. Interrupted, the same call goes on where it stopped.

    Raises:
        LocFTError: The settings cannot be used (before anything runs), or the model could not
            even be measured before editing.
    """
    jobs, covariance_modules = planned(settings)
    with locked(settings.output):
        return _compared(settings, jobs, covariance_modules)


def _compared(
    settings: Settings, jobs: Mapping[str, Job], covariance_modules: Mapping[str, list[str]]
) -> Comparison:
    folders = {name: JobFolder(settings.output / _folder_of(name)) for name in jobs}
    _refuse_other_settings(jobs, folders)
    before = _result(jobs[BEFORE], folders[BEFORE], settings.progress, again_if=_lacks_figures)
    if isinstance(before, str):
        raise LocFTError(f"The model could not be measured before editing: {before}")
    statistics: Any = None
    if covariance_modules:
        statistics = _result(
            jobs[STATISTICS], folders[STATISTICS], settings.progress, again_if=_files_are_gone
        )
    outcomes = []
    for method in settings.methods:
        job = jobs[method]
        if covariance_modules.get(method):
            if isinstance(statistics, str):
                reason = f"the key covariances could not be computed: {statistics}"
                log = str(folders[STATISTICS].log)
                outcomes.append(Outcome(method, status="failed", reason=reason, log=log))
                continue
            job = replace(job, statistics=statistics)
        result = _result(job, folders[method], settings.progress, again_if=_not_ok)
        outcome = (
            Outcome(method, status="failed", reason=result)
            if isinstance(result, str)
            else Outcome.from_dict(result)
        )
        outcomes.append(replace(outcome, log=str(folders[method].log)))
    return Comparison(
        model=Path(jobs[BEFORE].model).name,
        data=Path(settings.data).name,
        n=before["n"],
        easyedit=before["easyedit"],
        device=before["device"],
        dtype=jobs[BEFORE].dtype,
        versions=before["versions"],
        before=before["summary"],
        capability_before=before["capability"],
        outcomes=outcomes,
    )


def _refuse_other_settings(jobs: Mapping[str, Job], folders: Mapping[str, JobFolder]) -> None:
    """Checks that what an output folder holds was made with these settings.

    Raises:
        OutputError: It was not; nothing there is touched.
    """
    for name, job in jobs.items():
        stored = folders[name].read(folders[name].job)
        if stored is None or not _has_something(folders[name]):
            continue
        # What the statistics found is no setting.
        differences = job.differences({**stored, "statistics": job.statistics})
        if differences:
            raise OutputError(
                one_message(
                    f"{folders[name].path} holds results of other settings ({name}). Choose "
                    "another `output`, or remove that folder to have them made anew:",
                    differences,
                )
            )


def _has_something(folder: JobFolder) -> bool:
    """Whether a folder holds a result, or a part of one, that is worth keeping."""
    stored = folder.read(folder.result, "result")
    return folder.state.exists() if stored is None else not _not_ok(stored["result"])


def _result(
    job: Job,
    folder: JobFolder,
    progress: bool,
    again_if: Callable[[Any], bool] = lambda result: False,
) -> Any:
    """Returns what a job found, from its folder or by running it; a text if it failed."""
    stored = folder.read(folder.result, "result")
    if stored is not None and not again_if(stored["result"]):
        return stored["result"]
    folder.result.unlink(missing_ok=True)
    (folder.path / "null_space_project.pt").unlink(missing_ok=True)  # AlphaEdit trusts any it finds
    folder.write(folder.job, vars(job))
    reason = _run_process(job.name, folder, progress)
    stored = folder.read(folder.result, "result")
    if stored is None:
        return reason or "its process ended without a result"
    shutil.rmtree(folder.state, ignore_errors=True)
    return stored["result"]


def _run_process(name: str, folder: JobFolder, progress: bool) -> str | None:
    """Runs a job's process to its end; returns in words how it failed, if it did."""
    environment = dict(os.environ)
    if environment.get("EASYEDIT_HOME"):  # the process works in its own folder
        home = Path(environment["EASYEDIT_HOME"]).expanduser()
        environment["EASYEDIT_HOME"] = str(home.resolve())
    folder.progress.unlink(missing_ok=True)
    with (
        ended_by_sigterm(),
        folder.log.open("ab") as log,
        tqdm(disable=not progress, desc=name, unit="edit", leave=True) as bar,
    ):
        process = subprocess.Popen(
            _command(folder), cwd=folder.path, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                _show(bar, name, folder.read(folder.progress, "phase", "done", "total"))
                time.sleep(_POLL_SECONDS)
            _show(bar, name, folder.read(folder.progress, "phase", "done", "total"))
        except BaseException:
            end_processes([process])
            raise
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return ended_by(signal.Signals(-process.returncode))
    return last_line(folder.log) or f"its process ended with status {process.returncode}"


def _command(folder: JobFolder) -> list[str]:
    return [sys.executable, "-m", "locft_easyedit.compare.worker", str(folder.path.resolve())]


def _show(bar: tqdm[Any], name: str, progress: Any) -> None:
    if progress is None:
        return
    bar.set_description(f"{name}: {progress['phase']}", refresh=False)
    bar.total, bar.n = progress["total"] or None, progress["done"]
    bar.refresh()


def _not_ok(result: Any) -> bool:
    """Whether a stored outcome is one that is worth another try."""
    return not isinstance(result, Mapping) or result.get("status") in ("failed", "unavailable")


def _files_are_gone(statistics: Any) -> bool:
    """Whether key covariances that were computed once are no longer there."""
    if not isinstance(statistics, Mapping) or not isinstance(statistics.get("files", []), list):
        return True  # the file is damaged
    return any(not is_file(str(file)) for file in statistics.get("files", []))


def _lacks_figures(before: Any) -> bool:
    """Whether a stored measurement before editing is damaged."""
    return not isinstance(before, Mapping) or not set(before) >= _BEFORE


def _folder_of(name: str) -> str:
    return _FOLDERS.get(name) or "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
