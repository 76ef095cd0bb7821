"""The time of one step, by what it has to wait for, and which of these bounds it.

A step on R ranks takes as long as the rank with the largest part of the mini-batch. That rank
computes, reads the weights from the place up (forward and backward, however few its tokens are),
has its kernels started by the host, and gathers layers where these are cut up: all at one time, so
that the longest counts. Then gradients are exchanged, and Adam runs, which every rank does whole:
both wait for the end of the backward pass, because what is trained lies at its end.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..cross_entropy import LOGITS_AT_ONCE
from .flops import step_flop
from .given import Machine, Workload
from .layout import Setting, ranks, sharded, share
from .shapes import ModelShapes

AT_ONE_TIME = ("compute", "weights", "launches", "all-gather")
AFTERWARDS = ("gradient exchange", "Adam")


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
    all-reduce algorithms", 2009).

    Args:
        n_bytes: What each of them holds.
        n: How many they are.
        gb_per_second: What the slowest link of the ring carries, in GB/s.
    """
    return 2 * (n - 1) / n * n_bytes / (gb_per_second * 1e9)


def step_cost(shapes: ModelShapes, setting: Setting, work: Workload, machine: Machine) -> StepCost:
    """Returns what a step takes.

    On a CPU only computing counts: the rate that is assumed there was measured in whole steps.
    """
    n_ranks, edits = ranks(setting, machine), share(setting, work, machine).mean
    flop = step_flop(shapes, setting, work) / work.batch_size * edits
    passes = math.ceil(edits / setting.micro_batch_size)
    weights = passes * weight_bytes(shapes, setting, work)
    trained = shapes.lora.trained if shapes.lora else sum(shapes.trained.values())
    adam = adam_bytes(shapes, setting) if machine.gpu is not None else 0.0
    cut_up = sharded(shapes) * setting.itemsize if setting.layout == "fsdp" else 0
    # Backward they are gathered again; nothing of them is exchanged, for they are frozen.
    gathered = 2 * passes * cut_up * (1 - 1 / setting.group)
    link = machine.nvlink if machine.nodes == 1 else min(machine.nvlink, machine.network)
    on_gpu = machine.gpu is not None
    layers = len(shapes.layers) - shapes.first_layer
    seconds = {
        "compute": flop / machine.flops(setting.dtype),
        "weights": weights / (machine.bandwidth * 1e9) if on_gpu else 0.0,
        "launches": passes * layers * machine.launch * 1e-3 if on_gpu else 0.0,
        "all-gather": gathered / (machine.nvlink * 1e9),
        "gradient exchange": ring_seconds(4 * trained, n_ranks, link),
        "Adam": adam / (machine.bandwidth * 1e9),
    }
    exchanged = 2 * (n_ranks - 1) / n_ranks * 4 * trained
    return StepCost(n_ranks, edits, flop, weights, adam, gathered, exchanged, seconds)


def weight_bytes(shapes: ModelShapes, setting: Setting, work: Workload) -> float:
    """Returns the bytes of weights and of their gradients, forward and backward.

    Nothing goes back beyond the first trained matrix, whose own values only the forward pass reads.
    """
    first = shapes.above_cut[setting.cut]
    above = sum(one.parameters for one in shapes.layers[shapes.first_layer + 1 :])
    once = first if setting.cut == "matrix" else 2 * first
    # Folded, a confined change is read as A in place of the matrix.
    once += shapes.layers[shapes.first_layer].confined * (not shapes.folds(setting.cut))
    above += sum(one.confined for one in shapes.layers[shapes.first_layer + 1 :])
    scored = min(setting.micro_batch_size, work.n) * work.texts * work.targets
    # Logits are made in chunks, and each reads the head.
    chunks = math.ceil(scored * shapes.vocab / LOGITS_AT_ONCE)
    numbers = once + 2 * above + 2 * chunks * shapes.hidden * shapes.vocab
    return setting.itemsize * numbers + gradient_bytes(shapes, setting)


def gradient_bytes(shapes: ModelShapes, setting: Setting) -> float:
    """Returns the bytes that gradients move in a pass: written, and where need be in float32."""
    n = shapes.lora.trained if shapes.lora else sum(shapes.trained.values())
    if shapes.lora or setting.itemsize == 4:
        return 4.0 * n
    # Written in half precision, read, written in float32.
    return (2 * setting.itemsize + 4.0) * n


def adam_bytes(shapes: ModelShapes, setting: Setting) -> float:
    """Returns the bytes that Adam moves in a step.

    It reads the gradient, the master and two moments, all in float32, and writes the latter three;
    a parameter in half precision is then written from its master.
    """
    if shapes.lora:
        return 28.0 * shapes.lora.trained
    published = 4 + setting.itemsize if setting.itemsize < 4 else 0
    return (28.0 + published) * sum(shapes.trained.values())
