"""Memory of what is trained: the matrices themselves, LoRA of them, or a confined change.

Before a confined change is trained it is measured what to preserve. Second moments of what enters
each matrix are summed where the matrix is, and kept on the host in float32, a square of the input's
width for each source. Gradients of its outputs over a part of the text make one of the output's
width. Then one matrix after the other gets its filters, from eigendecompositions in float64 where
the matrix is.
"""

from __future__ import annotations

from ..hparams_rules import NEIGHBOURS, SAMPLED
from ..training.preserve.filters import EDITS_AT_ONCE
from ..training.preserve.input_moments import BATCH_TOKENS, WIDEST_FLOAT64
from ..training.preserve.output_gradients import GRADIENT_BATCH_TOKENS
from ..training.preserve.sources import PROMPTS
from .memory_parts import AFTER, LATER, Part
from .setting import Run
from .shapes import ConfinedShapes
from .workload import Workload

# Bytes a number of S at work: the identity, the matrix to decompose, its eigenvectors and what
# LAPACK works with, all in float64 (48 measured with widths of 1,000 and 1,500). A GPU's solver is
# taken to need as much. Exact keys alone need no eigendecomposition, but three products.
_DECOMPOSED, _PROJECTED = 48, 24


def change_parts(run: Run) -> list[Part]:
    """Returns what a confined change takes from its making, before the prefix, to the end."""
    confined, n, size = run.shapes.confined, run.shapes.n_trained, run.setting.itemsize
    if confined is None:
        return []
    sizes = {
        "filters of inputs": 4 * confined.squares,
        "filters of outputs": 4 * confined.output_squares,
        "the change's matrices": size * n,
        "their values at the beginning": size * n,
        "original values": size * n,
    }
    if size < 4:  # in float32 the filter is what runs, and a matrix its own master
        sizes["filters as they run"] = size * (confined.squares + confined.output_squares)
        sizes["float32 masters"] = 4 * n
    return [Part(name, run.machine.device, n_bytes, LATER) for name, n_bytes in sizes.items()]


def training_parts(run: Run) -> list[Part]:
    """Returns what training adds to the model and to `change_parts`."""
    shapes, size, device = run.shapes, run.setting.itemsize, run.machine.device
    lora, confined, n = shapes.lora, shapes.confined, shapes.optimized
    sizes: dict[str, float] = {}
    if lora:  # in float32 in every case
        sizes |= {"LoRA's matrices": 4 * n, "their values at the beginning": 4 * n}
    # In float32 a parameter is its own master, and its gradient is in float32. Of LoRA both are
    # apart in float16 alone, whose loss is scaled.
    if run.setting.dtype == "float16" if lora else size < 4:
        if confined is None:
            sizes["float32 masters"] = 4 * n
        sizes["float32 gradients"] = 4 * n
    sizes |= {"Adam's moments": 8 * n, "gradients": (4 if lora else size) * n}
    if shapes.fused:
        sizes["gradients of all experts"] = size * shapes.fused
    if lora and size < 4:
        sizes["LoRA's inputs in float32"] = 4 * run.cells * lora.inputs
    if confined:
        inputs = sum(confined.inputs.values())
        if run.folds:  # what is recorded of the first one has passed its filter
            inputs -= shapes.cuts["matrix"] - shapes.hidden
        sizes["inputs that the filters have passed"] = size * run.cells * inputs
    parts = [Part(name, device, n_bytes, ("train",)) for name, n_bytes in sizes.items()]
    if confined is None:
        parts.append(Part("original values", device, size * shapes.n_trained, AFTER))
    if size < 4 and (lora or confined):
        # When the last step's tensors are gone.
        name = f"a matrix in float32, to add {'LoRA' if lora else 'the change'} to"
        largest = 4 * max(shapes.trained.values())
        parts.append(Part(name, device, largest, ("evaluate",)))
    return parts


def preparing_parts(run: Run, widest: float, n_above: int) -> list[Part]:
    """Returns what preparing a confined change takes beyond what then stays of it.

    The prefix is recorded afterwards. Sampling, and keys of prompts that are kept exactly, are not
    in it: how many these are is known when they are there. `widest` is what autograd would keep of
    a layer, in bytes a token; `n_above` layers are run back for gradients of the outputs.
    """
    confined = run.shapes.confined
    if confined is None:
        return []
    device, name = run.machine.device, "measuring what is preserved"
    measured = _measured(confined, run.work)
    n_moments, largest = len(measured), 4 * confined.largest_square
    summing = _summing(confined, widest, run.setting.itemsize) if measured else 0.0
    if confined.output_squares:
        # Logits in the model's precision, and three times in float32: with their gradients.
        a_token = n_above * widest + run.shapes.vocab * (12 + run.setting.itemsize)
        # Sums in float64, and a product.
        differentiating = GRADIENT_BATCH_TOKENS * a_token + 12 * confined.output_squares
        summing = max(summing, differentiating)
    # The filter of the largest matrix, with those of the others.
    filtering = (4 + _DECOMPOSED if measured else _PROJECTED) * confined.largest_square
    filtering += 4 * confined.squares - largest
    # Those of outputs come after all of inputs.
    of_outputs = 4.0 * (confined.squares + confined.output_squares)
    of_outputs += _DECOMPOSED * max(confined.outputs.values(), default=0) ** 2
    on_host = _statistics(confined, measured, run.work)
    if device == "host":
        # The last source's sums come on top of all that was measured before.
        kept = 4.0 * confined.squares
        last = n_moments * kept + max(filtering, of_outputs)
        at_work = max(on_host, (n_moments - 1) * kept + summing, last)
    else:  # to each matrix its own moments are brought
        at_work = max(summing, filtering + n_moments * largest, of_outputs)
    stays = sum(part.bytes for part in change_parts(run))
    parts = [Part(name, device, max(0.0, at_work - stays), ("prefix",))]
    if device == "gpu":
        parts.append(Part(name, "host", run.processes * on_host, ("prefix",)))
    return parts


def _measured(confined: ConfinedShapes, work: Workload) -> list[str]:
    """Returns what has second moments of its own, in the order of the measuring."""
    found = []
    for kind in confined.kinds:
        if kind != PROMPTS:
            chat = ["chat"] if work.forms else []
            found += [kind, *chat, "asked"] if kind == SAMPLED else [kind]
    return [*found, "context"] if NEIGHBOURS in found else found


def _summing(confined: ConfinedShapes, widest: float, itemsize: int) -> float:
    """Returns what summing products over texts takes: sums, a batch that runs, its product."""
    sums = sum(
        (8 if width <= WIDEST_FLOAT64 else 4) * width**2 for width in confined.inputs.values()
    )
    if NEIGHBOURS in confined.kinds:  # of their ends, and of what leads up to these
        sums *= 2
    cast = itemsize if itemsize < 4 else 0  # keys as they are, and in float32
    keys = max(confined.inputs.values()) * (4 + cast)
    return sums + 4 * confined.largest_square + BATCH_TOKENS * (widest + keys)


def _statistics(confined: ConfinedShapes, measured: list[str], work: Workload) -> float:
    """Returns the most that second moments take of the host, source after source."""
    one, largest = 4 * confined.squares, 4 * confined.largest_square
    held = most = 0.0
    for kind in measured:
        if kind == "context":
            texts = min(work.n, EDITS_AT_ONCE) * (1 + work.forms)
            at_work = one + 4 * texts * work.targets * sum(confined.inputs.values())
        elif kind == NEIGHBOURS:
            at_work = one
        else:
            # Sampled text is of two kinds; the mean of both is taken for one matrix at a time.
            n_parts = 2 if kind == SAMPLED else 1
            at_work = (n_parts + 1) * one + n_parts * largest
        most = max(most, held + at_work)
        held += one
    return max(most, held)
