"""`locft edit`: a Hydra application over the flat hparams YAMLs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf

from ..api import SAVE, check_save, edit_and_measure, write_run
from ..data.readers import read_requests
from ..data.requests import distinct_edits
from ..distributed.world import get_world
from ..errors import HyperParamsError, OutputError
from ..evaluation.metric_names import DEFAULT_METRICS, check_metrics
from ..evaluation.report import health_table, metrics_table, seconds_table
from ..evaluation.summary import summarize
from ..hparams import LocFTBFHyperParams
from ..locate.auto import check_enough
from ..modeling.loading import load_model
from ..training.health_report import HealthReport
from ..training.identity import run_settings
from ..training.rewordings.writers import check_writer
from ..utils.output import show
from ..utils.run_folder import run_folder, unfinished_run
from ..utils.tables import counted
from .application import run_application


@dataclass(kw_only=True)
class EditConfig(LocFTBFHyperParams):
    """The hyper-parameters, and what the command needs besides."""

    data: str = MISSING
    n: Optional[int] = None  # noqa: UP045
    output: str = "${locft_output:outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}}"
    save: str = "matrices"
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))
    resume: bool = True


def main(arguments: Sequence[str]) -> int:
    """Runs `locft edit`; returns the exit status."""
    outputs: dict[str, str] = {}

    def output(by_date: str, *, _root_: DictConfig) -> str:
        # Once for each run: Hydra asks often, and ranks have to ask each other equally often.
        values: Any = OmegaConf.to_container(_root_)
        given = {f.name: values.get(f.name) for f in dataclasses.fields(EditConfig)}
        given = _without_output(given)
        key = json.dumps(given, sort_keys=True, default=str)
        if key not in outputs:
            outputs[key] = get_world().broadcast_from_main(lambda: _output(by_date, given))
        return outputs[key]

    OmegaConf.register_new_resolver("locft_output", output, replace=True)
    return run_application(arguments, command="edit", config_class=EditConfig, job=run_edit)


def run_edit(
    hparams: LocFTBFHyperParams, command: dict[str, Any], output: Path
) -> Mapping[str, Any]:
    """Edits, prints the tables and writes the files; returns the means after the edit.

    Raises:
        LocFTError: Something in the hyper-parameters, the data or the model cannot be used.
    """
    if command["save"] not in SAVE:
        raise HyperParamsError(f"`save={command['save']!r}` must be one of {', '.join(SAVE)}.")
    check_metrics(command["metrics"])
    requests = read_requests(command["data"], command["n"])
    # Bad requests show before a large model is loaded; conflicts are warned of only once.
    edits = distinct_edits(requests, "error" if hparams.on_conflict == "error" else None).edits
    if hparams.chooses:
        check_enough(len(edits))
    settings = run_settings(hparams, requests) | {
        "save": command["save"],
        "metrics": list(command["metrics"]),
    }
    started_with = _without_output({**hparams.to_dict(), **command})
    world = get_world()
    with run_folder(
        output, settings, started_with, resume=command["resume"], once=world.broadcast_from_main
    ) as folder:
        if folder.finished:
            return _show_again(folder.path) if world.is_main_process else {}
        check_writer(hparams)
        model, tokenizer = load_model(hparams)
        check_save(command["save"], model, hparams)
        kept = dataclasses.replace(
            hparams, checkpoint_dir=hparams.checkpoint_dir or str(folder.checkpoints)
        )
        run = edit_and_measure(model, tokenizer, requests, kept, metrics=command["metrics"])
        if not world.is_main_process:
            return {}
        written = write_run(
            output, run, hparams, save=command["save"], model=model, tokenizer=tokenizer
        )
        folder.finish()
    health = [] if run.result.health is None else [health_table(run.result.health)]
    summary = summarize(run.metrics)
    show(metrics_table(summary), *health, seconds_table(run.seconds))
    sys.stdout.write(repairs_line(run.result.repairs))
    for what, path in written.items():
        sys.stdout.write(f"{what}: {path}\n")
    sys.stdout.write(_how_to_ask(str(hparams.model_name), written))
    return summary["post"]


def _show_again(folder: Path) -> Mapping[str, Any]:
    """Prints the tables of a run that is finished; returns its means after the edit.

    Raises:
        OutputError: Its results cannot be read.
    """
    path = folder / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tables = [metrics_table(found["summary"])]
        if found["training"]["health"] is not None:
            tables.append(health_table(HealthReport.from_dict(found["training"]["health"])))
        tables.append(seconds_table(found["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path}, of a run that was finished, cannot be read: {error}. Begin anew with "
            "resume=false."
        ) from error
    show(*tables)
    sys.stdout.write(repairs_line(found["training"].get("repairs")))
    sys.stdout.write(f"This run was finished; its results are in {folder}. ")
    sys.stdout.write("resume=false makes it again.\n")
    means: Mapping[str, Any] = found["summary"]["post"]
    return means


def repairs_line(repairs: Mapping[str, int] | None) -> str:
    """Returns the line that says what repairs came to; empty if nothing was checked."""
    if repairs is None:
        return ""
    wrong, checked, lost = (repairs[k] for k in ("wrong_texts", "checked_texts", "lost_edits"))
    line = f"Check after the epochs: {wrong:,} of {counted(checked, 'text')} did not hold"
    if wrong:
        were = "was" if lost == 1 else "were"
        now = f"{counted(lost, 'edit')} {were} left" if lost else "all did"
        line += f", and after {counted(repairs['rounds'], 'round')} of repair {now}"
    return f"{line}.\n"


def _how_to_ask(model: str, written: Mapping[str, Path]) -> str:
    """Returns the line that says how to try what was edited; empty if nothing was saved."""
    asked = [model, f"delta={written['edit']}"] if "edit" in written else []
    if "edited model" in written:
        asked = [str(written["edited model"]), f"original={model}"]
    return f"try it: {shlex.join(['locft', 'ask', *asked])}\n" if asked else ""


def _without_output(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a command's values as they are kept in files."""
    return {key: value for key, value in values.items() if key not in ("output", "api_key")}


def _output(by_date: str, given: Mapping[str, Any]) -> str:
    """Returns where results go by default: to an interrupted run of this very command, if any."""
    if not given["resume"]:
        return by_date
    # By date and time: two levels below the first part.
    folders = [file.parent for file in Path(by_date).parents[1].glob("*/*/run.json")]
    return str(unfinished_run(folders, given) or by_date)
