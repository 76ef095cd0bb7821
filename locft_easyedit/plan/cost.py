"""Work, bytes moved, and the time that both take at stated rates: of a step and of each phase.

A step on R ranks takes as long as the rank with the largest part of the mini-batch. That rank
computes, reads the weights from the place up (forward and backward, however few its tokens are),
has its kernels started by the host, and gathers layers where these are cut up: all at one time, so
that the longest counts. Then gradients are exchanged, and Adam runs, which every rank does whole:
both wait for the end of the backward pass, because what is trained lies at its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data.batching import cells_of, fixed_shape
from ..hparams import torch_dtype
from ..modeling.cross_entropy import LOGITS_AT_ONCE
from .memory_parts import Part
from .setting import Run
from .shapes import LayerShape, ModelShapes
from .workload import Workload

EDITS_PREFIX = "prefix of the edits"
PROMPTS_PREFIX = "prefix of the evaluation prompts"
AT_ONE_TIME = ("compute", "weights", "launches", "all-gather")
AFTERWARDS = ("gradient exchange", "Adam")


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


@dataclass(frozen=True)
class StepCost:
    """What a step takes on its slowest rank.

    Attributes:
        ranks: Ranks, R.
        share: The largest part of a mini-batch that a rank has, in edits (mean over steps).
        flop: Floating-point operations of that rank.
        weight_bytes: Weights and gradients that it reads and writes beside its activations.
        adam_bytes: What the optimizer reads and writes.
        gathered_bytes: What it receives of layers that are cut up.
        exchanged_bytes: What it sends of gradients.
        seconds: Time by part: `compute`, `weights`, `launches`, `all-gather`, of which the longest
            counts, then `gradient exchange` and `Adam`.
    """

    ranks: int
    share: float
    flop: float
    weight_bytes: float
    adam_bytes: float
    gathered_bytes: float
    exchanged_bytes: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        at_one_time = max(self.seconds[part] for part in AT_ONE_TIME)
        return at_one_time + sum(self.seconds[part] for part in AFTERWARDS)

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return asdict(self) | {"total_seconds": self.total, "bound": self.bound}


def ring_seconds(n_bytes: float, n: int, gb_per_second: float) -> float:
    """Returns the seconds of an all-reduce of `n_bytes` around a ring of `n`.

    Each passes 2 (n - 1) / n of the bytes on to the next (Patarasuk and Yuan, "Bandwidth optimal
    all-reduce algorithms", 2009). The slowest link of the ring carries `gb_per_second`.
    """
    return 2 * (n - 1) / n * n_bytes / (gb_per_second * 1e9)


def step_cost(run: Run) -> StepCost:
    """Returns what a step takes.

    On a CPU only computing counts: the rate that is assumed there was measured in whole steps.
    """
    machine, n_ranks, edits = run.machine, run.ranks, run.share.mean
    flop = step_flop(run) / run.work.batch_size * edits
    passes = math.ceil(edits / run.setting.micro_batch_size)
    weights = passes * weight_bytes(run)
    on_gpu = machine.gpu is not None
    adam = adam_bytes(run) if on_gpu else 0.0
    # Backward they are gathered again; nothing of them is exchanged, for they are frozen.
    gathered = 2 * passes * run.gathered
    gradients = 4 * run.shapes.optimized
    link = machine.nvlink if machine.nodes == 1 else min(machine.nvlink, machine.network)
    layers = 1 + len(run.shapes.above)
    seconds = {
        "compute": flop / machine.flops(run.setting.dtype),
        "weights": weights / (machine.bandwidth * 1e9) if on_gpu else 0.0,
        "launches": passes * layers * machine.launch * 1e-3 if on_gpu else 0.0,
        "all-gather": gathered / (machine.nvlink * 1e9),
        "gradient exchange": ring_seconds(gradients, n_ranks, link),
        "Adam": adam / (machine.bandwidth * 1e9),
    }
    exchanged = 2 * (n_ranks - 1) / n_ranks * gradients
    return StepCost(n_ranks, edits, flop, weights, adam, gathered, exchanged, seconds)


def phases(run: Run, parts: Sequence[Part]) -> list[Phase]:
    """Returns the phases of a run with their work and time; `parts` says where prefixes lie."""
    shapes, setting, work, machine = run.shapes, run.setting, run.work, run.machine
    stored, streamed = torch_dtype(shapes.stored_dtype).itemsize, setting.streamed
    edits_disk, prompts_disk = (
        sum(p.bytes for p in parts if (p.name, p.place) == (name, "disk"))
        for name in (EDITS_PREFIX, PROMPTS_PREFIX)
    )
    # A streamed pass takes all tokens through one layer after the other, in their place: what of
    # them is on disk is read and written by each.
    turns = 2 * shapes.first_layer if streamed else 1
    through = edits_disk * shapes.hidden / shapes.cuts[setting.cut] * turns if streamed else 0.0

    def phase(
        name: str, *, flop: float = 0.0, checkpoint: float = 0.0, disk: float = 0.0, sent: float = 0
    ) -> Phase:
        """Returns a phase whose texts are dealt out evenly."""
        computing = flop / run.ranks / machine.flops(setting.dtype)
        reading = (checkpoint + disk) / (machine.read * 1e9)
        gathering = sent / (machine.nvlink * 1e9)
        return Phase(name, flop, checkpoint, disk, sent, max(computing, reading, gathering))

    recording = work.edit_tokens * prefix_flop(shapes, work, setting.cut)
    from_checkpoint = shapes.streamed * stored if streamed else 0.0
    found = [
        phase("loading", checkpoint=run.kept * stored),
        phase(EDITS_PREFIX, flop=recording, checkpoint=from_checkpoint, disk=edits_disk + through),
        _training(run, edits_disk),
    ]
    if work.checked:
        checking = work.edit_tokens * evaluation_flop(shapes, work, work.recorded_scored)
        batches = math.ceil(work.n * work.recorded_texts / run.ranks / work.eval_batch_size)
        gathered = batches * run.gathered
        found.append(phase("check of all edits", flop=checking, disk=edits_disk, sent=gathered))
    if not work.evaluate:
        return found
    prompts = work.eval_tokens
    if setting.itemsize < 4:  # in fixed shapes: columns up to the next of eight, padding runs too
        length = round(work.run_tokens)
        cells = cells_of("cpu" if run.machine.gpu is None else "cuda")
        prompts *= fixed_shape(length, 1, cells).columns / length
    below, upper = prefix_flop(shapes, work, "layer"), evaluation_flop(shapes, work)
    if any(part.name == PROMPTS_PREFIX for part in parts):
        # Layers that are streamed come by once, for edits and prompts alike.
        found.append(phase(PROMPTS_PREFIX, flop=prompts * below, disk=prompts_disk * turns))
    else:  # all layers run in every measurement
        upper += below
    batches = math.ceil(work.eval_tokens / work.run_tokens / run.ranks / work.eval_batch_size)
    gathered = 2 * batches * run.gathered
    name = "evaluation before and after"
    measuring = phase(name, flop=2 * prompts * upper, disk=2 * prompts_disk, sent=gathered)
    return [*found, measuring]


def _training(run: Run, on_disk: float) -> Phase:
    """Returns all epochs: each step waits for its largest rank."""
    work, step = run.work, step_cost(run)
    n_steps = work.epochs * max(1.0, work.n / work.batch_size)
    # An epoch reads some of an edit's forms, the prefix has all of them.
    disk = work.epochs * on_disk * (work.step_tokens / work.recorded_tokens)
    flop = n_steps * min(work.batch_size, work.n) * step.flop / step.share
    sent = n_steps * (step.gathered_bytes + step.exchanged_bytes)
    seconds = max(n_steps * step.total, disk / (run.machine.read * 1e9))
    return Phase(f"training, {work.epochs} epochs", flop, 0.0, disk, sent, seconds)


def prefix_flop(shapes: ModelShapes, work: Workload, cut: str) -> float:
    """Returns the operations a token of the layers below a cut."""
    flop = sum(_forward(one, shapes, work) for one in shapes.layers[: shapes.first_layer])
    if cut != "layer":
        flop += _forward(shapes.first, shapes, work) - 2 * shapes.above_cut[cut]
    # Of W x + T A S x a folded change leaves the products with A and T to training.
    return flop + 2 * shapes.first.confined * shapes.folds(cut)


def step_flop(run: Run) -> float:
    """Returns the operations of a step on a whole mini-batch.

    A weight above the cut costs 2 operations a token forward and 2 backward to the activations;
    a trained one 2 more for its gradient. Nothing goes back beyond the first trained matrix. So do
    A and S of a confined change, unless the prefix holds what they make constant. T costs what a
    weight does.
    """
    shapes, work, cut = run.shapes, run.work, run.setting.cut
    weights = shapes.above_cut[cut]
    backward = 0 if cut == "matrix" else weights
    token = 2.0 * (weights + backward + shapes.first.trained_matmul)
    token += 2.0 * 2 * shapes.first.output_filters
    token += 2.0 * shapes.first.confined * (not run.folds)
    if cut == "layer":
        token += 3 * _scores(shapes, work)
    elif not shapes.above:  # in the last layer scored positions alone run
        token *= work.step_scored
    for one in shapes.above:
        filters = one.confined + one.output_filters
        token += 2.0 * (2 * one.matmul + one.trained_matmul + 2 * filters)
        token += 3 * _scores(shapes, work)
    if shapes.above:
        token -= 2.0 * 2 * shapes.above[-1].late * (1 - work.step_scored)
    head = 2.0 * 2 * shapes.hidden * shapes.vocab * work.step_scored
    return work.batch_size * work.step_tokens * (token + head)


def evaluation_flop(shapes: ModelShapes, work: Workload, scored: float | None = None) -> float:
    """Returns the operations a token of the layers from the first trained one up, and the head.

    Args:
        shapes: Those of the model.
        work: The work.
        scored: The part of the tokens that is scored; by default that of plain prompts.
    """
    scored = work.scored if scored is None else scored
    flop = sum(_forward(one, shapes, work) for one in (shapes.first, *shapes.above))
    flop -= 2.0 * shapes.layers[-1].late * (1 - scored)
    return flop + 2.0 * shapes.hidden * shapes.vocab * scored


def _forward(layer: LayerShape, shapes: ModelShapes, work: Workload) -> float:
    return 2.0 * layer.matmul + _scores(shapes, work)


def _scores(shapes: ModelShapes, work: Workload) -> float:
    """Returns the operations a token of attending to a row: products with keys and with values."""
    return 4.0 * work.row_tokens * shapes.attention


def weight_bytes(run: Run) -> float:
    """Returns the bytes of weights and of their gradients, forward and backward.

    Nothing goes back beyond the first trained matrix, whose own values only the forward pass reads.
    """
    shapes, setting, work = run.shapes, run.setting, run.work
    once = shapes.above_cut[setting.cut] * (1 if setting.cut == "matrix" else 2)
    # Folded, a confined change is read as A in place of the matrix.
    once += shapes.first.confined * (not run.folds) + 2 * shapes.first.output_filters
    above = sum(one.parameters + one.confined + one.output_filters for one in shapes.above)
    scored = min(setting.micro_batch_size, work.n) * work.texts * work.targets
    # Logits are made in chunks, and each reads the head.
    chunks = math.ceil(scored * shapes.vocab / LOGITS_AT_ONCE)
    numbers = once + 2 * above + 2 * chunks * shapes.hidden * shapes.vocab
    return setting.itemsize * numbers + gradient_bytes(run)


def gradient_bytes(run: Run) -> float:
    """Returns the bytes that gradients move in a pass: written, and where need be in float32."""
    if run.shapes.lora or run.setting.itemsize == 4:
        return 4.0 * run.shapes.optimized
    # Written in half precision, read, written in float32.
    return (2 * run.setting.itemsize + 4.0) * run.shapes.optimized


def adam_bytes(run: Run) -> float:
    """Returns the bytes that Adam moves in a step.

    It reads the gradient, the master and two moments, all in float32, and writes the latter three;
    a parameter in half precision is then written from its master.
    """
    size = run.setting.itemsize
    published = 4 + size if size < 4 and not run.shapes.lora else 0
    return (28.0 + published) * run.shapes.optimized
