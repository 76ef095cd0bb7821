"""Floating-point work, bytes read, and the time that both take at stated rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..hparams_rules import DTYPES
from .given import Machine, Workload
from .memory import Setting
from .settings import EDITS_PREFIX, PROMPTS_PREFIX, Candidate
from .shapes import LayerShape, ModelShapes


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: What is done.
        flop: Floating-point operations.
        checkpoint: Bytes read from the checkpoint.
        disk: Bytes of the prefix that are read from the disk or written to it.
        seconds: The longer of computing and of reading: one goes on while the other does.
    """

    name: str
    flop: float
    checkpoint: float
    disk: float
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
    share = edits_disk / max(1.0, tokens * shapes.cuts[setting.cut] * size)
    through = share * tokens * shapes.hidden * size * turns if setting.streamed else 0.0
    step = step_flop(shapes, setting, work)
    loaded = (shapes.upper if setting.streamed else shapes.parameters) * stored
    rows = [
        ("loading", 0.0, loaded, 0.0),
        (EDITS_PREFIX, tokens * prefix_flop(shapes, work, setting.cut), streamed,
         edits_disk + through),
        (f"training, {work.epochs} epochs", work.epochs * step * work.n / work.batch_size, 0.0,
         work.epochs * edits_disk),
    ]  # fmt: skip
    if work.evaluate:
        below, upper = prefix_flop(shapes, work, "layer"), evaluation_flop(shapes, work)
        if candidate.prompts_kept:
            # Layers that are streamed come by once, for edits and prompts alike.
            rows.append((PROMPTS_PREFIX, prompts * below, 0.0, prompts_disk * turns))
        else:
            upper += below
        rows.append(("evaluation before and after", 2 * prompts * upper, 0.0, 2 * prompts_disk))
    flops, read = machine.flops(setting.dtype), machine.read * 1e9
    return [
        Phase(name, flop, checkpoint, disk, max(flop / flops, (checkpoint + disk) / read))
        for name, flop, checkpoint, disk in rows
    ]


def prefix_flop(shapes: ModelShapes, work: Workload, cut: str) -> float:
    """Returns the operations a token of the layers below a cut."""
    flop = sum(_forward(one, shapes, work) for one in shapes.layers[: shapes.first_layer])
    if cut != "layer":
        first = shapes.layers[shapes.first_layer]
        flop += _forward(first, shapes, work) - 2 * shapes.above_cut[cut]
    return flop


def step_flop(shapes: ModelShapes, setting: Setting, work: Workload) -> float:
    """Returns the operations of a step on a whole mini-batch.

    A weight above the cut costs 2 operations a token forward and 2 backward to the activations;
    a trained one 2 more for its gradient. Nothing goes back beyond the first trained matrix.
    """
    first = shapes.layers[shapes.first_layer]
    above = shapes.above_cut[setting.cut]
    backward = 0 if setting.cut == "matrix" else above
    token = 2.0 * (above + backward + first.trained_matmul)
    if setting.cut == "layer":
        token += 3 * _scores(shapes, work)
    if shapes.first_layer == len(shapes.layers) - 1:
        token *= work.scored if setting.cut != "layer" else 1.0
    for one in shapes.layers[shapes.first_layer + 1 :]:
        token += 2.0 * (2 * one.matmul + one.trained_matmul) + 3 * _scores(shapes, work)
    if shapes.first_layer < len(shapes.layers) - 1:
        token -= 2.0 * 2 * shapes.layers[-1].late * (1 - work.scored)
    head = 2.0 * 2 * shapes.hidden * shapes.vocab * work.scored
    return work.batch_size * work.run_tokens * (token + head)


def evaluation_flop(shapes: ModelShapes, work: Workload) -> float:
    """Returns the operations a token of the layers from the first trained one up, and the head."""
    upper: Sequence[LayerShape] = shapes.layers[shapes.first_layer :]
    flop = sum(_forward(one, shapes, work) for one in upper)
    flop -= 2.0 * upper[-1].late * (1 - work.scored)
    return flop + 2.0 * shapes.hidden * shapes.vocab * work.scored


def _forward(layer: LayerShape, shapes: ModelShapes, work: Workload) -> float:
    return 2.0 * layer.matmul + _scores(shapes, work)


def _scores(shapes: ModelShapes, work: Workload) -> float:
    """Returns the operations a token of attending to a row: products with keys and with values."""
    return 4.0 * work.row_tokens * shapes.attention
