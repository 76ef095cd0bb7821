"""Work, bytes read, and the time that both take at stated rates, phase by phase."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..hparams_rules import DTYPES
from .flops import evaluation_flop, prefix_flop
from .given import Machine, Workload
from .layout import ranks, sharded
from .settings import EDITS_PREFIX, PROMPTS_PREFIX, Candidate
from .shapes import ModelShapes
from .step import step_cost


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: What is done.
        flop: Floating-point operations of all GPUs.
        checkpoint: Bytes that a node reads from the checkpoint: each once, not once a process.
        disk: Bytes of the prefix that a node reads from its disk or writes to it.
        sent: Bytes that a GPU exchanges with others.
        seconds: The longer of computing and of reading: one goes on while the other does.
    """

    name: str
    flop: float
    checkpoint: float
    disk: float
    sent: float
    seconds: float


def phases(
    shapes: ModelShapes, candidate: Candidate, work: Workload, machine: Machine
) -> list[Phase]:
    """Returns the phases of a run with their work and time, in order."""
    setting = candidate.setting
    size, stored = setting.itemsize, DTYPES[shapes.stored_dtype].itemsize
    tokens, prompts = work.edit_tokens, work.eval_tokens
    edits_disk, prompts_disk = (
        sum(p.bytes for p in candidate.parts if p.place == "disk" and p.name == name)
        for name in (EDITS_PREFIX, PROMPTS_PREFIX)
    )
    streamed = shapes.streamed * stored if setting.streamed else 0.0
    # A streamed pass takes all tokens through one layer after the other, in their place.
    turns = 2 * shapes.first_layer if setting.streamed else 1
    on_node = tokens / machine.nodes
    of_disk = edits_disk / max(1.0, on_node * shapes.cuts[setting.cut] * size)
    through = of_disk * on_node * shapes.hidden * size * turns if setting.streamed else 0.0
    loaded = (shapes.upper if setting.streamed else shapes.parameters) * stored
    n_ranks = ranks(setting, machine)

    def phase(name: str, flop: float, checkpoint: float, disk: float, sent: float = 0.0) -> Phase:
        """Returns a phase whose texts are dealt out evenly."""
        computing = flop / n_ranks / machine.flops(setting.dtype)
        reading = (checkpoint + disk) / (machine.read * 1e9)
        gathering = sent / (machine.nvlink * 1e9)
        return Phase(name, flop, checkpoint, disk, sent, max(computing, reading, gathering))

    rows = [
        phase("loading", 0.0, loaded, 0.0),
        phase(EDITS_PREFIX, tokens * prefix_flop(shapes, work, setting.cut), streamed,
              edits_disk + through),
        _training(shapes, candidate, work, machine, edits_disk),
    ]  # fmt: skip
    if work.evaluate:
        below, upper = prefix_flop(shapes, work, "layer"), evaluation_flop(shapes, work)
        if candidate.prompts_kept:
            # Layers that are streamed come by once, for edits and prompts alike.
            rows.append(phase(PROMPTS_PREFIX, prompts * below, 0.0, prompts_disk * turns))
        else:
            upper += below
        gathered = 0.0
        if setting.layout == "fsdp":
            batches = math.ceil(prompts / work.run_tokens / n_ranks / work.eval_batch_size)
            gathered = 2 * batches * sharded(shapes) * size * (1 - 1 / setting.group)
        name = "evaluation before and after"
        rows.append(phase(name, 2 * prompts * upper, 0.0, 2 * prompts_disk, gathered))
    return rows


def _training(
    shapes: ModelShapes, candidate: Candidate, work: Workload, machine: Machine, on_disk: float
) -> Phase:
    """Returns all epochs: each step waits for its largest rank."""
    setting = candidate.setting
    step = step_cost(shapes, setting, work, machine)
    n_steps = work.epochs * max(1.0, work.n / work.batch_size)
    # An epoch reads some of an edit's rewordings, the prefix has all of them.
    disk = work.epochs * on_disk * (work.step_tokens / work.recorded_tokens)
    flop = n_steps * min(work.batch_size, work.n) * step.flop / step.share
    sent = n_steps * (step.gathered_bytes + step.exchanged_bytes)
    seconds = max(n_steps * step.total, disk / (machine.read * 1e9))
    return Phase(f"training, {work.epochs} epochs", flop, 0.0, disk, sent, seconds)
