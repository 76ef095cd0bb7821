"""A plan as tables for the terminal, and what its figures rest on, in sentences."""

from __future__ import annotations

from rich.table import Table

from ..utils.tables import Bold, Row, counted, terminal_table
from .cost import step_flop
from .fitting import NAMES, Candidate
from .memory_parts import PHASES, PLACES
from .plan import Plan
from .units import bytes_text, flop_text, seconds_text
from .workload import Machine


def tables(plan: Plan) -> list[Table]:
    """Returns all tables of a plan."""
    chosen = [memory_table(plan), work_table(plan), step_table(plan)] if plan.chosen else []
    return [model_table(plan), candidates_table(plan), *chosen]


def model_table(plan: Plan) -> Table:
    """Returns what is planned for: the model, the place, the machine."""
    shapes, machine, work = plan.shapes, plan.machine, plan.work
    trained = ", ".join(shapes.trained)
    if len(shapes.trained) > 2:
        trained = f"{len(shapes.trained)} parameters of layer {shapes.first_layer} and above"
    trained += f" ({shapes.n_trained:,})"
    trained += f" through LoRA ({shapes.lora.trained:,})" if shapes.lora else ""
    trained += " through a confined change" if shapes.confined else ""
    in_forms = f", in {counted(1 + work.forms, 'form')}" if work.forms else ""
    rows = {
        "shapes": shapes.name,
        "parameters": f"{shapes.parameters:,} in {len(shapes.layers)} layers",
        "trained": trained,
        "frozen below": f"{shapes.streamed:,} ({shapes.streamed / shapes.parameters:.0%})",
        "edits": f"{work.n:,}, {work.batch_size} a step, {work.epochs} epochs{in_forms}",
        **({"preserved": ", ".join(shapes.confined.preserve)} if shapes.confined else {}),
        "tokens run": f"{work.edit_tokens:,.0f} of edits, {work.eval_tokens:,.0f} of prompts",
        "memory": ", ".join(f"{place} {bytes_text(machine.room(place))}" for place in PLACES),
    }
    if machine.world > 1:
        nodes = f" on each of {machine.nodes} nodes" if machine.nodes > 1 else ""
        rows["GPUs"] = f"{machine.gpus}{nodes}; sizes are those of one GPU and of one node"
    cells = [Row(row) for row in rows.items()]
    return terminal_table(
        ["what", "value"], cells, title="What is planned", text_columns=2, header=False
    )


def summary_table(plan: Plan) -> Table:
    """Returns the chosen setting in a few lines: how it runs, its peaks, its time."""
    assert plan.chosen is not None
    one, peaks = plan.chosen, plan.peaks()
    setting = one.setting
    layers = "streamed from disk" if setting.streamed else "resident"
    where = ", ".join(f"{NAMES[place]} {bytes_text(n)}" for place, n in one.edits.items())
    rows = {
        "runs as": f"{setting.dtype}, frozen layers {layers}, micro-batches of "
        f"{setting.micro_batch_size}",
        **({"GPUs": _layout(one)} if plan.machine.world > 1 else {}),
        "prefix": f"up to the first trained {setting.cut}: {where or 'none'}",
        "most memory": ", ".join(
            f"{place} {bytes_text(peaks[place])} of {bytes_text(plan.machine.room(place))}"
            for place in PLACES
            if plan.machine.room(place)
        ),
        **{phase.name: seconds_text(phase.seconds) for phase in plan.phases},
        "in all": Bold(seconds_text(sum(phase.seconds for phase in plan.phases))),
    }
    return terminal_table(
        ["what", "value"],
        map(Row, rows.items()),
        title="The chosen settings",
        text_columns=2,
        header=False,
    )


def candidates_table(plan: Plan) -> Table:
    """Returns all settings, preferred ones first, each with whether it fits or why not."""
    rows = []
    for one in plan.candidates:
        setting = one.setting
        verdict = f"no: {one.reason}"
        if one.reason is None:
            where = ", ".join(f"{NAMES[place]} {bytes_text(n)}" for place, n in one.edits.items())
            verdict = f"{'CHOSEN' if one is plan.chosen else 'yes'}: prefix on {where}"
        cells = {
            "dtype": setting.dtype,
            "frozen layers": "streamed" if setting.streamed else "resident",
            **({"GPUs": _layout(one)} if plan.machine.world > 1 else {}),
            "cut": setting.cut,
            "micro-batch": str(setting.micro_batch_size),
            "fits?": verdict,
        }
        rows.append(Row([Bold(cell) if one is plan.chosen else cell for cell in cells.values()]))
    title = "Settings, preferred ones first"
    return terminal_table([*cells], rows, title=title, text_columns=len(cells))


def _layout(one: Candidate) -> str:
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
    most = [bytes_text(peaks[place]) for place in places]
    rows.append(Row(["most at one time", "", *most], section=True))
    title = "Memory of the chosen settings"
    return terminal_table(["part", "while", *places], rows, title=title, text_columns=2)


def work_table(plan: Plan) -> Table:
    """Returns the work, the bytes and the time of each phase."""
    columns = {
        "work": ("flop", lambda flop: flop_text(flop) if flop else "-"),
        "checkpoint read": ("checkpoint", bytes_text),
        "prefix on disk": ("disk", bytes_text),
        **({"between GPUs": ("sent", bytes_text)} if plan.machine.world > 1 else {}),
        "time": ("seconds", seconds_text),
    }
    rows = [
        Row([one.name, *(text(getattr(one, field)) for field, text in columns.values())])
        for one in plan.phases
    ]
    sums = [
        text(sum(getattr(one, field) for one in plan.phases)) for field, text in columns.values()
    ]
    rows.append(Row(["sum", *sums], section=True))
    return terminal_table(["phase", *columns], rows, title="Work and time")


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
    rows = []
    for part, seconds in step.seconds.items():
        if seconds > 0:
            name = part + ("  <- bounds the step" if part == step.bound else "")
            rows.append(Row([name, amounts[part], seconds_text(seconds)]))
    whole = flop_text(step_flop(plan.chosen.run))
    rows.append(Row(["a step", whole, seconds_text(step.total)], section=True))
    caption = None
    if step.ranks > 1:
        batch = min(plan.work.batch_size, plan.work.n)
        caption = (
            f"The largest of {step.ranks} ranks has {step.share:.1f} of {batch} edits; even parts "
            f"would be {batch / step.ranks:.1f}."
        )
    return terminal_table(["part", "amount", "time"], rows, title="A step", caption=caption)


def closing_lines(plan: Plan, *, detailed: bool = True) -> str:
    """Returns the chosen settings as arguments and, if `detailed`, what the figures rest on."""
    lines = ["Assumed:", *(f"  - {line}" for line in assumptions(plan))] if detailed else []
    if plan.chosen:
        keys = " ".join(f"{key}={_yaml(value)}" for key, value in plan.keys().items())
        lines += ["Settings that fit:", f"  {keys}"]
    if plan.launcher():
        each = " on each node" if plan.machine.nodes > 1 else ""
        start = " ".join(plan.launcher())
        lines += [f"To be started{each} with:", f"  {start} locft_easyedit edit ..."]
    if not detailed:
        lines.append("verbose=true shows every setting, memory by part, and what is assumed.")
    return "\n".join(lines) + "\n"


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def assumptions(plan: Plan) -> list[str]:
    """Returns what the figures rest on, one sentence each."""
    work, machine, confined = plan.work, plan.machine, plan.shapes.confined
    dtype = plan.chosen.setting.dtype if plan.chosen else plan.dtype
    rate = "as given" if machine.rate else "assumed; rate= says what is reached"
    lines = [
        f"{machine.flops(dtype) / 1e12:g} TFLOP/s are reached in {dtype} ({rate}).",
        f"The disk reads and writes {_stated(machine, 'read')}, while something is computed.",
        f"An edit has {work.tokens:g} tokens, {work.targets:g} of them targets; the last one runs "
        "nowhere.",
        f"All {work.epochs} epochs are run; training often stops earlier.",
        "Rows are packed, and all edits are about as long as the mean.",
        "Copies between the host and the GPU take no time beside the rest.",
    ]
    if work.forms:
        lines.append(
            f"{counted(work.forms, 'other form')} of each edit's prompt are recorded with it, "
            f"{work.form_longer:g} tokens longer; an epoch trains "
            f"{min(work.forms, work.forms_per_epoch):g} beside it."
        )
    if work.checked:
        lines.append(
            "The check after the epochs is counted; what it finds, and `repairs` train again, is "
            "not known beforehand."
        )
    if confined:
        lines.append(
            f"The time of sampling and measuring for `preserve` ({', '.join(confined.preserve)}) "
            "is left out, as is the memory of sampling and of prompts' keys: of the model's own "
            "text and of text files it is done once per model and place."
        )
    if machine.gpu is not None:
        lines.append(
            f"A GPU's memory moves {_stated(machine, 'bandwidth')}; Python starts the kernels of a "
            f"layer, forward and backward, in {_stated(machine, 'launch', 'ms')}."
        )
    if machine.world > 1:
        network = f", the network of a node {_stated(machine, 'network')} each way"
        lines += [
            f"{machine.gpus} GPUs a node, {counted(machine.nodes, 'node')}: memory and disk are "
            "those of each GPU and of each node.",
            f"Rings between GPUs carry {_stated(machine, 'nvlink')}"
            f"{network if machine.nodes > 1 else ''}; that a message takes its time to start is "
            "left out.",
            "Each edit belongs to one GPU, and a step waits for the one with most of the "
            "mini-batch (computed from chance, not guessed). Every GPU makes Adam's whole step.",
            "A node reads the checkpoint once, not once a GPU. Prefix and evaluation are dealt out "
            "evenly.",
        ]
    if work.evaluate:
        lines.append(
            "Evaluation is teacher-forced: rewrite, rephrase, one locality and one portability "
            "prompt an edit. Generated answers come on top."
        )
    return lines


def _stated(machine: Machine, field: str, unit: str = "GB/s") -> str:
    """Returns a rate, and whether it was given."""
    value = getattr(machine, field)
    assumed = f" (assumed unless {field}= says it)" if value == getattr(Machine, field) else ""
    return f"{value:,g} {unit}{assumed}"
