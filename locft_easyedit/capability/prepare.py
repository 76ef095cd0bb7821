"""From task names to tasks with their data, every problem found before a model is run."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LocFTError, MissingDependencyError, one_message
from .metrics import OWN_TASKS, SHARES, has_share
from .surroundings import (
    data_set_bars,
    logging_kept,
    offline_if_unreachable,
    random_states_kept,
)

OWN_TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"

_INSTALL = 'Run: pip install "locft_easyedit[capability]"'
_GO_ON = (
    "Go on where the hub can be reached, with HF_HOME set to a folder that holds these data sets, "
    f"with tasks that need neither (tasks=[{','.join(OWN_TASKS)}]), or with your own (tasks_dir)."
)


class CapabilityError(LocFTError):
    """The capability cannot be measured: unknown tasks, data that is not there, wrong settings."""


@dataclass(frozen=True)
class ReadyTask:
    """One row of the result: a task, or a group with an aggregate such as mmlu.

    Attributes:
        name: Its name in the harness.
        tasks: Name -> the harness's task; for a group all tasks below it.
        groups: Name -> the harness's group: this one and those below it; empty for a task.
    """

    name: str
    tasks: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadyTasks:
    """Tasks that were found and whose data is loaded; they can be measured more than once.

    Attributes:
        rows: The tasks, in the order that was asked for.
        limit: Documents of each task at most (of each task below a group); `None` is all.
    """

    rows: list[ReadyTask]
    limit: int | None


def prepare_tasks(
    tasks: Sequence[str],
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    progress: bool = True,
) -> ReadyTasks:
    """Returns the tasks with their data.

    A tag, or a group without an aggregate of its own, stands for its members.

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
    with (
        random_states_kept(),
        logging_kept(quiet=True),
        data_set_bars(shown=progress),
    ):
        manager, more = _task_manager(names, tasks_dir)
        problems += more
        if problems:
            raise CapabilityError(one_message("The capability cannot be measured:", problems))
        rows: dict[str, ReadyTask] = {}
        with offline_if_unreachable(needed=not set(names) <= set(OWN_TASKS)):
            for name in names:
                try:
                    found = _rows(manager.load([name]), name)
                except Exception as error:  # tasks run code and fetch data of any kind
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    problems.append(f"`{name}`: {reason}")
                    continue
                problems += [problem for row in found for problem in _row_problems(row)]
                rows |= {row.name: row for row in found}
        if problems:
            title = "These tasks cannot be measured:"
            raise CapabilityError(one_message(title, problems) + f"\n{_GO_ON}")
        for row in rows.values():
            for task in row.tasks.values():
                _settle(task, num_fewshot)
    return ReadyTasks(list(rows.values()), limit)


def _import_harness() -> None:
    try:
        import lm_eval.evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f"The capability is measured with lm-evaluation-harness, and `{error.name}` is not "
            f"installed. {_INSTALL}"
        ) from error
    if not hasattr(TaskManager, "load"):
        found = getattr(lm_eval, "__version__", "an old one")
        raise MissingDependencyError(
            f"The capability is measured with lm_eval 0.4.13 or later; {found} was found. "
            f"{_INSTALL}"
        )


def _setting_problems(names: list[str], limit: Any, num_fewshot: Any) -> list[str]:
    problems = []
    if not names:
        problems.append("`tasks=[]` is empty. Name at least one task.")
    if limit is not None and (not _is_whole(limit) or limit < 1):
        problems.append(f"`limit={limit}` must be a whole number of 1 or more, or null for all.")
    if num_fewshot is not None and (not _is_whole(num_fewshot) or num_fewshot < 0):
        problems.append(
            f"`num_fewshot={num_fewshot}` must be a whole number of 0 or more, or null for each "
            "task's own."
        )
    return problems


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
                f"`tasks_dir={tasks_dir}` holds no task{_unreadable(folder)}. Give a folder with "
                "the harness's YAMLs, each with a key `task`."
            )
        else:
            folders.append(folder)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        # Reading the harness's 14,000 YAMLs takes seconds; own tasks alone do without.
        manager = TaskManager(include_path=folders)
    known = manager.all_tasks
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = f"Did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""
            problems.append(
                f"`{name}` is no task of the harness"
                f"{f' or of {tasks_dir}' if tasks_dir is not None else ''}. "
                f"{hint or 'Give one of its names, or tasks_dir with your own.'}"
            )
    return manager, problems


def _unreadable(folder: Path) -> str:
    """Returns why the YAMLs of a folder are no tasks; the harness leaves them out silently."""
    from lm_eval.tasks._yaml_loader import load_yaml

    reasons = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
            reasons.append(f"{path.name} has no key `task`")
        except Exception as error:  # whatever YAML and its includes can raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            reasons.append(f"{path.name}: {reason}")
    return f" ({'; '.join(reasons[:5])})" if reasons else ""


def _rows(loaded: Any, name: str) -> list[ReadyTask]:
    """Returns what the harness has loaded for a name as rows of the result."""
    group = loaded.get("groups", {}).get(name)
    if group is None:
        return [ReadyTask(name, {name: task}) for name, task in loaded["tasks"].items()]
    return _group_rows(group)


def _group_rows(group: Any) -> list[ReadyTask]:
    if group.has_aggregation:
        groups = {one.name: one for one in [group, *group.get_all_groups()]}
        return [ReadyTask(group.name, {t.task_name: t for t in group.get_all_tasks()}, groups)]
    rows = []
    for member in group:
        is_group = hasattr(member, "has_aggregation")
        rows += (
            _group_rows(member)
            if is_group
            else [ReadyTask(member.task_name, {member.task_name: member})]
        )
    return rows


def _row_problems(row: ReadyTask) -> list[str]:
    """Returns why the harness, or a mean of shares, has no use for a task."""
    problems = []
    tasks = row.tasks.values()
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
        problems.append(f"`{row.name}` runs code that the model writes, which is refused here.")
    if any(getattr(task, "MULTIMODAL", False) for task in tasks):
        problems.append(f"`{row.name}` needs images or sound; the model reads text.")
    if row.groups:
        metrics = [one.metric for one in row.groups[row.name].aggregate_metric_list]
    else:
        metrics = list(row.tasks[row.name].aggregation())
    if not has_share(metrics):
        problems.append(
            f"`{row.name}` has the metrics {', '.join(metrics)}; a capability needs one of "
            f"{', '.join(SHARES)}."
        )
    return problems


def _settle(task: Any, num_fewshot: int | None) -> None:
    """Gives a task its number of examples, and leaves out standard errors that cost minutes."""
    from lm_eval.api.metrics import mean

    own = task.get_config("num_fewshot")
    if own != 0:
        wanted = own if num_fewshot is None else num_fewshot
        task.set_config(key="num_fewshot", value=wanted or 0)
    # The harness resamples a corpus metric 100 times in child processes, and prints; it does so
    # for the functions that it knows by identity.
    aggregation = task.aggregation()
    for metric, function in aggregation.items():
        if function is not mean:
            aggregation[metric] = functools.partial(function)
