"""`locft compare`: editing methods side by side, through EasyEdit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from ..compare.picture import write_comparison_picture
from ..compare.run_comparison import compare
from ..compare.settings import Settings
from ..compare.table import comparison_markdown, comparison_table
from ..evaluation.evaluation import DEFAULT_METRICS, METRICS
from ..hparams import ALG_NAME, LocFTBFHyperParams
from ..utils.files import output_errors, write_atomically
from ..utils.json_fields import write_dataclass
from ..utils.output import show
from .application import run_application

HELP = f"""Edits the same model with several methods of EasyEdit, and measures all of them alike.

Usage: locft compare --config-name NAME data=FILE [methods=[...]] [n=N] [output=DIR] [KEY=VALUE ...]

  --config-name NAME   hparams of {ALG_NAME}: its model, device and dtype are everybody's
  data=FILE            a JSON file: ZsRE, CounterFact, KnowEdit, WikiBigEdit or a list of requests
  n=N                  only the first N edits
  methods=[A,B,...]    default: [{ALG_NAME},FT,LoRA,ROME,MEMIT,AlphaEdit]
  output=DIR           where results go (outputs/compare); the same command goes on there
  metrics=[A,B,...]    of {", ".join(METRICS)};
                       default [{",".join(DEFAULT_METRICS)}]. `wrapped` asks in chat and in other
                       wrappers too, after all edits, and multiplies the time of measuring
  peers.METHOD.KEY=V   a hyper-parameter of another method, as in EasyEdit's YAML, or
                       peers.METHOD.hparams=FILE to start from a YAML of EasyEdit
  text=DIR             *.txt files for MEMIT's and AlphaEdit's key covariances; else they come from
                       text that the model itself writes
  documents=N          documents for them (400), document_tokens=N tokens of a sampled one (150)
  stats_dir=DIR        where key covariances are kept (data/stats)
  capability=[A,...]   tasks of lm-evaluation-harness before and after, capability_limit=N items
                       a task, tasks_dir=DIR for tasks of your own
  devices=[0,1,...]    methods beside one another, one on each device; the same device may be
                       named twice, which makes the seconds of its methods longer
  KEY=VALUE            any hyper-parameter of {ALG_NAME}: lr=1e-3 layers=[22] device=cpu

Set EASYEDIT_HOME to a clone of EasyEdit for methods that its PyPI release does not have.

NAME is one of: """


@dataclass(kw_only=True)
class CompareConfig(LocFTBFHyperParams):
    """The hyper-parameters of LocFT-BF, and what the command needs besides."""

    data: str = MISSING
    n: Optional[int] = None  # noqa: UP045
    methods: list[str] = field(
        default_factory=lambda: [ALG_NAME, "FT", "LoRA", "ROME", "MEMIT", "AlphaEdit"]
    )
    output: str = "outputs/compare"
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT_METRICS))
    peers: dict[str, Any] = field(default_factory=dict)
    text: Optional[str] = None  # noqa: UP045
    documents: int = 400
    document_tokens: int = 150
    stats_dir: str = "data/stats"
    capability: list[str] = field(default_factory=list)
    capability_limit: Optional[int] = None  # noqa: UP045
    tasks_dir: Optional[str] = None  # noqa: UP045
    devices: Optional[list[Any]] = None  # noqa: UP045


def main(arguments: Sequence[str]) -> int:
    """Runs `locft compare`; returns the exit status."""
    return run_application(
        arguments, command="compare", config_class=CompareConfig, help_text=HELP, job=run_compare
    )


def run_compare(hparams: LocFTBFHyperParams, command: dict[str, Any], output: Path) -> None:
    """Compares, prints the table and writes `comparison.json`, `.md` and `.png`.

    Raises:
        LocFTError: Something cannot be used, and nothing has run; or a file cannot be written.
    """
    values = {key: value for key, value in command.items() if key != "output"}
    comparison = compare(Settings(hparams, output=output, **values))
    paths = {kind: output / f"comparison.{kind}" for kind in ("json", "md", "png")}
    write_dataclass(paths["json"], comparison)
    with output_errors(paths["md"]):
        write_atomically(paths["md"], comparison_markdown(comparison).encode())
    write_comparison_picture(paths["png"], comparison)
    show(comparison_table(comparison))
    for what, path in zip(("figures", "table", "picture"), paths.values(), strict=True):
        sys.stdout.write(f"{what}: {path}\n")
