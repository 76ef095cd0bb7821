"""From task names to tasks with their data, every problem found before a model is run."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LocFTError, MissingDependencyError, one_message
from .metrics import OWN_TASKS, SHARES
from .surroundings import errors_only, offline_if_unreachable, surroundings_kept

OWN_TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"

_INSTALL = 'Run: pip install "locft_easyedit[capability]"'
_GO_ON = (
    "Go on where the hub can be reached, with HF_HOME set to a folder that holds these data sets, "
    f"with tasks that need neither (tasks=[{','.join(OWN_TASKS)}]), or with your own (tasks_dir)."
)


class CapabilityError(LocFTError):
    """The capability cannot be measured: unknown tasks, data that is not there, wrong settings."""


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks that were found and whose data is loaded; they can be measured more than once.

    Attributes:
        rows: Name of a task, or of a group with a mean of its own (mmlu) -> what the harness has
            loaded for it: `tasks` and `groups`, by their names.
        limit: Documents of each task at most (of each task below a group); `None` is all.
    """

    rows: dict[str, dict[str, Any]]
    limit: int | None


def prepare_tasks(
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    progress: bool = True,
) -> PreparedTasks:
    """Returns the tasks with their data.

    A tag, or a group without a mean of its own, stands for its members.

    Args:
        tasks: Names of the harness, of `tasks_dir`, `locft_basics` or `locft_copying`.
        tasks_dir: A folder with the harness's YAMLs; its tasks come before others of their names.
        limit: Documents of each task at most; of a group, of each task below it.
        num_fewshot: Solved examples in each prompt instead of each task's own number. A task
            whose YAML says 0 keeps 0, as in the harness.
        progress: Show progress bars.

    Raises:
        MissingDependencyError: lm_eval is not installed.
        CapabilityError: Unknown tasks, settings out of range, a folder without tasks, or data
            that cannot be fetched; all problems in one error.
    """
    names = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    problems = _setting_problems(names, limit, num_fewshot)
    _import_harness()
    hub = nullcontext() if set(names) <= set(OWN_TASKS) else offline_if_unreachable()
    with surroundings_kept(progress=progress), errors_only():
        manager, unknown = _task_manager(names, tasks_dir)
        problems += unknown
        if problems:
            raise CapabilityError(one_message("The capability cannot be measured:", problems))
        rows: dict[str, dict[str, Any]] = {}
        with hub:
            for name in names:
                try:
                    found = _rows(manager.load([name]), name)
                    rows |= {one: manager.load([row]) for one, row in found.items()}
                except Exception as error:  # tasks run code and fetch data of any kind
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    problems.append(f"`{name}`: {reason}")
        problems += [problem for name, row in rows.items() for problem in _problems_of(name, row)]
        if problems:
            title = "These tasks cannot be measured:"
            raise CapabilityError(one_message(title, problems) + f"\n{_GO_ON}")
        for task in (task for row in rows.values() for task in row["tasks"].values()):
            own = task.get_config("num_fewshot")
            if own != 0:
                shots = own if num_fewshot is None else num_fewshot
                task.set_config(key="num_fewshot", value=shots or 0)
            _without_resampling_(task)
    return PreparedTasks(rows, limit)


def _rows(loaded: Any, name: str) -> dict[str, Any]:
    """Returns what stands for a name: a task, a group with a mean of its own, or its members."""
    group = loaded["groups"].get(name)
    if group is None:
        return dict(loaded["tasks"])
    if group.has_aggregation:
        return {name: group}
    rows: dict[str, Any] = {}
    for member in group.child_names:
        rows |= _rows(loaded, member) if member in loaded["groups"] else {member: group.get(member)}
    return rows


def _import_harness() -> None:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f"The capability is measured with lm-evaluation-harness, and `{error.name}` is not "
            f"installed. {_INSTALL}"
        ) from error
    if not hasattr(TaskManager, "load"):
        raise MissingDependencyError(
            f"The capability is measured with lm_eval 0.4.13 or later; {lm_eval.__version__} was "
            f"found. {_INSTALL}"
        )


def _setting_problems(names: list[str], limit: Any, num_fewshot: Any) -> list[str]:
    problems = []
    if not names:
        problems.append("`tasks=[]` is empty. Name at least one task.")
    for key, value, least, default in (
        ("limit", limit, 1, "all"),
        ("num_fewshot", num_fewshot, 0, "each task's own"),
    ):
        if value is not None and (type(value) is not int or value < least):
            problems.append(
                f"`{key}={value}` must be a whole number of {least} or more, or null for {default}."
            )
    return problems


def _task_manager(names: list[str], tasks_dir: str | Path | None) -> tuple[Any, list[str]]:
    """Returns the harness's index of tasks, and what is wrong with the folder and the names."""
    from lm_eval.tasks import TaskManager

    folders = [OWN_TASKS_FOLDER]
    problems = []
    if tasks_dir is not None:
        folder = Path(tasks_dir).expanduser()
        if not folder.is_dir():
            problems.append(f"`tasks_dir={tasks_dir}` is not a folder. Give one with task YAMLs.")
        elif not TaskManager(include_path=folder, include_defaults=False).all_tasks:
            problems.append(
                f"`tasks_dir={tasks_dir}` holds no task; the harness leaves out YAMLs that it "
                "cannot read or that have no key `task`. Give a folder with such YAMLs."
            )
        folders.append(folder)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        # Reading the harness's 14,000 YAMLs takes seconds; own tasks alone do without.
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(str(name), manager.all_tasks, n=3)
            hint = f"Did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""
            problems.append(
                f"`{name}` is no task of the harness or of `tasks_dir`. "
                f"{hint or 'Give one of its names, or tasks_dir with your own.'}"
            )
    return manager, problems


def _problems_of(name: str, row: dict[str, Any]) -> list[str]:
    """Returns why the harness, or a mean of shares, has no use for a task or group."""
    problems, tasks = [], row["tasks"].values()
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
        problems.append(f"`{name}` runs code that the model writes, which is refused here.")
    if any(getattr(task, "MULTIMODAL", False) for task in tasks):
        problems.append(f"`{name}` needs images or sound; the model reads text.")
    if name in row["groups"]:
        metrics = [one.metric for one in row["groups"][name].aggregate_metric_list]
    else:
        metrics = list(row["tasks"][name].aggregation())
    if set(SHARES).isdisjoint(metrics):
        problems.append(
            f"`{name}` has the metrics {', '.join(metrics)}; a capability needs one of "
            f"{', '.join(SHARES)}."
        )
    return problems


def _without_resampling_(task: Any) -> None:
    """Leaves out standard errors that take minutes and child processes, such as BLEU's.

    The harness resamples the corpus metrics that it knows by identity; a wrapped one it does not.
    """
    from lm_eval.api.metrics import mean

    aggregation = task.aggregation()
    for metric, function in aggregation.items():
        if function is not mean:
            aggregation[metric] = functools.partial(function)
