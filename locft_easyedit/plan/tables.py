"""A plan as tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from . import workload
from .candidates import NAMES, Candidate
from .cost import step_flop
from .memory import PHASES, PLACES
from .plan import Plan
from .units import bytes_text, flop_text, seconds_text
from .workload import Machine, Workload


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
    setting, n = one.setting, one.run.ranks
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
    whole = step_flop(plan.chosen.run)
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


def _of_preserve(names: tuple[str, ...]) -> str:
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
    assumed = value == getattr(workload, f"ASSUMED_{field.upper()}")
    return f"{value:,g} {unit}" + (f" (assumed unless {field}= says it)" if assumed else "")
