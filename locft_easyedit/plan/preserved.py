"""Memory that is needed while it is measured what a confined change preserves.

Second moments of what enters each matrix are summed where the matrix is, and kept on the host in
float32, a square of the input's width for each source. Then one matrix after the other gets its
filter, from an eigendecomposition in float64 where the matrix is.
"""

from __future__ import annotations

from ..augment.wordings import MOST
from ..hparams_rules import NEIGHBOURS, SAMPLED
from ..key_moments import BATCH_TOKENS, WIDEST_FLOAT64
from ..preserve.prepare import EDITS_AT_ONCE
from ..preserve.sources import PROMPTS
from .confined import ConfinedShapes
from .given import Machine, Workload
from .layout import Setting, processes
from .part import Part
from .shapes import ModelShapes
from .trained import change_parts

# Bytes a number of S at work: the identity, the matrix to decompose, its eigenvectors and what
# LAPACK works with, all in float64 (48 measured with widths of 1,000 and 1,500). A GPU's solver is
# taken to need as much. Exact keys alone need no eigendecomposition, but three products.
_DECOMPOSED, _PROJECTED = 48, 24


def preparing_parts(
    shapes: ModelShapes, widest: float, setting: Setting, work: Workload, machine: Machine
) -> list[Part]:
    """Returns what preparing a confined change takes beyond what then stays of it.

    The prefix is recorded afterwards. Sampling, and keys of prompts that are kept exactly, are not
    in it: how many these are is known when they are there.

    Args:
        shapes: The model's sizes.
        widest: What autograd would keep of a layer, bytes a token.
        setting: The choice.
        work: The work.
        machine: The machine.
    """
    confined = shapes.confined
    if confined is None:
        return []
    device, name = machine.device, "measuring what is preserved"
    n_moments = len(_measured(confined, work))
    summing = _summing(confined, widest, setting) if n_moments else 0.0
    filtering, on_host = _filtering(confined, n_moments), _statistics(confined, work)
    if device == "host":
        # The last source's sums come on top of all that was measured before.
        kept = 4.0 * confined.squares
        at_work = max(on_host, (n_moments - 1) * kept + summing, n_moments * kept + filtering)
    else:  # to each matrix its own moments are brought
        at_work = max(summing, filtering + 4 * n_moments * _largest(confined))
    stays = sum(part.bytes for part in change_parts(shapes, setting, device))
    parts = [Part(name, device, max(0.0, at_work - stays), ("prefix",))]
    if device == "gpu":
        parts.append(Part(name, "host", processes(setting, machine) * on_host, ("prefix",)))
    return parts


def _summing(confined: ConfinedShapes, widest: float, setting: Setting) -> float:
    """Returns what summing products over texts takes: sums, a batch that runs, its product."""
    sums = sum(
        (8 if width <= WIDEST_FLOAT64 else 4) * width**2 for width in confined.inputs.values()
    )
    if NEIGHBOURS in confined.kinds:  # of their ends, and of what leads up to these
        sums *= 2
    cast = setting.itemsize if setting.itemsize < 4 else 0  # keys as they are, and in float32
    keys = max(confined.inputs.values()) * (4 + cast)
    return sums + 4 * _largest(confined) + BATCH_TOKENS * (widest + keys)


def _filtering(confined: ConfinedShapes, n_moments: int) -> float:
    """Returns what the filter of the largest matrix takes, with those of the others."""
    largest = _largest(confined)
    at_work = (4 + _DECOMPOSED if n_moments else _PROJECTED) * largest
    return at_work + 4 * (confined.squares - largest)


def _statistics(confined: ConfinedShapes, work: Workload) -> float:
    """Returns the most that second moments take of the host, source after source."""
    one, largest = 4 * confined.squares, 4 * _largest(confined)
    held = most = 0.0
    for kind in _measured(confined, work):
        if kind == "rewordings" or (kind == "context" and not work.rewordings):
            texts = min(work.n, EDITS_AT_ONCE) * (1 + MOST if work.rewordings else 1)
            keys = 4 * texts * work.targets * sum(confined.inputs.values())
            most = max(most, held + 3 * keys + one + largest)  # and their means, and less these
        elif kind in (NEIGHBOURS, "context"):
            most = max(most, held + one)
        else:
            # Sampled text is of two kinds; the mean of both is taken for one matrix at a time.
            n_parts = 2 if kind == SAMPLED else 1
            most = max(most, held + (n_parts + 1) * one + n_parts * largest)
        held += one
    return max(most, held)


def _measured(confined: ConfinedShapes, work: Workload) -> list[str]:
    """Returns what has second moments of its own, in the order of the measuring."""
    found = []
    for kind in confined.kinds:
        if kind != PROMPTS:
            found += [kind, "asked"] if kind == SAMPLED else [kind]
    near = NEIGHBOURS in found
    if found and work.rewordings:
        found.append("rewordings")
    return [*found, "context"] if near else found


def _largest(confined: ConfinedShapes) -> int:
    return int(max(confined.inputs.values())) ** 2
