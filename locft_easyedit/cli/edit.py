"""`locft edit`: a Hydra application over the flat hparams YAMLs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from ..data import read_requests
from ..errors import HyperParamsError
from ..evaluate.summary import summarize
from ..hparams import ALG_NAME, LocFTBFHyperParams
from ..models import load_model
from ..pipeline import SAVE, edit_and_measure, write_run
from ..report import health_table, metrics_table, prepare_folder, seconds_table, show
from ..requests import distinct_edits
from .application import run_application

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
    return run_application(
        arguments,
        command="edit",
        config_class=EditConfig,
        command_keys=_COMMAND_KEYS,
        help_text=HELP,
        job=run_edit,
    )


def run_edit(hparams: LocFTBFHyperParams, command: dict[str, Any], output: Path) -> None:
    """Edits, prints the tables and writes the files.

    Args:
        hparams: The hyper-parameters.
        command: The values of the command's own keys.
        output: Where results go.

    Raises:
        LocFTError: Something in the hyper-parameters, the data or the model cannot be used.
    """
    if command["save"] not in SAVE:
        raise HyperParamsError(f"`save={command['save']!r}` must be one of {', '.join(SAVE)}.")
    requests = read_requests(command["data"], command["n"])
    # Bad requests show before a large model is loaded; conflicts are warned of only once.
    distinct_edits(requests, "error" if hparams.on_conflict == "error" else None)
    prepare_folder(output)
    model, tokenizer = load_model(hparams)
    run = edit_and_measure(model, tokenizer, requests, hparams)
    written = write_run(
        output, run, hparams, save=command["save"], model=model, tokenizer=tokenizer
    )
    health = [] if run.result.health is None else [health_table(run.result.health)]
    show(metrics_table(summarize(run.metrics)), *health, seconds_table(run.seconds))
    for what, path in written.items():
        sys.stdout.write(f"{what}: {path}\n")
