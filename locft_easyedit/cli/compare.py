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
from ..compare.stream_picture import write_stream_picture
from ..compare.table import comparison_markdown, comparison_table
from ..evaluation.metric_names import DEFAULT_METRICS
from ..hparams import ALG_NAME, LocFTBFHyperParams
from ..utils.files import output_errors, write_atomically
from ..utils.json_fields import write_dataclass
from ..utils.output import show
from .application import run_application


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
    stream: Optional[int] = None  # noqa: UP045
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
        arguments, command="compare", config_class=CompareConfig, job=run_compare
    )


def run_compare(hparams: LocFTBFHyperParams, command: dict[str, Any], output: Path) -> None:
    """Compares, prints the table and writes `comparison.json`, `.md` and `.png`.

    With `stream` also `stream.png`.

    Raises:
        LocFTError: Something cannot be used, and nothing has run; or a file cannot be written.
    """
    values = {key: value for key, value in command.items() if key != "output"}
    comparison = compare(Settings(hparams, output=output, **values))
    paths = {
        what: output / f"comparison.{kind}"
        for what, kind in (("figures", "json"), ("table", "md"), ("picture", "png"))
    }
    write_dataclass(paths["figures"], comparison)
    with output_errors(paths["table"]):
        write_atomically(paths["table"], comparison_markdown(comparison).encode())
    write_comparison_picture(paths["picture"], comparison)
    if command.get("stream") is not None:
        paths["picture of the commits"] = output / "stream.png"
        write_stream_picture(paths["picture of the commits"], comparison)
    show(comparison_table(comparison))
    for what, path in paths.items():
        sys.stdout.write(f"{what}: {path}\n")
