"""Memory by part, place and phase, for one choice of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cross_entropy import LOGITS_AT_ONCE
from ..hparams import DTYPES
from .activations import LayerActivations
from .given import Machine, Workload
from .shapes import ModelShapes
from .sizes import GIB

PHASES = ("load", "prefix", "train", "evaluate")
PLACES = ("gpu", "host", "disk")

_AFTER = ("train", "evaluate")

# What is there before any tensor: a CUDA context with its kernels, and Python with its libraries
# (374 MiB measured; a process with a CUDA context maps a few more).
_CUDA_CONTEXT = GIB // 2
_PROCESS = int(0.4 * GIB)
_PROCESS_WITH_CUDA = 2 * GIB
# A request with its strings, and its tokens.
_BYTES_A_REQUEST = 4096
# On a CPU the C library keeps freed blocks for later, and not all of them fit again: after a few
# steps it holds this much more than the activations at work (0.64 to 0.66 measured with glibc).
_HELD_FREE = 0.65


@dataclass(frozen=True)
class Setting:
    """One way to run an edit.

    Attributes:
        dtype: Precision of weights and computation.
        streamed: Read the frozen layers from the checkpoint instead of keeping them.
        cut: Where the prefix ends: `matrix`, `mlp` or `layer`.
        micro_batch_size: Edits in one forward pass of training.
    """

    dtype: str
    streamed: bool
    cut: str
    micro_batch_size: int

    @property
    def itemsize(self) -> int:
        """Bytes a number of the model."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Part:
    """What takes memory.

    Attributes:
        name: What it is.
        place: Where it is: `gpu`, `host` or `disk`.
        bytes: How much.
        phases: When it is there.
    """

    name: str
    place: str
    bytes: float
    phases: tuple[str, ...] = PHASES


def peak(parts: Sequence[Part], place: str) -> float:
    """Returns the most that a place holds at one time, in bytes."""
    return max(
        sum(p.bytes for p in parts if p.place == place and phase in p.phases) for phase in PHASES
    )


def standing_parts(
    shapes: ModelShapes, setting: Setting, work: Workload, machine: Machine
) -> list[Part]:
    """Returns what is there all the time (the prefix aside): process, model, requests."""
    size, device = setting.itemsize, machine.device
    kept = shapes.upper if setting.streamed else shapes.parameters
    parts = [Part("weights", device, kept * size)]
    stored = DTYPES[shapes.stored_dtype].itemsize
    if stored != size and not setting.streamed:
        name = "checkpoint, mapped while it is converted"
        parts.append(Part(name, "host", kept * stored, ("load",)))
    parts.append(Part("requests and tokens", "host", work.n * _BYTES_A_REQUEST))
    if machine.gpu is None:
        return [Part("Python and libraries", "host", _PROCESS), *parts]
    parts.append(Part("CUDA context", "gpu", _CUDA_CONTEXT))
    if not setting.streamed:
        parts.append(Part("weights on their way to the GPU", "host", kept * size, ("load",)))
    return [Part("Python and libraries", "host", _PROCESS_WITH_CUDA), *parts]


def working_parts(
    shapes: ModelShapes,
    saved: Sequence[LayerActivations],
    setting: Setting,
    work: Workload,
    machine: Machine,
) -> list[Part]:
    """Returns what comes and goes: what training adds, activations, buffers of streamed layers.

    Args:
        shapes: The model's sizes.
        saved: What autograd keeps of each layer from the first trained one up.
        setting: The choice.
        work: The work.
        machine: The machine.
    """
    size, device = setting.itemsize, machine.device
    widest = max(one.total for one in saved)
    passed = work.cells(min(work.eval_batch_size, work.n))
    scored = min(work.eval_batch_size, work.n) * work.targets
    activations = training_activations(shapes, saved, setting, work)
    parts = [
        *_trained_parts(sum(shapes.trained.values()), size, device),
        Part("activations", device, activations, ("train",)),
        Part("cross-entropy", device, cross_entropy(shapes, setting, work), ("train",)),
        Part("activations without gradients", device, passed * widest, ("prefix", "evaluate")),
    ]
    if device == "host":
        parts.append(Part("kept by the C library", device, _HELD_FREE * activations, _AFTER))
    if work.evaluate:
        logits = scored * shapes.vocab * (size + 4)
        parts.append(Part("logits of evaluation", device, logits, ("evaluate",)))
    if setting.streamed:
        below = shapes.layers[: shapes.first_layer]
        layer = max((one.parameters for one in below), default=0)
        buffers = 2 * max(layer, shapes.embedding) * size
        for place in dict.fromkeys((device, "host")):
            parts.append(Part("buffers of streamed layers", place, buffers, ("prefix", "evaluate")))
    return parts


def _trained_parts(n: int, size: int, device: str) -> list[Part]:
    """Returns what training `n` parameters adds to their values in the model."""
    train = ("train",)
    parts = [
        Part("Adam's moments", device, 8 * n, train),
        Part("gradients", device, size * n, train),
        Part("original values", device, size * n, _AFTER),
    ]
    if size < 4:  # in float32 a parameter is its own master, and its gradient is in float32
        parts[:0] = [
            Part("float32 masters", device, 4 * n, train),
            Part("float32 gradients", device, 4 * n, train),
        ]
    return parts


def training_activations(
    shapes: ModelShapes, saved: Sequence[LayerActivations], setting: Setting, work: Workload
) -> float:
    """Returns the bytes that a micro-batch takes besides weights and logits.

    The first trained layer keeps what goes into it from the prefix and, above the cut, its
    activations; each layer above keeps all of them, the last one those of its MLP at scored
    positions only. Besides, one layer's worth is at work.
    """
    tokens = work.cells(setting.micro_batch_size)
    first = float(shapes.cuts[setting.cut] * setting.itemsize)
    if setting.cut != "matrix":
        part = saved[0]
        first += part.norms / 2 + part.mlp + (part.total - part.mlp) * (setting.cut == "layer")
    above = sum(one.total for one in saved[1:])
    if len(saved) > 1:
        above -= (1 - work.scored) * (saved[-1].mlp + saved[-1].norms / 2)
    at_work = max(one.total for one in saved)
    return tokens * (first + above + at_work)


def cross_entropy(shapes: ModelShapes, setting: Setting, work: Workload) -> float:
    """Returns the bytes of logits at work, in float32 and as multiplied, and of gradients."""
    scored = setting.micro_batch_size * work.targets
    chunk = min(scored * shapes.vocab, LOGITS_AT_ONCE)
    cast = setting.itemsize if setting.itemsize < 4 else 0
    return chunk * (4 + cast) + 2 * scored * shapes.hidden * setting.itemsize
