"""A plan as tables for the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.table import Table

from ..tables import Bold, Row, terminal_table
from .assumptions import assumptions
from .flops import step_flop
from .given import Workload
from .layout import ranks
from .make import Plan
from .part import PHASES, PLACES
from .settings import NAMES, Candidate
from .sizes import bytes_text, flop_text, seconds_text


def model_table(plan: Plan) -> Table:
    """Returns what is planned for: the model, the place, the machine."""
    shapes, machine, work = plan.shapes, plan.machine, plan.work
    trained = ", ".join(shapes.trained)
    more = f"{len(shapes.trained)} parameters of layer {shapes.first_layer} and above"
    rows = {
        "shapes": shapes.name,
        "parameters": f"{shapes.parameters:,} in {len(shapes.layers)} layers",
        "trained": f"{trained if len(shapes.trained) < 3 else more} "
        f"({sum(shapes.trained.values()):,})"
        + (f" through LoRA ({shapes.lora.trained:,})" if shapes.lora else "")
        + (" through a confined change" if shapes.confined else ""),
        "frozen below": f"{shapes.streamed:,} ({shapes.streamed / shapes.parameters:.0%})",
        "edits": f"{work.n:,}, {work.batch_size} a step, {work.epochs} epochs{_reworded(work)}",
        **({"preserved": ", ".join(shapes.confined.preserve)} if shapes.confined else {}),
        "tokens run": f"{work.edit_tokens:,.0f} of edits"
        f"{' and rewordings' if work.rewordings else ''}, {work.eval_tokens:,.0f} of prompts",
        "memory": ", ".join(f"{place} {bytes_text(machine.room(place))}" for place in PLACES),
    }
    if machine.world > 1:
        nodes = f" on each of {machine.nodes} nodes" if machine.nodes > 1 else ""
        rows["GPUs"] = f"{machine.gpus}{nodes}; sizes are those of one GPU and of one node"
    return terminal_table(
        ["what", "value"],
        [Row(row) for row in rows.items()],
        title="What is planned",
        text_columns=2,
        header=False,
    )


def _reworded(work: Workload) -> str:
    """Returns what is trained beside each edit."""
    n = work.rewordings
    return f", each with {n} rewording{'s' * (n > 1)}" if n else ""


def candidates_table(plan: Plan) -> Table:
    """Returns all settings, preferred ones first, each with whether it fits or why not."""
    several = plan.machine.world > 1
    headings = ["dtype", "frozen layers", *(["GPUs"] if several else []), "cut", "micro-batch"]
    rows = []
    for one in plan.candidates:
        setting = one.setting
        verdict = f"no: {one.reason}"
        if one.reason is None:
            where = ", ".join(f"{NAMES[place]} {bytes_text(n)}" for place, n in one.edits.items())
            verdict = f"{'CHOSEN' if one is plan.chosen else 'yes'}: prefix on {where}"
        cells = [
            setting.dtype,
            "streamed" if setting.streamed else "resident",
            *([_layout(plan, one)] if several else []),
            setting.cut,
            str(setting.micro_batch_size),
            verdict,
        ]
        rows.append(Row([*map(Bold, cells)] if one is plan.chosen else cells))
    columns = [*headings, "fits?"]
    return terminal_table(
        columns, rows, title="Settings, preferred ones first", text_columns=len(columns)
    )


def _layout(plan: Plan, one: Candidate) -> str:
    """Returns how a setting uses several GPUs."""
    setting, n = one.setting, ranks(one.setting, plan.machine)
    return {
        "copies": f"{n} copies",
        "fsdp": f"{n}, layers cut in {setting.group} (FSDP2)",
        "model_parallel": f"{n} x {setting.group} (model_parallel)",
    }[setting.layout]


def memory_table(plan: Plan) -> Table:
    """Returns the chosen setting's memory by part and place, with each place's peak."""
    assert plan.chosen is not None
    places = [place for place in PLACES if plan.machine.room(place)]
    sizes: dict[tuple[str, tuple[str, ...]], dict[str, float]] = {}
    for part in plan.chosen.parts:
        of_part = sizes.setdefault((part.name, part.phases), {})
        of_part[part.place] = of_part.get(part.place, 0.0) + part.bytes
    rows = []
    for (name, phases), by_place in sizes.items():
        if sum(by_place.values()) > 0:
            when = "always" if phases == PHASES else ", ".join(phases)
            rows.append(Row([name, when, *(bytes_text(by_place.get(p, 0)) for p in places)]))
    peaks = plan.peaks()
    peak_texts = (bytes_text(peaks[place]) for place in places)
    rows.append(Row(["most at one time", "", *peak_texts], section=True))
    return terminal_table(
        ["part", "while", *places], rows, title="Memory of the chosen settings", text_columns=2
    )


def work_table(plan: Plan) -> Table:
    """Returns the work, the bytes and the time of each phase."""
    assert plan.chosen is not None
    figures: list[tuple[Any, ...]] = [
        (one.name, one.flop, one.checkpoint, one.disk, one.sent, one.seconds) for one in plan.phases
    ]
    _, *amounts, _ = zip(*figures, strict=True)
    figures.append(("sum", *map(sum, amounts), plan.seconds))
    columns = ["phase", "work", "checkpoint read", "prefix on disk", "between GPUs", "time"]
    rows = []
    for name, flop, *sizes, seconds in figures:
        work = flop_text(flop) if flop else "-"
        rows.append([name, work, *map(bytes_text, sizes), seconds_text(seconds)])
    if plan.machine.world == 1:
        for cells in (columns, *rows):
            cells.pop(4)  # nothing goes between GPUs
    *phases, total = map(Row, rows)
    return terminal_table(columns, [*phases, replace(total, section=True)], title="Work and time")


def step_table(plan: Plan) -> Table:
    """Returns what a step takes, by part, and which part bounds it."""
    step = plan.step()
    assert plan.chosen is not None
    assert step is not None
    amounts = {
        "compute": flop_text(step.flop),
        "weights": bytes_text(step.weight_bytes),
        "launches": "",
        "all-gather": bytes_text(step.gathered_bytes),
        "gradient exchange": bytes_text(step.exchanged_bytes),
        "Adam": bytes_text(step.adam_bytes),
    }
    rows = [
        Row(
            [
                part + ("  <- bounds the step" if part == step.bound else ""),
                amounts[part],
                seconds_text(seconds),
            ]
        )
        for part, seconds in step.seconds.items()
        if seconds > 0
    ]
    whole = step_flop(plan.shapes, plan.chosen.setting, plan.work)
    rows.append(Row(["a step", flop_text(whole), seconds_text(step.total)], section=True))
    caption = None
    if step.ranks > 1:
        batch = min(plan.work.batch_size, plan.work.n)
        caption = (
            f"The largest of {step.ranks} ranks has {step.share:.1f} of {batch} edits; even parts "
            f"would be {batch / step.ranks:.1f}."
        )
    return terminal_table(["part", "amount", "time"], rows, title="A step", caption=caption)


def tables(plan: Plan) -> list[Table]:
    """Returns all tables of a plan."""
    chosen = [memory_table(plan), work_table(plan), step_table(plan)] if plan.chosen else []
    return [model_table(plan), candidates_table(plan), *chosen]


def closing_lines(plan: Plan) -> str:
    """Returns the chosen settings as arguments, and what the figures rest on."""
    lines = ["Assumed:", *(f"  - {line}" for line in assumptions(plan))]
    if plan.chosen:
        keys = " ".join(f"{key}={_yaml(value)}" for key, value in plan.keys().items())
        lines += ["Settings that fit:", f"  {keys}"]
        if plan.launcher():
            start = " ".join(plan.launcher())
            each = " on each node" if plan.machine.nodes > 1 else ""
            lines += [f"To be started{each} with:", f"  {start} locft_easyedit edit ..."]
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
