"""A choice of settings, and how its weights lie on several GPUs.

`copies`
    Each GPU holds the weights that stay and is a rank of its own. Gradients are exchanged.
`fsdp`
    A rank a GPU too, but the frozen layers above the place are cut into as many parts as a node
    has GPUs, and each layer is gathered before it runs, forward and backward.
`model_parallel`
    One process, and so one rank, for a group of GPUs: the layers lie on one after another, and
    while one GPU of the group computes the others wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..hparams_rules import DTYPES
from .given import Machine, Workload
from .shapes import ModelShapes
from .share import LargestShare, largest_share

LAYOUTS = ("copies", "fsdp", "model_parallel")


@dataclass(frozen=True)
class Setting:
    """One way to run an edit.

    Attributes:
        dtype: Precision of weights and computation.
        streamed: Read the frozen layers from the checkpoint instead of keeping them.
        cut: Where the prefix ends: `matrix`, `mlp` or `layer`.
        micro_batch_size: Edits in one forward pass of training.
        layout: How weights lie on several GPUs: `copies`, `fsdp` or `model_parallel`.
        group: GPUs that share one copy of the weights.
    """

    dtype: str
    streamed: bool
    cut: str
    micro_batch_size: int
    layout: str = "copies"
    group: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes a number of the model."""
        return DTYPES[self.dtype].itemsize


def processes(setting: Setting, machine: Machine) -> int:
    """Returns the processes of a node."""
    return machine.gpus // (setting.group if setting.layout == "model_parallel" else 1)


def ranks(setting: Setting, machine: Machine) -> int:
    """Returns the processes of all nodes, R: what edits are dealt out to."""
    return processes(setting, machine) * machine.nodes


def share(setting: Setting, work: Workload, machine: Machine) -> LargestShare:
    """Returns the largest part of a mini-batch that one rank gets, in edits."""
    n_steps = work.epochs * math.ceil(work.n / work.batch_size)
    # Ranks own texts: an edit's rewordings are dealt out as edits are.
    batch = min(work.batch_size, work.n) * work.texts
    n_texts = work.n * work.recorded_texts
    found = largest_share(n_texts, batch, ranks(setting, machine), n_steps)
    return LargestShare(found.mean / work.texts, math.ceil(found.most / work.texts))


def sharded(shapes: ModelShapes) -> int:
    """Returns the parameters that FSDP2 would cut up: frozen layers above the place."""
    above = shapes.layers[shapes.first_layer :]
    return sum(layer.parameters for layer in above if not layer.trained)


def resident(shapes: ModelShapes, setting: Setting) -> float:
    """Returns the parameters that stay on a GPU, in numbers.

    Layers that lie on several GPUs are not cut: one of them may have a layer more than its part.
    """
    kept = shapes.upper if setting.streamed else shapes.parameters
    if setting.layout == "fsdp":
        return kept - sharded(shapes) * (1 - 1 / setting.group)
    if setting.layout == "model_parallel":
        stays = shapes.layers[shapes.first_layer if setting.streamed else 0 :]
        return min(kept, kept / setting.group + max(one.parameters for one in stays))
    return kept
