"""Which settings fit a machine, in order of preference, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from .activations import LayerActivations
from .given import Machine, Workload
from .layout import LAYOUTS, Setting, processes, share
from .memory import peak, standing_parts, working_parts
from .part import PLACES, Part
from .shapes import CUTS, ModelShapes
from .sizes import bytes_text

Activations = Callable[[str], Sequence[LayerActivations]]
Seconds = Callable[["Candidate"], float]

EDITS_PREFIX = "prefix of the edits"
PROMPTS_PREFIX = "prefix of the evaluation prompts"
_PREFIX = ("prefix", "train", "evaluate")
_ROUNDING = 1 + 1e-9
NAMES = {"gpu": "the GPU", "host": "the host", "disk": "the disk"}


@dataclass(frozen=True)
class Candidate:
    """A setting, and whether it fits.

    Attributes:
        setting: The setting; the micro-batch is the largest that fits, or 1.
        reason: Why it does not fit, or `None`.
        parts: Its memory by part.
        budgets: Bytes that the prefix may take, by place: of a GPU, of a node's host and disk.
        edits: Where the edits' prefix lies, in bytes of a GPU, and of a node's host and disk.
        prompts_kept: Whether there is room for the prefix of the evaluation prompts too; else all
            layers run in every measurement.
    """

    setting: Setting
    reason: str | None
    parts: tuple[Part, ...]
    budgets: dict[str, float]
    edits: dict[str, float]
    prompts_kept: bool

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """What to sort cuts by: one that fits, needs no disk (or else as little as can be)."""
        on_disk = self.edits.get("disk", 0.0) if self.reason is None else 0.0
        return self.reason is not None, on_disk > 0, on_disk


@dataclass(frozen=True)
class Wanted:
    """What the hyper-parameters leave open or decide; `None` leaves it open.

    Attributes:
        dtype: The precision.
        streamed: Whether frozen layers are streamed.
        cut: Where the prefix ends.
        model_parallel: Whether layers have to lie on several GPUs.
        whole: Whether each process has to hold all layers, neither streamed nor cut up.
    """

    dtype: str
    streamed: bool | None = None
    cut: str | None = None
    model_parallel: bool = False
    whole: bool = False


def candidates(
    shapes: ModelShapes,
    activations: Activations,
    work: Workload,
    machine: Machine,
    wanted: Wanted,
    seconds: Seconds,
) -> list[Candidate]:
    """Returns every setting, preferred ones first.

    The precision that was asked for comes before bfloat16, and a resident model before a streamed
    one. Of the cuts comes first the one that leaves least to run and needs no disk: to read states
    from a disk in every epoch costs more than the little that a wider cut saves.

    On several GPUs each holds a copy of what stays. Only where that does not fit are layers cut up
    or laid on several GPUs, and of these ways the quickest comes first.

    Args:
        shapes: The model's sizes.
        activations: What autograd keeps of each layer, by precision.
        work: The work.
        machine: The machine.
        wanted: What is decided already.
        seconds: How long a run takes.
    """
    dtypes = dict.fromkeys([wanted.dtype, *(["bfloat16"] if wanted.dtype == "float32" else [])])
    ways = [False, True] if wanted.streamed is None else [wanted.streamed]
    if wanted.whole:
        ways = [False]
    cuts = [c for c in CUTS if c in shapes.cuts and wanted.cut in (None, c)]
    saved = cache(activations)

    def group(dtype: str, streamed: bool, layout: str, n: int = 1) -> list[Candidate]:
        settings = [Setting(dtype, streamed, cut, work.batch_size, layout, n) for cut in cuts]
        tried = [_largest(shapes, saved, one, work, machine) for one in settings]
        return sorted(tried, key=lambda one: one.rank)

    found: list[Candidate] = []
    for dtype in dtypes:
        copies = []
        if not wanted.model_parallel:
            copies = [one for way in ways for one in group(dtype, way, "copies")]
        found += copies
        if machine.gpus == 1 or any(one.reason is None for one in copies):
            continue
        spread = []
        for layout in LAYOUTS[2 if wanted.model_parallel or wanted.whole else 1 :]:
            for way in ways:
                if layout == "fsdp" and not way and shapes.first_layer > 0:
                    continue  # what is below the place is not cut up, but streamed
                for n in _groups(machine.gpus, layout):
                    tried = group(dtype, way, layout, n)
                    if tried[0].reason is None or n == machine.gpus:
                        spread += tried
                        break  # the smaller the groups, the more of them work at once
        found += sorted(spread, key=lambda one: (one.reason is not None, seconds(one)))
    return found


def _groups(gpus: int, layout: str) -> list[int]:
    """Returns how many GPUs of a node may share the weights, fewest first."""
    sizes = range(2, gpus + 1) if layout == "model_parallel" else [gpus]
    return [n for n in sizes if gpus % n == 0]


def _largest(
    shapes: ModelShapes,
    activations: Activations,
    setting: Setting,
    work: Workload,
    machine: Machine,
) -> Candidate:
    """Returns the candidate with the largest micro-batch that fits."""
    most = share(setting, work, machine).most
    size = min(work.micro_batch_size or work.batch_size, work.batch_size, work.n, most)
    while True:
        sized = replace(setting, micro_batch_size=size)
        candidate = fit(shapes, activations(setting.dtype), sized, work, machine)
        # Smaller micro-batches make room on the device alone.
        if candidate.reason is None or size == 1:
            return candidate
        size //= 2


def fit(
    shapes: ModelShapes,
    saved: Sequence[LayerActivations],
    setting: Setting,
    work: Workload,
    machine: Machine,
) -> Candidate:
    """Returns whether a setting fits, with its memory by part.

    Args:
        shapes: The model's sizes.
        saved: What autograd keeps of each layer from the first trained one up.
        setting: The setting.
        work: The work.
        machine: The machine.
    """
    parts = standing_parts(shapes, setting, work, machine)
    standing = {place: peak(parts, place) for place in PLACES}
    parts += working_parts(shapes, saved, setting, work, machine)
    budgets = _budgets(parts, standing, machine)
    size = setting.itemsize
    # Of a node: its GPUs' states lie on as many GPUs as it has processes.
    edits = work.edit_tokens * shapes.cuts[setting.cut] * size / machine.nodes
    prompts = work.eval_tokens * shapes.hidden * size / machine.nodes
    there = processes(setting, machine)
    left = {place: n * (there if place == "gpu" else 1) for place, n in budgets.items()}
    room = sum(left.values())
    placed = _place(edits, left, there)
    kept = prompts <= sum(left.values()) * _ROUNDING
    parts += [Part(EDITS_PREFIX, p, n, _PREFIX) for p, n in placed.items()]
    if kept:
        placed_too = _place(prompts, left, there)
        parts += [Part(PROMPTS_PREFIX, p, n, _PREFIX) for p, n in placed_too.items()]
    reason = _too_small(parts, machine)
    # Without its prefix an evaluation runs all layers, which a streamed model does not have.
    needed = edits + (prompts if setting.streamed else 0)
    if reason is None and needed > room * _ROUNDING:
        texts = ", ".join(f"{bytes_text(n)} on {NAMES[p]}" for p, n in budgets.items())
        of = "" if machine.world == 1 else " of a node"
        reason = f"the prefix{of} takes {bytes_text(needed)}; its budgets are {texts}"
    return Candidate(setting, reason, tuple(parts), budgets, placed, kept)


def _budgets(
    parts: Sequence[Part], standing: dict[str, float], machine: Machine
) -> dict[str, float]:
    """Returns what the prefix may take in each place: what was asked for, or a share."""
    shares = {"gpu": 0.25, "host": 0.5, "disk": 1.0}
    asked = {
        "gpu": machine.prefix_gpu,
        "host": machine.prefix_host,
        "disk": machine.prefix_disk,
    }
    budgets: dict[str, float] = {}
    for place, part in shares.items():
        if place == "gpu" and machine.gpu is None:
            continue
        given = asked[place]
        room = machine.room(place)
        free = max(0.0, room - peak(parts, place))
        automatic = min(part * max(0.0, room - standing[place]), free)
        budgets[place] = automatic if given is None else given
    return budgets


def _place(n: float, left: dict[str, float], gpus: int) -> dict[str, float]:
    """Fills a node's places in order with `n` bytes, and takes that off what is `left`.

    Returns the bytes by place: for the GPUs those of one of them.
    """
    placed = {}
    for place in left:
        here = min(n, left[place])
        if here > 0:
            placed[place] = here / (gpus if place == "gpu" else 1)
        left[place] -= here
        n -= here
    return placed


def _too_small(parts: Sequence[Part], machine: Machine) -> str | None:
    """Returns which place is too small, with the parts that fill it."""
    for place in PLACES:
        needed, there = peak(parts, place), machine.room(place)
        if needed > there * _ROUNDING:
            here = sorted((p for p in parts if p.place == place), key=lambda p: -p.bytes)
            largest = ", ".join(f"{p.name} {bytes_text(p.bytes)}" for p in here[:2])
            return f"{NAMES[place]} needs {bytes_text(needed)} of {bytes_text(there)} ({largest})"
    return None
