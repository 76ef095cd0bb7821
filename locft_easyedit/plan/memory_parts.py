"""Memory of a run by part, place and phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.batching import sequences_a_pass
from ..hparams import torch_dtype
from ..modeling.cross_entropy import LOGITS_AT_ONCE
from .activations import LayerActivations
from .setting import Run
from .units import GIB, MIB

PHASES = ("load", "prefix", "train", "evaluate")
PLACES = ("gpu", "host", "disk")

AFTER = ("train", "evaluate")
LATER = ("prefix", *AFTER)

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
# A text in another form with its tokens (335 to 430 measured of short ones), and what making it
# takes besides for a while.
_BYTES_A_FORM, _BYTES_IN_MAKING = 430, 2800
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


def standing_parts(run: Run) -> list[Part]:
    """Returns what is there all the time (change and prefix aside): processes, model, requests.

    Of several GPUs and processes: what is on the fullest GPU, and what all of a node's processes
    have on their host. Each of them knows all requests.
    """
    shapes, setting, work, device = run.shapes, run.setting, run.work, run.machine.device
    size, stored = setting.itemsize, torch_dtype(shapes.stored_dtype).itemsize
    n = run.processes
    # On a CPU weights in the checkpoint's precision are mapped, and arrive when they are used.
    mapped = device == "host" and stored == size
    python = _PROCESS if device == "host" else _PROCESS_WITH_CUDA
    parts = [
        Part("Python and libraries", "host", n * python),
        Part("weights", device, run.resident * size, LATER if mapped else PHASES),
    ]
    if stored != size and not setting.streamed:
        name = "checkpoint, mapped while it is converted"
        parts.append(Part(name, "host", run.kept * stored, ("load",)))
    parts += [
        Part("tokenizer", "host", n * shapes.vocab * _BYTES_A_TOKEN),
        Part("requests and tokens", "host", n * work.n * _BYTES_A_REQUEST),
    ]
    if work.forms:
        parts.append(Part("other forms", "host", _others(run) * _BYTES_A_FORM, LATER))
    if device == "host":
        return parts
    parts.append(Part("CUDA context", "gpu", _CUDA_CONTEXT))
    if run.ranks > 1:
        parts.append(Part("NCCL's buffers", "gpu", _NCCL))
    if setting.layout == "fsdp":
        layer = max(one.parameters for one in (shapes.first, *shapes.above))
        parts.append(Part("gathered layers", "gpu", _GATHERED * layer * size, AFTER))
    if not setting.streamed:
        # What is mapped the processes of a node share; what is converted each has for itself.
        on_way = run.kept * size * (1 if stored == size else n)
        parts.append(Part("weights on their way to the GPU", "host", on_way, ("load",)))
    return parts


def working_parts(run: Run, saved: Sequence[LayerActivations]) -> list[Part]:
    """Returns what comes and goes: activations, logits, buffers of streamed layers.

    `saved` is what autograd keeps of each layer from the first trained one up.
    """
    shapes, setting, work, device = run.shapes, run.setting, run.work, run.machine.device
    at_once = work.eval_batch_size
    if device == "gpu":
        at_once = max(at_once, sequences_a_pass(work.run_tokens))
    n_texts = min(at_once, work.n * work.recorded_texts)
    passing = work.cells(n_texts * work.run_tokens) * max(one.total for one in saved)
    scored = min(work.eval_batch_size, work.n) * work.targets if work.evaluate else 0.0
    logits = scored * shapes.vocab * (setting.itemsize + 4)
    parts = [
        Part("activations", device, training_activations(run, saved), ("train",)),
        # Its buffer stays as long as the session does.
        Part("cross-entropy", device, cross_entropy(run), AFTER),
        Part("activations without gradients", device, passing, ("prefix", "evaluate")),
        Part("logits of evaluation", device, logits, ("evaluate",)),
    ]
    if device == "host":
        freed = _returned_to_c(run, saved)
        # After training all of it is free, and evaluation takes its blocks from there.
        left = max(_HELD_FREE * freed, (1 + _HELD_FREE) * freed - passing - logits)
        for held, phase in ((_HELD_FREE * freed, "train"), (left, "evaluate")):
            parts.append(Part("kept by the C library", device, held, (phase,)))
        parts += _kernels(run)
    if work.forms:
        made = _others(run) * _BYTES_IN_MAKING
        parts.append(Part("other forms while they are made", "host", made, ("prefix",)))
    if setting.streamed:
        below = shapes.layers[: shapes.first_layer]
        layer = max((one.parameters for one in below), default=0)
        buffers = 2 * max(layer, shapes.embedding) * setting.itemsize
        for place, n in {device: 1, "host": run.processes}.items():
            name = "buffers of streamed layers"
            parts.append(Part(name, place, n * buffers, ("prefix", "evaluate")))
    return parts


def _others(run: Run) -> int:
    """Returns how many texts in other forms the processes of a node hold."""
    return run.processes * run.work.n * (run.work.recorded_texts - 1)


def _kernels(run: Run) -> list[Part]:
    """Returns what a CPU compiles for the half precisions."""
    if run.setting.itemsize == 4:
        return []
    work, in_one = run.work, run.setting.micro_batch_size
    batches = _PASSES * _KERNELS_A_PASS
    # Evaluation runs texts in fixed shapes, one for each eight tokens of length, and texts have up
    # to about twice the mean length. Answers that are generated make one for each token more.
    shapes = 2 * work.run_tokens / 8 + 32 if work.evaluate else 0.0
    fixed = min(shapes * _KERNELS_A_PASS, _KERNELS_KEPT - batches)
    # Four standard deviations of the scored tokens, an edit's being half their mean.
    n_parts = math.ceil(work.n / in_one)
    numbers = min(work.epochs * n_parts, 2 * work.targets * in_one**0.5) if n_parts > 1 else 1.0
    steps = min(numbers * _KERNELS_A_STEP, _KERNELS_KEPT - batches - fixed)
    return [
        Part("kernels for batches", "host", batches * _KERNEL, LATER),
        Part("kernels for fixed shapes", "host", fixed * _KERNEL, AFTER),
        Part("kernels for mini-batches", "host", steps * _LARGE_KERNEL, AFTER),
    ]


def training_activations(run: Run, saved: Sequence[LayerActivations]) -> float:
    """Returns the bytes that a micro-batch takes besides weights and logits.

    Most is there when the backward pass begins: the first trained layer keeps what goes into it
    from the prefix and, above the cut, its activations; each layer above keeps all of them, the
    last one those of its MLP at scored positions only. At work is besides whatever takes more: the
    gradients in the last layer's MLP, or in its attention, when the MLP's activations are gone.
    """
    cut, size, scored = run.setting.cut, run.setting.itemsize, run.work.step_scored
    only_scored = len(saved) == 1 and cut != "layer"  # then no position sees another one
    first, last = saved[0], saved[-1]
    kept = float(run.shapes.cuts[cut] * size)
    if cut != "matrix":
        in_layer = first.norms / 2 + first.mlp + (first.total - first.mlp) * (cut == "layer")
        kept += in_layer * (scored if only_scored else 1)
    kept += sum(one.total for one in saved[1:])
    if len(saved) > 1:
        kept -= (1 - scored) * (last.mlp + last.norms / 2)
    in_mlp = scored * last.mlp
    in_attention = last.attention + run.shapes.hidden * size - in_mlp
    return run.cells * (kept + (in_mlp if only_scored else max(in_mlp, in_attention)))


def _returned_to_c(run: Run, saved: Sequence[LayerActivations]) -> float:
    """Returns the bytes of activations in blocks that the C library keeps when they are freed."""
    large = 0.0
    for one in saved[1:]:
        # Norms keep their inputs; attention four such tensors; a gated MLP three.
        for kept, n_tensors in ((one.norms, 2), (one.attention, 4), (one.mlp, 3)):
            large += run.cells * kept * (run.cells * kept / n_tensors > _GOES_BACK)
    return max(0.0, training_activations(run, saved) - large)


def cross_entropy(run: Run) -> float:
    """Returns the bytes of logits at work, in float32 and as multiplied, and of gradients."""
    shapes, work, size = run.shapes, run.work, run.setting.itemsize
    scored = run.setting.micro_batch_size * work.texts * work.targets
    chunk = min(scored * shapes.vocab, LOGITS_AT_ONCE)
    return chunk * (4 + (size if size < 4 else 0)) + 2 * scored * shapes.hidden * size
