"""Editing methods side by side: one process each, results kept: a run can be taken up again.

The order: the model is measured before any edit, once; the key covariances that methods need are
taken in one pass; then each method edits the original weights and is measured: one after another,
or beside one another where there are several devices.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import LocFTError
from ..utils.files import locked
from ..utils.parsing import is_file
from ..utils.run_folder import refuse_differences
from .job import BEFORE, STATISTICS, Job, JobFolder
from .outcome import Comparison, Outcome
from .processes import run_process, run_processes
from .settings import Settings, planned

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
    before = _results([jobs[BEFORE]], folders, settings, _lacks_figures)[BEFORE]
    if isinstance(before, str):
        raise LocFTError(f"The model could not be measured before editing: {before}")
    statistics: Any = None
    if covariance_modules:
        statistics = _results([jobs[STATISTICS]], folders, settings, _files_are_gone)[STATISTICS]
    outcomes: dict[str, Outcome] = {}
    ready: list[Job] = []
    for method in settings.methods:
        if not covariance_modules.get(method):
            ready.append(jobs[method])
        elif isinstance(statistics, str):
            reason = f"the key covariances could not be computed: {statistics}"
            log = str(folders[STATISTICS].log)
            outcomes[method] = Outcome(method, status="failed", reason=reason, log=log)
        else:
            ready.append(replace(jobs[method], statistics=statistics))
    results = _results(ready, folders, settings, _not_ok, settings.devices)
    for method, result in results.items():
        outcome = (
            Outcome(method, status="failed", reason=result)
            if isinstance(result, str)
            else Outcome.from_dict(result)
        )
        outcomes[method] = replace(outcome, log=str(folders[method].log))
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
        outcomes=[outcomes[method] for method in settings.methods],
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
        refuse_differences(
            job.differences(stored),
            f"{folders[name].path} holds results of other settings ({name}). Choose another "
            "`output`, or remove that folder to have them made anew:",
        )


def _has_something(folder: JobFolder) -> bool:
    """Whether a folder holds a result, or a part of one, that is worth keeping."""
    stored = folder.read(folder.result, "result")
    return folder.state.exists() if stored is None else not _not_ok(stored["result"])


def _results(
    jobs: Sequence[Job],
    folders: Mapping[str, JobFolder],
    settings: Settings,
    again_if: Callable[[Any], bool],
    devices: Sequence[int | str] | None = None,
) -> dict[str, Any]:
    """Returns what jobs found, from their folders or by running them; a text for one that failed.

    What is in a folder is found anew where `again_if` says so. Without `devices`, to run beside one
    another, jobs run one after another.
    """
    found = {job.name: _stored(folders[job.name], again_if) for job in jobs}
    waiting = {name: folders[name] for name, result in found.items() if result is None}
    for job in jobs:
        if (folder := waiting.get(job.name)) is not None:
            folder.result.unlink(missing_ok=True)
            # AlphaEdit trusts any that it finds.
            (folder.path / "null_space_project.pt").unlink(missing_ok=True)
            folder.write(folder.job, vars(job))
    if not waiting:
        return found
    if devices is None:
        reasons = {
            name: run_process(name, folder, settings.progress) for name, folder in waiting.items()
        }
    else:
        reasons = run_processes(waiting, [str(device) for device in devices], settings.progress)
    return found | {name: _found(folders[name], reason) for name, reason in reasons.items()}


def _stored(folder: JobFolder, again_if: Callable[[Any], bool]) -> Any:
    """Returns what a job found earlier; `None` if it is to be run."""
    stored = folder.read(folder.result, "result")
    return None if stored is None or again_if(stored["result"]) else stored["result"]


def _found(folder: JobFolder, reason: str | None) -> Any:
    """Returns what a process has left; a text if it has failed."""
    stored = folder.read(folder.result, "result")
    if stored is None:
        return reason or "its process ended without a result"
    shutil.rmtree(folder.state, ignore_errors=True)
    return stored["result"]


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
