"""What the figures of a plan rest on, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from . import given
from .given import Machine, Workload
from .make import Plan


def assumptions(plan: Plan) -> list[str]:
    """Returns what the figures rest on, one sentence each."""
    work, machine = plan.work, plan.machine
    dtype = plan.chosen.setting.dtype if plan.chosen else plan.dtype
    rate = machine.flops(dtype) / 1e12
    said = "as given" if machine.rate else "assumed; rate= says what is reached"
    lines = [
        f"{rate:g} TFLOP/s are reached in {dtype} ({said}).",
        f"The disk reads and writes {_stated(machine, 'read')}, while something is computed.",
        f"An edit has {work.tokens:g} tokens, {work.targets:g} of them targets; the last one runs "
        "nowhere.",
        f"All {work.epochs} epochs are run; training often stops earlier.",
        "Rows are packed, and all edits are about as long as the mean.",
        "Copies between the host and the GPU take no time beside the rest.",
    ]
    if work.rewordings:
        lines.append(_of_rewordings(work))
    if plan.shapes.confined is not None:
        lines.append(_of_preserve(plan.shapes.confined.preserve))
    if machine.gpu is not None:
        lines.append(
            f"A GPU's memory moves {_stated(machine, 'bandwidth')}; Python starts the kernels of a "
            f"layer, forward and backward, in {_stated(machine, 'launch', 'ms')}."
        )
    if machine.world > 1:
        lines += _between(machine)
    if work.evaluate:
        lines.append(
            "Evaluation is teacher-forced: rewrite, rephrase, one locality and one portability "
            "prompt an edit. Generated answers come on top."
        )
    return lines


def _of_rewordings(work: Workload) -> str:
    """Returns what is assumed of rewordings."""
    return (
        f"{work.recorded_texts - 1} rewordings of each edit are trained, {work.longer:g} tokens "
        f"longer than it, and recorded with it; an epoch trains {work.rewordings} of them beside "
        "it."
    )


def _of_preserve(names: Sequence[str]) -> str:
    """Returns what is left out of what `preserve` takes."""
    return (
        f"The time of sampling and measuring for `preserve` ({', '.join(names)}) is left out, as "
        "is the memory of sampling and of prompts' keys: of the model's own text and of text files "
        "it is done once per model and place."
    )


def _between(machine: Machine) -> list[str]:
    """Returns what is assumed of several GPUs."""
    network = f", the network of a node {_stated(machine, 'network')} each way"
    return [
        f"{machine.gpus} GPUs a node, {machine.nodes} node{'s' * (machine.nodes > 1)}: memory and "
        "disk are those of each GPU and of each node.",
        f"Rings between GPUs carry {_stated(machine, 'nvlink')}"
        f"{network if machine.nodes > 1 else ''}; that a message takes its time to start is left "
        "out.",
        "Each edit belongs to one GPU, and a step waits for the one with most of the mini-batch "
        "(computed from chance, not guessed). Every GPU makes Adam's whole step.",
        "A node reads the checkpoint once, not once a GPU. Prefix and evaluation are dealt out "
        "evenly.",
    ]


def _stated(machine: Machine, field: str, unit: str = "GB/s") -> str:
    """Returns a rate, and whether somebody has given it."""
    value = getattr(machine, field)
    assumed = value == getattr(given, f"ASSUMED_{field.upper()}")
    return f"{value:,g} {unit}" + (f" (assumed unless {field}= says it)" if assumed else "")
