"""A plan: from hyper-parameters and a machine to the settings that fit, without any weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import HyperParamsError, LocFTError, ModelError, one_message
from ..hparams import LocFTBFHyperParams, torch_dtype
from ..prefix.probes import REFUSALS
from .cost import Phase, StepCost, phases, step_cost, step_flop
from .fitting import Candidate, candidates
from .memory_parts import PLACES, peak
from .reader import ModelReader, meta_model
from .setting import Setting
from .shapes import ModelShapes
from .units import GIB
from .workload import Machine, Workload

# Of the work, told apart from what every edit has.
_FORMS = ("forms", "forms_per_epoch", "form_longer")


@dataclass(frozen=True)
class Plan:
    """What an edit will take.

    Attributes:
        shapes: The model's sizes.
        work: The work.
        machine: The machine.
        dtype: The precision that was asked for.
        candidates: All settings, preferred ones first.
        chosen: The first that fits, or `None`.
        phases: Work and time of the chosen one.
    """

    shapes: ModelShapes
    work: Workload
    machine: Machine
    dtype: str
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    phases: tuple[Phase, ...]

    def keys(self) -> dict[str, Any]:
        """Returns the chosen setting as hyper-parameters; empty where nothing fits."""
        if self.chosen is None:
            return {}
        setting = self.chosen.setting
        budgets = {f"prefix_{p}_gib": _gib(n) for p, n in self.chosen.budgets.items()}
        return {
            "dtype": setting.dtype,
            "stream_frozen": setting.streamed,
            "prefix_cut": setting.cut,
            "micro_batch_size": setting.micro_batch_size,
            **({"model_parallel": True} if setting.layout == "model_parallel" else {}),
            **budgets,
        }

    @property
    def seconds(self) -> float:
        """Time of all phases."""
        return sum(one.seconds for one in self.phases)

    def step(self) -> StepCost | None:
        """Returns what a step of the chosen setting takes; `None` where nothing fits."""
        return step_cost(self.chosen.run) if self.chosen else None

    def launcher(self) -> list[str]:
        """Returns the start of the command on several GPUs; empty for one process."""
        if self.chosen is None or self.chosen.run.ranks == 1:
            return []
        return launch_command(self.chosen.setting, self.machine.gpus, self.machine.nodes)

    def peaks(self) -> dict[str, float]:
        """Returns the most that each place holds at one time, in bytes."""
        parts = self.chosen.parts if self.chosen else ()
        return {place: peak(parts, place) for place in PLACES}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values; sizes in bytes, work in operations."""
        step, work, chosen = self.step(), dataclasses.asdict(self.work), self.chosen
        return {
            "model": dataclasses.asdict(self.shapes) | {"layers": len(self.shapes.layers)},
            "work": {k: value for k, value in work.items() if k not in _FORMS},
            "forms": {key: work[key] for key in _FORMS},
            "preserve": list(self.shapes.confined.preserve) if self.shapes.confined else [],
            "machine": dataclasses.asdict(self.machine)
            | {"flop_per_second": self.machine.flops(self.dtype)},
            "candidates": [_candidate(one) for one in self.candidates],
            "chosen": _candidate(chosen) if chosen else None,
            "settings": self.keys(),
            "memory": [dataclasses.asdict(part) for part in chosen.parts] if chosen else [],
            "peak_bytes": self.peaks(),
            "flop_per_step": step_flop(chosen.run) if chosen else None,
            "step": step.to_dict() if step else None,
            "launcher": " ".join(self.launcher()),
            "phases": [dataclasses.asdict(one) for one in self.phases],
            "seconds": self.seconds,
        }


def make_plan(hparams: LocFTBFHyperParams, work: Workload, machine: Machine) -> Plan:
    """Returns what an edit will take, and which settings fit.

    Args:
        hparams: The hyper-parameters; `model_name` is a folder with a `config.json`, or the name
            of a model whose shapes are shipped. Nothing else is read. Where `stream_frozen` or
            `prefix_cut` is `None`, all that is possible is tried.
        work: The work.
        machine: The machine.

    Raises:
        HyperParamsError: A value cannot be used.
        ModelError: The model is unknown, or is no model of layers.
        PlaceError: The place is not in the model, or suits no LoRA or no confined change.
        DataError: `preserve` names what is no source.
    """
    _refuse(hparams, machine)
    model, source = meta_model(hparams.model_name, trust_remote_code=hparams.trust_remote_code)
    rank = hparams.lora_rank if hparams.tuning == "lora" else None
    preserve = hparams.preserved
    with _told_if_not(source):
        reader = ModelReader(model, source, hparams.layers, hparams.templates, rank, preserve)
        shapes = reader.shapes()
    cut = hparams.prefix_cut
    if cut is not None and cut not in shapes.cuts:
        raise HyperParamsError(
            f"`prefix_cut={cut}` is not possible here; choose among {', '.join(shapes.cuts)}."
        )
    if hparams.stream_frozen and shapes.first_layer == 0:
        raise HyperParamsError(
            "`stream_frozen=True` has nothing to stream: layer 0 is trained. Turn it off, or "
            "choose a later layer."
        )
    device = "cpu" if machine.gpu is None else "cuda"
    dtype = str(hparams.dtype_on(device)).removeprefix("torch.")
    with _told_if_not(source):
        saved = {
            one: reader.activations(torch_dtype(one), work.row_tokens, device)
            for one in ([dtype, "bfloat16"] if dtype == "float32" else [dtype])
        }
    found = candidates(shapes, saved, work, machine, hparams)
    chosen = next((one for one in found if one.reason is None), None)
    done = phases(chosen.run, chosen.parts) if chosen else []
    return Plan(shapes, work, machine, dtype, tuple(found), chosen, tuple(done))


@contextmanager
def _told_if_not(source: str) -> Iterator[None]:
    """Turns what an unknown architecture makes of our questions into one error."""
    try:
        yield
    except LocFTError:
        raise
    except REFUSALS as refusal:
        raise ModelError(
            f"{source}: the sizes of this architecture cannot be told from its configuration "
            f"({type(refusal).__name__}: {refusal}). Nothing can be planned for it; `locft edit` "
            "does not need a plan, and tells if memory runs out."
        ) from refusal


def _refuse(hparams: LocFTBFHyperParams, machine: Machine) -> None:
    """Checks that what is asked for is something that a plan is made for.

    Raises:
        HyperParamsError: It is not.
    """
    if hparams.chooses:
        raise HyperParamsError(
            "`layers=auto` chooses the place with the loaded model; a plan is made before that. "
            "Name a layer, a module and a rate: those that `locft locate` has found, or "
            "layers=[L] for an estimate."
        )
    if not hparams.frozen_prefix:
        raise HyperParamsError(
            "`frozen_prefix=False` runs every layer in every step; a plan is made for runs with "
            "the frozen prefix. Leave `frozen_prefix` on."
        )
    if hparams.model_parallel and machine.gpus == 1:
        raise HyperParamsError(
            "`model_parallel=True` spreads the model over several GPUs of a node, and the plan is "
            "for one. Say how many there are, gpus=8, or give model_parallel=false."
        )
    problems = [
        f"`{key}=True` does not go with `preserve=[{','.join(hparams.preserved)}]`: what enters "
        "the trained matrices is measured with the whole model on its device. Give "
        f"{key}=false, or preserve=[]."
        for key in ("stream_frozen", "shard_frozen")
        if getattr(hparams, key) and hparams.preserved
    ]
    if problems:
        raise HyperParamsError(one_message("Nothing can be planned:", problems))


def launch_command(setting: Setting, gpus: int, nodes: int) -> list[str]:
    """Returns how a run starts its processes; RANK and HOST are each node's to fill in."""
    n_processes = setting.processes(gpus) * nodes
    command = ["accelerate", "launch", "--num_processes", str(n_processes)]
    if nodes > 1:
        command += ["--num_machines", str(nodes), "--machine_rank", "RANK"]
        command += ["--main_process_ip", "HOST", "--main_process_port", "29500"]
    return [*command, "-m"]


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        **dataclasses.asdict(one.setting),
        "fits": one.reason is None,
        "reason": one.reason,
        "prefix_bytes": one.edits,
        "budget_bytes": one.budgets,
        "peak_bytes": {place: peak(one.parts, place) for place in PLACES},
    }


def _gib(n: float) -> float:
    """Returns bytes in GiB, rounded down: a budget must not grow."""
    return int(n / GIB * 100) / 100
