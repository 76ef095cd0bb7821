"""Memory by part, place and phase, for one choice of settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..cross_entropy import LOGITS_AT_ONCE
from ..hparams_rules import DTYPES
from .activations import LayerActivations
from .given import Machine, Workload
from .layout import Setting, processes, ranks, resident
from .part import AFTER, LATER, PHASES, Part
from .preserved import preparing_parts
from .shapes import ModelShapes
from .sizes import GIB, MIB
from .trained import change_parts, training_parts

# What is there before any tensor: a CUDA context with its kernels, and Python with its libraries
# (375 MiB after the imports and 20 more of their code when a model is loaded; a process with a CUDA
# context maps a few more).
_CUDA_CONTEXT = GIB // 2
_PROCESS = 395 * MIB
_PROCESS_WITH_CUDA = 2 * GIB
# Of a tokenizer stays so much a token (measured with vocabularies of 49,152 and 128,256).
_BYTES_A_TOKEN = 950
# A request with its strings, and its tokens.
_BYTES_A_REQUEST = 4096
# A rewording with its tokens (335 to 430 measured), and what making it takes besides for a while.
_BYTES_A_REWORDING, _BYTES_IN_MAKING = 430, 2800
# What NCCL takes of each GPU for its channels, about (not measured).
_NCCL = GIB // 2
# A layer that runs, the next one, and what it is gathered in.
_GATHERED = 3
# On a CPU the C library keeps freed blocks for later, and not all of them fit again. It grows over
# the first steps to half of the activations (0.2 to 0.65 measured with glibc). Blocks above
# glibc's largest threshold go back to the system.
_HELD_FREE = 0.5
_GOES_BACK = 32 * MIB
# On a CPU in half precision oneDNN compiles a kernel for every shape of a matrix product and keeps
# the last 1,024. 170 for texts and small batches took 60 MiB; those for some hundred tokens take
# 630 to 770 KiB each. A pass needs about five (query and output, key and value, gate and up, down,
# head), and passes differ in their number of tokens. In training the last layer's at scored
# positions differ with every mini-batch: output, gate and up, down and head, forward and backward.
_KERNEL, _LARGE_KERNEL = 350 * 1024, 650 * 1024
_KERNELS_KEPT = 1024
_KERNELS_A_PASS, _KERNELS_A_STEP = 5, 8
_PASSES = 8  # the probes, and batches of several sizes


def peak(parts: Sequence[Part], place: str) -> float:
    """Returns the most that a place holds at one time, in bytes."""
    return max(
        sum(p.bytes for p in parts if p.place == place and phase in p.phases) for phase in PHASES
    )


def standing_parts(
    shapes: ModelShapes, setting: Setting, work: Workload, machine: Machine
) -> list[Part]:
    """Returns what is there all the time (the prefix aside): processes, model, requests.

    Of several GPUs and processes: what is on the fullest GPU, and what all of a node's processes
    have on their host. Each of them knows all requests.
    """
    size, device = setting.itemsize, machine.device
    kept = shapes.upper if setting.streamed else shapes.parameters
    stored = DTYPES[shapes.stored_dtype].itemsize
    there = processes(setting, machine)
    # On a CPU weights in the checkpoint's precision are mapped, and arrive when they are used.
    mapped = device == "host" and stored == size
    on_device = resident(shapes, setting) * size
    parts = [Part("weights", device, on_device, LATER if mapped else PHASES)]
    if stored != size and not setting.streamed:
        name = "checkpoint, mapped while it is converted"
        parts.append(Part(name, "host", kept * stored, ("load",)))
    parts.append(Part("tokenizer", "host", there * shapes.vocab * _BYTES_A_TOKEN))
    parts.append(Part("requests and tokens", "host", there * work.n * _BYTES_A_REQUEST))
    if work.rewordings:
        made = there * work.n * (work.recorded_texts - 1)
        parts.append(Part("rewordings", "host", made * _BYTES_A_REWORDING, LATER))
    parts += change_parts(shapes, setting, device)
    if machine.gpu is None:
        return [Part("Python and libraries", "host", _PROCESS), *parts]
    parts.append(Part("CUDA context", "gpu", _CUDA_CONTEXT))
    if ranks(setting, machine) > 1:
        parts.append(Part("NCCL's buffers", "gpu", _NCCL))
    if setting.layout == "fsdp":
        layer = max(one.parameters for one in shapes.layers[shapes.first_layer :])
        parts.append(Part("gathered layers", "gpu", _GATHERED * layer * size, AFTER))
    if not setting.streamed:
        # What is mapped the processes of a node share; what is converted each has for itself.
        on_way = kept * size * (1 if stored == size else there)
        parts.append(Part("weights on their way to the GPU", "host", on_way, ("load",)))
    return [Part("Python and libraries", "host", there * _PROCESS_WITH_CUDA), *parts]


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
    passed = work.cells(min(work.eval_batch_size, work.n * work.recorded_texts))
    scored = min(work.eval_batch_size, work.n) * work.targets
    activations = training_activations(shapes, saved, setting, work)
    parts = [
        *training_parts(shapes, setting, work, device),
        *preparing_parts(shapes, widest, setting, work, machine),
        Part("activations", device, activations, ("train",)),
        # Its buffer stays as long as the session does.
        Part("cross-entropy", device, cross_entropy(shapes, setting, work), AFTER),
        Part("activations without gradients", device, passed * widest, ("prefix", "evaluate")),
    ]
    logits = scored * shapes.vocab * (size + 4) if work.evaluate else 0.0
    parts.append(Part("logits of evaluation", device, logits, ("evaluate",)))
    if device == "host":
        freed = returned_to_c(shapes, saved, setting, work)
        # After training all of it is free, and evaluation takes its blocks from there.
        left = max(_HELD_FREE * freed, (1 + _HELD_FREE) * freed - passed * widest - logits)
        for held, phase in ((_HELD_FREE * freed, "train"), (left, "evaluate")):
            parts.append(Part("kept by the C library", device, held, (phase,)))
        parts += _kernels(setting, work, device)
    if work.rewordings:
        made = processes(setting, machine) * work.n * (work.recorded_texts - 1)
        name = "rewordings while they are made"
        parts.append(Part(name, "host", made * _BYTES_IN_MAKING, ("prefix",)))
    if setting.streamed:
        below = shapes.layers[: shapes.first_layer]
        layer = max((one.parameters for one in below), default=0)
        buffers = 2 * max(layer, shapes.embedding) * size
        for place in dict.fromkeys((device, "host")):
            n = processes(setting, machine) if place == "host" else 1
            name = "buffers of streamed layers"
            parts.append(Part(name, place, n * buffers, ("prefix", "evaluate")))
    return parts


def _kernels(setting: Setting, work: Workload, device: str) -> list[Part]:
    """Returns what a CPU compiles for the half precisions."""
    if setting.itemsize == 4:
        return []
    batches = _PASSES * _KERNELS_A_PASS
    # Evaluation runs texts alone where two answers are close: each length is a shape of its own,
    # and texts have up to about twice the mean length.
    lengths = 2 * work.run_tokens * _KERNELS_A_PASS if work.evaluate else 0.0
    alone = min(lengths, _KERNELS_KEPT - batches)
    # Four standard deviations of the scored tokens, an edit's being half their mean.
    in_one = setting.micro_batch_size
    n_parts = math.ceil(work.n / in_one)
    numbers = min(work.epochs * n_parts, 2 * work.targets * in_one**0.5) if n_parts > 1 else 1.0
    steps = min(numbers * _KERNELS_A_STEP, _KERNELS_KEPT - batches - alone)
    return [
        Part("kernels for batches", device, batches * _KERNEL, LATER),
        Part("kernels for texts run alone", device, alone * _KERNEL, AFTER),
        Part("kernels for mini-batches", device, steps * _LARGE_KERNEL, AFTER),
    ]


def training_activations(
    shapes: ModelShapes, saved: Sequence[LayerActivations], setting: Setting, work: Workload
) -> float:
    """Returns the bytes that a micro-batch takes besides weights and logits.

    Most is there when the backward pass begins: the first trained layer keeps what goes into it
    from the prefix and, above the cut, its activations; each layer above keeps all of them, the
    last one those of its MLP at scored positions only. At work is besides whatever takes more: the
    gradients in the last layer's MLP, or in its attention, when the MLP's activations are gone.
    """
    tokens = work.step_cells(setting.micro_batch_size)
    size = setting.itemsize
    first = float(shapes.cuts[setting.cut] * size)
    if setting.cut != "matrix":
        part = saved[0]
        alone = len(saved) == 1 and setting.cut == "mlp"  # then nothing but scored positions runs
        kept = part.norms / 2 + part.mlp + (part.total - part.mlp) * (setting.cut == "layer")
        first += kept * (work.step_scored if alone else 1)
    above = sum(one.total for one in saved[1:])
    if len(saved) > 1:
        above -= (1 - work.step_scored) * (saved[-1].mlp + saved[-1].norms / 2)
    last = saved[-1]
    in_mlp = work.step_scored * last.mlp
    in_attention = last.attention + shapes.hidden * size - in_mlp
    above_attention = len(saved) == 1 and setting.cut != "layer"
    at_work = in_mlp if above_attention else max(in_mlp, in_attention)
    return tokens * (first + above + at_work)


def returned_to_c(
    shapes: ModelShapes, saved: Sequence[LayerActivations], setting: Setting, work: Workload
) -> float:
    """Returns the bytes of activations in blocks that the C library keeps when they are freed."""
    tokens = work.step_cells(setting.micro_batch_size)
    activations = training_activations(shapes, saved, setting, work)
    large = 0.0
    for one in saved[1:]:
        # Norms keep their inputs; attention four such tensors; a gated MLP three.
        for kept, n_tensors in ((one.norms, 2), (one.attention, 4), (one.mlp, 3)):
            large += tokens * kept * (tokens * kept / n_tensors > _GOES_BACK)
    return max(0.0, activations - large)


def cross_entropy(shapes: ModelShapes, setting: Setting, work: Workload) -> float:
    """Returns the bytes of logits at work, in float32 and as multiplied, and of gradients."""
    scored = setting.micro_batch_size * work.texts * work.targets
    chunk = min(scored * shapes.vocab, LOGITS_AT_ONCE)
    cast = setting.itemsize if setting.itemsize < 4 else 0
    return chunk * (4 + cast) + 2 * scored * shapes.hidden * setting.itemsize
