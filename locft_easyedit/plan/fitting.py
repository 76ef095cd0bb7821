"""Which settings fit a machine, in order of preference, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..hparams import LocFTBFHyperParams
from ..hparams_rules import CUTS
from .activations import LayerActivations
from .change_memory import change_parts, preparing_parts, training_parts
from .cost import EDITS_PREFIX, PROMPTS_PREFIX, phases
from .memory_parts import LATER, PLACES, Part, peak, standing_parts, working_parts
from .setting import LAYOUTS, Run, Setting
from .shapes import ModelShapes
from .units import bytes_text
from .workload import Machine, Workload

NAMES = {"gpu": "the GPU", "host": "the host", "disk": "the disk"}
# What the prefix may take of what is free, where it is not given.
_SHARES = {"gpu": 0.25, "host": 0.5, "disk": 1.0}
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Candidate:
    """A setting, and whether it fits.

    Attributes:
        run: The run in that setting; the micro-batch is the largest that fits, or 1.
        reason: Why it does not fit, or `None`.
        parts: Its memory by part. Without a prefix of the evaluation prompts in it all layers run
            in every measurement.
        budgets: Bytes that the prefix may take, by place: of a GPU, of a node's host and disk.
        edits: Where the edits' prefix lies, in bytes of a GPU, and of a node's host and disk.
    """

    run: Run
    reason: str | None
    parts: tuple[Part, ...]
    budgets: dict[str, float]
    edits: dict[str, float]

    @property
    def setting(self) -> Setting:
        """The setting."""
        return self.run.setting

    @property
    def seconds(self) -> float:
        """Time of the run."""
        return sum(phase.seconds for phase in phases(self.run, self.parts))


def candidates(
    shapes: ModelShapes,
    saved: Mapping[str, Sequence[LayerActivations]],
    work: Workload,
    machine: Machine,
    hparams: LocFTBFHyperParams,
) -> list[Candidate]:
    """Returns every setting, preferred ones first.

    A precision comes before the next one, and a resident model before a streamed one. Of the cuts
    comes first the one that leaves least to run and needs no disk: to read states from a disk in
    every epoch costs more than the little that a wider cut saves.

    On several GPUs each holds a copy of what stays. Only where that does not fit are layers cut up
    or laid on several GPUs, and of these ways the quickest comes first.

    `saved` says, by precision and preferred ones first, what autograd keeps of each layer from the
    first trained one up. `hparams` settles `stream_frozen`, `prefix_cut` and `model_parallel`.
    """
    streamed, cut = hparams.stream_frozen, hparams.prefix_cut
    # What is preserved is measured with all layers in each process, neither streamed nor cut up.
    whole = shapes.confined is not None
    ways = [False, True] if streamed is None else [streamed]
    if whole or shapes.first_layer == 0:
        ways = [False]
    layouts = LAYOUTS[2 if hparams.model_parallel or whole else 1 :]
    cuts = [one for one in CUTS if one in shapes.cuts and cut in (None, one)]

    def tried(dtype: str, streamed: bool, layout: str, group: int = 1) -> list[Candidate]:
        """Returns the candidates of all cuts: first what fits, then what needs no disk."""
        found = []
        for one in cuts:
            setting = Setting(dtype, streamed, one, work.batch_size, layout, group)
            found.append(_largest(Run(shapes, setting, work, machine), saved[dtype]))
        return sorted(found, key=_preference)

    found: list[Candidate] = []
    for dtype in saved:
        copies = []
        if not hparams.model_parallel:
            copies = [one for way in ways for one in tried(dtype, way, "copies")]
        found += copies
        if machine.gpus == 1 or any(one.reason is None for one in copies):
            continue
        spread = []
        for layout in layouts:
            for way in ways:
                if layout == "fsdp" and not way and shapes.first_layer > 0:
                    continue  # what is below the place is not cut up, but streamed
                for n in _groups(machine.gpus, layout):
                    alike = tried(dtype, way, layout, n)
                    if alike[0].reason is None or n == machine.gpus:
                        spread += alike
                        break  # the smaller the groups, the more of them work at once
        found += sorted(spread, key=lambda one: (one.reason is not None, one.seconds))
    return found


def _preference(one: Candidate) -> tuple[bool, float]:
    on_disk = one.edits.get("disk", 0.0) if one.reason is None else 0.0
    return one.reason is not None, on_disk


def _groups(gpus: int, layout: str) -> list[int]:
    """Returns how many GPUs of a node may share the weights, fewest first."""
    sizes = range(2, gpus + 1) if layout == "model_parallel" else [gpus]
    return [n for n in sizes if gpus % n == 0]


def _largest(run: Run, saved: Sequence[LayerActivations]) -> Candidate:
    """Returns the candidate with the largest micro-batch that fits."""
    work = run.work
    size = min(work.micro_batch_size or work.batch_size, work.batch_size, work.n, run.share.most)
    while True:
        setting = replace(run.setting, micro_batch_size=size)
        candidate = _fit(replace(run, setting=setting), saved)
        # Smaller micro-batches make room on the device alone.
        if candidate.reason is None or size == 1:
            return candidate
        size //= 2


def _fit(run: Run, saved: Sequence[LayerActivations]) -> Candidate:
    """Returns whether a run fits, with its memory by part."""
    shapes, setting, work, machine = run.shapes, run.setting, run.work, run.machine
    standing = [*standing_parts(run), *change_parts(run)]
    widest = max(one.total for one in saved)
    working = [
        *training_parts(run),
        *preparing_parts(run, widest, len(saved)),
        *working_parts(run, saved),
    ]
    parts = standing + working
    budgets = _budgets(standing, parts, machine)
    # Of a node: its GPUs' states lie on as many GPUs as it has processes.
    edits = work.edit_tokens * shapes.cuts[setting.cut] * setting.itemsize / machine.nodes
    prompts = work.eval_tokens * shapes.hidden * setting.itemsize / machine.nodes
    left = {place: n * (run.processes if place == "gpu" else 1) for place, n in budgets.items()}
    room = sum(left.values())
    placed = _place(edits, left, run.processes)
    parts += [Part(EDITS_PREFIX, place, n, LATER) for place, n in placed.items()]
    if prompts <= sum(left.values()) * _ROUNDING:
        prompts_placed = _place(prompts, left, run.processes)
        parts += [Part(PROMPTS_PREFIX, place, n, LATER) for place, n in prompts_placed.items()]
    reason = _too_small(parts, machine)
    # Without its prefix an evaluation runs all layers, which a streamed model does not have.
    needed = edits + (prompts if setting.streamed else 0)
    if reason is None and needed > room * _ROUNDING:
        texts = ", ".join(f"{bytes_text(n)} on {NAMES[place]}" for place, n in budgets.items())
        of = "" if machine.world == 1 else " of a node"
        reason = f"the prefix{of} takes {bytes_text(needed)}; its budgets are {texts}"
    return Candidate(run, reason, tuple(parts), budgets, placed)


def _budgets(standing: Sequence[Part], parts: Sequence[Part], machine: Machine) -> dict[str, float]:
    """Returns what the prefix may take in each place: what was asked for, or a share."""
    budgets: dict[str, float] = {}
    for place in PLACES if machine.gpu is not None else PLACES[1:]:
        given, room = getattr(machine, f"prefix_{place}"), machine.room(place)
        share = _SHARES[place] * max(0.0, room - peak(standing, place))
        free = max(0.0, room - peak(parts, place))
        budgets[place] = min(share, free) if given is None else given
    return budgets


def _place(n: float, left: dict[str, float], gpus: int) -> dict[str, float]:
    """Fills a node's places in order with `n` bytes, and takes that off what is `left`.

    Returns the bytes by place: for the GPUs those of one of them.
    """
    placed = {}
    for place in left:
        taken = min(n, left[place])
        if taken > 0:
            placed[place] = taken / (gpus if place == "gpu" else 1)
        left[place] -= taken
        n -= taken
    return placed


def _too_small(parts: Sequence[Part], machine: Machine) -> str | None:
    """Returns which place is too small, with the parts that fill it."""
    for place in PLACES:
        needed, room = peak(parts, place), machine.room(place)
        if needed > room * _ROUNDING:
            largest = sorted((p for p in parts if p.place == place), key=lambda p: -p.bytes)[:2]
            named = ", ".join(f"{p.name} {bytes_text(p.bytes)}" for p in largest)
            return f"{NAMES[place]} needs {bytes_text(needed)} of {bytes_text(room)} ({named})"
    return None
