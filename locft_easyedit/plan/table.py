"""A plan as tables for the terminal."""

from __future__ import annotations

from rich.table import Table

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
    table = Table(title="What is planned", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
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
    for what, value in rows.items():
        table.add_row(what, value.replace("[", "\\["))
    return table


def _reworded(work: Workload) -> str:
    """Returns what is trained beside each edit."""
    n = work.rewordings
    return f", each with {n} rewording{'s' * (n > 1)}" if n else ""


def candidates_table(plan: Plan) -> Table:
    """Returns all settings, preferred ones first, each with whether it fits or why not."""
    table = Table(title="Settings, preferred ones first", title_justify="left")
    several = plan.machine.world > 1
    for heading in ("dtype", "frozen layers", *(["GPUs"] if several else []), "cut", "micro-batch"):
        table.add_column(heading)
    table.add_column("fits?", overflow="fold")
    for one in plan.candidates:
        setting = one.setting
        verdict = f"no: {one.reason}"
        if one.reason is None:
            where = ", ".join(f"{NAMES[place]} {bytes_text(n)}" for place, n in one.edits.items())
            verdict = f"{'CHOSEN' if one is plan.chosen else 'yes'}: prefix on {where}"
        table.add_row(
            setting.dtype,
            "streamed" if setting.streamed else "resident",
            *([_layout(plan, one)] if several else []),
            setting.cut,
            str(setting.micro_batch_size),
            verdict,
            style="bold" if one is plan.chosen else None,
        )
    return table


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
    table = Table(title="Memory of the chosen settings", title_justify="left")
    table.add_column("part")
    table.add_column("while")
    places = [place for place in PLACES if plan.machine.room(place)]
    for place in places:
        table.add_column(place, justify="right")
    rows: dict[tuple[str, tuple[str, ...]], dict[str, float]] = {}
    for part in plan.chosen.parts:
        row = rows.setdefault((part.name, part.phases), {})
        row[part.place] = row.get(part.place, 0.0) + part.bytes
    for (name, phases), sizes in rows.items():
        if sum(sizes.values()) > 0:
            when = "always" if phases == PHASES else ", ".join(phases)
            table.add_row(name, when, *(bytes_text(sizes.get(place, 0)) for place in places))
    table.add_section()
    peaks = plan.peaks()
    table.add_row("most at one time", "", *(bytes_text(peaks[place]) for place in places))
    return table


def work_table(plan: Plan) -> Table:
    """Returns the work, the bytes and the time of each phase."""
    assert plan.chosen is not None
    several = plan.machine.world > 1
    table = Table(title="Work and time", title_justify="left")
    table.add_column("phase")
    between = ["between GPUs"] if several else []
    for heading in ("work", "checkpoint read", "prefix on disk", *between, "time"):
        table.add_column(heading, justify="right")
    for one in plan.phases:
        table.add_row(
            one.name,
            flop_text(one.flop) if one.flop else "-",
            bytes_text(one.checkpoint),
            bytes_text(one.disk),
            *([bytes_text(one.sent)] if several else []),
            seconds_text(one.seconds),
        )
    table.add_section()
    table.add_row(
        "sum",
        flop_text(sum(one.flop for one in plan.phases)),
        bytes_text(sum(one.checkpoint for one in plan.phases)),
        bytes_text(sum(one.disk for one in plan.phases)),
        *([bytes_text(sum(one.sent for one in plan.phases))] if several else []),
        seconds_text(plan.seconds),
    )
    return table


def step_table(plan: Plan) -> Table:
    """Returns what a step takes, by part, and which part bounds it."""
    step = plan.step()
    assert plan.chosen is not None
    assert step is not None
    table = Table(title="A step", title_justify="left")
    table.add_column("part")
    table.add_column("amount", justify="right")
    table.add_column("time", justify="right")
    amounts = {
        "compute": flop_text(step.flop),
        "weights": bytes_text(step.weight_bytes),
        "launches": "",
        "all-gather": bytes_text(step.gathered_bytes),
        "gradient exchange": bytes_text(step.exchanged_bytes),
        "Adam": bytes_text(step.adam_bytes),
    }
    for part, seconds in step.seconds.items():
        if seconds > 0:
            said = "  <- bounds the step" if part == step.bound else ""
            table.add_row(part + said, amounts[part], seconds_text(seconds))
    table.add_section()
    whole = step_flop(plan.shapes, plan.chosen.setting, plan.work)
    table.add_row("a step", flop_text(whole), seconds_text(step.total))
    if step.ranks > 1:
        batch = min(plan.work.batch_size, plan.work.n)
        table.caption = (
            f"The largest of {step.ranks} ranks has {step.share:.1f} of {batch} edits; even parts "
            f"would be {batch / step.ranks:.1f}."
        )
    return table


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
