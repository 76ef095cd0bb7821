"""`locft plan`: what an edit will take, before anything is downloaded or loaded."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ..errors import HyperParamsError, PlanError
from ..hparams import LocFTBFHyperParams
from ..plan.plan import Plan, make_plan
from ..plan.plan_tables import closing_lines, model_table, summary_table, tables
from ..plan.units import GIB, parse_size
from ..plan.workload import ASSUMED_DISK, ASSUMED_HOST, Machine, Workload
from ..utils.output import prepare_folder, show, write_json
from .application import take_config_file, values_of
from .arguments import read_arguments

_NUMBERS = ("rate", "read", "gpus", "nodes", "bandwidth", "nvlink", "network", "launch")


@dataclass(kw_only=True)
class PlanConfig(LocFTBFHyperParams):
    """The hyper-parameters, and what the command needs besides."""

    n: int
    gpu: Optional[str] = None  # noqa: UP045
    gpus: int = 1
    nodes: int = 1
    host: str = ASSUMED_HOST
    disk: str = ASSUMED_DISK
    rate: Optional[float] = None  # noqa: UP045
    read: float = Machine.read
    bandwidth: float = Machine.bandwidth
    launch: float = Machine.launch
    nvlink: float = Machine.nvlink
    network: float = Machine.network
    tokens: float = Workload.tokens
    targets: float = Workload.targets
    epochs: Optional[int] = None  # noqa: UP045
    evaluate: bool = True
    verbose: bool = False
    output: Optional[str] = None  # noqa: UP045


def main(arguments: Sequence[str]) -> int:
    """Runs `locft plan`; returns the exit status."""
    rest, _, file = take_config_file(list(arguments))
    config = read_arguments(PlanConfig, rest, command="plan", defaults=values_of(file))
    plan = plan_of(config)
    detailed = config.verbose or plan.chosen is None
    show(*(tables(plan) if detailed else [model_table(plan), summary_table(plan)]))
    sys.stdout.write(closing_lines(plan, detailed=detailed))
    if config.output is not None:
        written = Path(config.output)
        prepare_folder(written.parent)
        write_json(written, plan.to_dict())
        sys.stdout.write(f"plan: {written}\n")
    if plan.chosen is None:
        least = plan.candidates[-1]
        raise PlanError(
            "No settings fit; each has its reason in the table. The last, "
            f"{least.setting.dtype} with micro_batch_size=1: {least.reason}. Give more memory "
            "(gpu=, host=, disk=), choose a later layer, or make fewer edits at a time."
        )
    return 0


def plan_of(config: PlanConfig) -> Plan:
    """Returns the plan that the arguments ask for.

    Raises:
        LocFTError: A value, the model or the place cannot be used.
    """
    names = [f.name for f in dataclasses.fields(LocFTBFHyperParams)]
    hparams = LocFTBFHyperParams(**{name: getattr(config, name) for name in names})
    if config.gpu is None and str(config.device).lower() != "cpu":
        raise HyperParamsError(
            "`gpu` is missing. Add gpu=80GiB, the memory of the GPU, or device=cpu for a machine "
            "without one."
        )
    machine = Machine(
        gpu=None if config.gpu is None else parse_size("gpu", config.gpu),
        host=parse_size("host", config.host),
        disk=parse_size("disk", config.disk),
        prefix_gpu=_bytes("prefix_gpu_gib", config.prefix_gpu_gib),
        prefix_host=_bytes("prefix_host_gib", config.prefix_host_gib),
        prefix_disk=_bytes("prefix_disk_gib", config.prefix_disk_gib),
        **{name: getattr(config, name) for name in _NUMBERS},
    )
    work = Workload.from_hparams(
        hparams,
        config.n,
        tokens=config.tokens,
        targets=config.targets,
        evaluate=config.evaluate,
        epochs=hparams.num_steps if config.epochs is None else config.epochs,
    )
    return make_plan(hparams, work, machine)


def _bytes(key: str, gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 <= gib < float("inf"):
        raise HyperParamsError(f"`{key}={gib}` must be 0 or more (0 turns it off), in GiB.")
    return int(gib * GIB)
