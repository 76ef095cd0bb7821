"""`locft edit`: a Hydra application over the flat hparams YAMLs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from ..data import read_requests
from ..errors import HyperParamsError, LocFTError, one_message
from ..evaluate.summary import summarize
from ..hparams import ALG_NAME, LocFTBFHyperParams, read_mapping, type_problems
from ..hparams_files import hparams_folder
from ..models import load_model
from ..pipeline import SAVE, edit_and_measure, write_run
from ..report import metrics_table, prepare_folder, seconds_table, show
from ..requests import distinct_edits

logger = logging.getLogger(__name__)

HELP = f"""Edits a model with {ALG_NAME}.

Usage: locft edit --config-name NAME data=FILE [n=N] [output=DIR] [save=matrices|model|none]
                  [KEY=VALUE ...]

  --config-name NAME   one of the hparams YAMLs below, or the path of one
  --config-dir DIR     also look for YAMLs in DIR
  data=FILE            a JSON file: ZsRE, CounterFact, KnowEdit, WikiBigEdit or a list of requests
  n=N                  only the first N edits
  output=DIR           where results go (outputs/DATE/TIME)
  save=WHAT            the edited matrices (default), the whole edited model, or none
  KEY=VALUE            any hyper-parameter: lr=1e-3 layers=[22] model_name=FOLDER device=cpu
  -m, --cfg job, ...   any option of Hydra: https://hydra.cc

NAME is one of: """


@dataclass(kw_only=True)
class EditConfig(LocFTBFHyperParams):
    """The hyper-parameters, and what the command needs besides."""

    data: str = MISSING
    n: Optional[int] = None  # noqa: UP045
    output: str = "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"
    save: str = "matrices"


_COMMAND_KEYS = ("data", "n", "output", "save")


def main(arguments: Sequence[str]) -> int:
    """Runs `locft edit`; returns the exit status."""
    arguments = list(arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP + ", ".join(sorted(_names(hparams_folder()))) + "\n")
        return 0
    sys.argv = ["locft edit", *_with_stored_configs(arguments)]
    hydra.main(version_base="1.3", config_path=None)(_job)()
    return 0


def _job(config: DictConfig) -> None:
    """One run; Hydra calls it once, or once a cell of a multirun."""
    try:
        run_edit(config, Path(HydraConfig.get().runtime.output_dir))
    except LocFTError as error:
        # One message for a user's mistake; Hydra would print a stack of its own calls.
        sys.stderr.write(f"locft edit: {error}\n")
        raise SystemExit(2) from error


def run_edit(config: DictConfig, output: Path) -> None:
    """Edits as `config` says, prints the tables and writes the files.

    Raises:
        LocFTError: Something in the configuration, the data or the model cannot be used.
    """
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    command = {key: values.pop(key, None) for key in _COMMAND_KEYS}
    hparams = LocFTBFHyperParams.from_mapping(values, source="The hyper-parameters")
    if command["save"] not in SAVE:
        raise HyperParamsError(f"`save={command['save']!r}` must be one of {', '.join(SAVE)}.")
    if command["data"] in (None, "???"):
        raise HyperParamsError("`data` is missing. Add data=FILE, a JSON file with edits.")
    requests = read_requests(command["data"], command["n"])
    # Bad requests show before a large model is loaded; conflicts are warned of only once.
    distinct_edits(requests, "error" if hparams.on_conflict == "error" else None)
    prepare_folder(output)
    model, tokenizer = load_model(hparams)
    run = edit_and_measure(model, tokenizer, requests, hparams)
    written = write_run(
        output, run, hparams, save=command["save"], model=model, tokenizer=tokenizer
    )
    show(metrics_table(summarize(run.metrics)), seconds_table(run.seconds))
    for what, path in written.items():
        sys.stdout.write(f"{what}: {path}\n")


def _names(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.yaml")}


def _with_stored_configs(arguments: list[str]) -> list[str]:
    """Puts every YAML that `--config-name` can mean into Hydra's store, with the command's keys.

    A flat YAML that EasyEdit can read has no place for `data` or `output`, and Hydra accepts only
    keys that a configuration has. Returns the arguments, with a path given as name made a name.
    """
    files = _names(hparams_folder())
    asked = None
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        value = value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
        if option in ("--config-dir", "-cd"):
            files |= _names(Path(value))
        elif option in ("--config-name", "-cn"):
            asked = Path(value).stem if value.endswith((".yaml", ".yml")) else value
            if asked != value:
                files[asked] = Path(value)
                arguments[i : i + (1 if equals else 2)] = [f"--config-name={asked}"]
    if asked is None:
        raise HyperParamsError(
            f"--config-name is missing. Choose one of: {', '.join(sorted(files))}."
        )
    if asked not in files:
        raise HyperParamsError(
            f"--config-name={asked} is not known. Choose one of: {', '.join(sorted(files))}, or "
            "give the path of a YAML."
        )
    _, values = read_mapping(files[asked])
    problems = type_problems(values)  # what is missing may still come from the command line
    if problems:
        raise HyperParamsError(one_message(f"{files[asked]}:", problems))
    node: Any = OmegaConf.merge(OmegaConf.structured(EditConfig), values)
    hydra_settings = {
        "run": {"dir": "${output}"},
        "sweep": {"dir": "${output}", "subdir": "${hydra.job.num}"},
        "job": {"name": "locft_edit"},
    }
    ConfigStore.instance().store(
        name=asked, node={"hydra": hydra_settings, **{k: node._get_node(k) for k in node}}
    )
    return arguments
