"""How an edit scales with GPUs, as `locft plan` tells it: a simulation on paper.

    python benchmarks/scaling.py --output scaling

For 1 to 64 GPUs of an H100's kind, eight a node, and each model, number of edits and mini-batch it
makes a plan; no weights and no GPU are needed. It prints the table, says where doubling the GPUs
stops to pay and why, and writes scaling.md, scaling.json and scaling.png. Rates and sizes of memory
are arguments, as they are of `locft plan`; the method's thresholds are not known to a plan, which
runs all 25 epochs.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys

from locft_easyedit.hparams import LocFTBFHyperParams, hparams_folder
from locft_easyedit.plan.cost import AFTERWARDS, AT_ONE_TIME
from locft_easyedit.plan.plan import make_plan
from locft_easyedit.plan.units import GIB, parse_size
from locft_easyedit.plan.workload import Machine, Workload
from locft_easyedit.utils.output import prepare_folder, write_picture

A_NODE = 8
# Twice the GPUs shall take at least a quarter off the time.
PAYS = 0.75
COLOURS = {
    "compute": "#0072B2", "weights": "#56B4E9", "launches": "#E69F00", "all-gather": "#CC79A7",
    "gradient exchange": "#D55E00", "Adam": "#999999",
}  # fmt: skip


def main():
    options = arguments()
    rows, untold = [], []
    for model in options.models:
        for edits in options.edits:
            for batch in options.batches:
                found = [row_of(model, edits, batch, n, options) for n in options.gpus]
                rows += [row for row in found if row is not None]
                untold += [
                    f"{model}, {edits:,} edits, {n} GPUs: nothing fits."
                    for n, row in zip(options.gpus, found, strict=True)
                    if row is None
                ]
    if not rows:
        sys.exit("\n".join(untold))
    with_speedup_(rows)
    shown = [row for row in rows if row["gpus"] in options.show]
    text = markdown(shown) + "\n\n" + "\n".join([*untold, *limits(rows)]) + "\n"
    print(text)
    if options.output:
        folder = prepare_folder(options.output)
        (folder / "scaling.md").write_text(text, encoding="utf-8")
        (folder / "scaling.json").write_text(
            json.dumps({"rows": rows, "options": vars(options)}, indent=2), encoding="utf-8"
        )
        write_picture(folder / "scaling.png", picture(rows))
        print(f"written: {folder}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["llama3-8b", "qwen2.5-72b"])
    parser.add_argument("--edits", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--show", type=int, nargs="+", default=[1, 8, 64], help="of these, in the "
                        "table")  # fmt: skip
    parser.add_argument("--gpu", default="80GiB", help="memory of a GPU")
    parser.add_argument("--host", default="2TiB", help="memory of a node")
    parser.add_argument("--disk", default="16TiB", help="room on the disk of a node")
    for field in dataclasses.fields(Machine):
        if field.name in ("read", "bandwidth", "nvlink", "network", "launch"):
            parser.add_argument(f"--{field.name}", type=float, default=field.default)
    parser.add_argument("--rate", type=float, help="TFLOP/s that a GPU reaches")
    parser.add_argument("--output", help="folder for the table, its figures and the picture")
    return parser.parse_args()


def row_of(model, edits, batch, gpus, options):
    """Returns the figures of one plan; `None` where nothing fits."""
    # The file's own values are what the plan is for, but for the mini-batch; streamed or not.
    hparams = LocFTBFHyperParams.from_hparams(hparams_folder() / f"{model}.yaml")
    hparams = dataclasses.replace(hparams, batch_size=batch, stream_frozen=None)
    machine = Machine(
        gpu=parse_size("gpu", options.gpu), host=parse_size("host", options.host),
        disk=parse_size("disk", options.disk), rate=options.rate, read=options.read,
        gpus=min(gpus, A_NODE), nodes=math.ceil(gpus / A_NODE), bandwidth=options.bandwidth,
        nvlink=options.nvlink, network=options.network, launch=options.launch,
    )  # fmt: skip
    plan = make_plan(hparams, Workload.from_hparams(hparams, edits), machine)
    if plan.chosen is None:
        return None
    step, peaks = plan.step(), plan.peaks()
    [training] = [phase for phase in plan.phases if phase.name.startswith("training")]
    return {
        "model": model, "edits": edits, "batch": batch, "gpus": machine.world,
        "layout": plan.chosen.setting.layout, "streamed": plan.chosen.setting.streamed,
        "cut": plan.chosen.setting.cut, "ranks": step.ranks, "share": step.share,
        "step_seconds": step.total, "parts": step.seconds, "bound": step.bound,
        "training_seconds": training.seconds, "seconds": plan.seconds,
        "phases": {phase.name: phase.seconds for phase in plan.phases},
        "disk_bytes": training.disk, "gpu_bytes": peaks["gpu"], "host_bytes": peaks["host"],
    }  # fmt: skip


def groups(rows):
    """Returns the rows of each model, number of edits and mini-batch, by GPUs."""
    found = {}
    for row in rows:
        found.setdefault((row["model"], row["edits"], row["batch"]), []).append(row)
    return found


def with_speedup_(rows):
    """Adds to each row how many times quicker it is than its group's first."""
    for group in groups(rows).values():
        for row in group:
            row["speedup"] = group[0]["seconds"] / row["seconds"] * group[0]["gpus"]


def limits(rows):
    """Returns a sentence on each group: where doubling stops to pay, and why."""
    lines = []
    for (model, edits, batch), group in groups(rows).items():
        name = f"- {model}, {edits:,} edits, {batch} a step: "
        for fewer, more in itertools.pairwise(group):
            doublings = math.log2(more["gpus"] / fewer["gpus"])
            if more["seconds"] > fewer["seconds"] * PAYS**doublings:
                less = 1 - more["seconds"] / fewer["seconds"]
                lines.append(
                    f"{name}to {fewer['gpus']} GPUs. From there to {more['gpus']} the time "
                    + (f"shrinks by {less:.0%}" if less > 0 else f"grows by {-less:.0%}")
                    + f"; {why(more)}"
                )
                break
        else:
            lines.append(f"{name}to {group[-1]['gpus']} GPUs and beyond; {why(group[-1])}")
    return lines


def why(row):
    """Returns what a run spends its time with, and what its steps wait for."""
    phase = max(row["phases"], key=row["phases"].get)
    part = row["phases"][phase] / row["seconds"]
    if not phase.startswith("training"):
        return f"{part:.0%} of that time is {phase}."
    spent = {name: row["parts"][name] / row["step_seconds"] for name in AFTERWARDS}
    first = max(AT_ONE_TIME, key=row["parts"].get)
    spent = {first: row["parts"][first] / row["step_seconds"], **spent}
    told = ", ".join(f"{name} {value:.0%}" for name, value in spent.items() if value > 0.005)
    even = row["batch"] / row["ranks"]
    uneven = (
        f"; the largest of {row['ranks']} ranks has {row['share'] / even:.2f} times an even part"
        if row["ranks"] > 1
        else ""
    )
    return f"a step there is {told}{uneven}."


def markdown(rows):
    """Returns the table."""
    heads = ["model", "edits", "batch", "GPUs", "largest share / even", "step", "bound by",
             "training", "whole run", "speed-up", "a GPU", "a host"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        even = row["batch"] / row["ranks"]
        several = {"copies": "", "fsdp": " (FSDP2)", "model_parallel": " (model_parallel)"}
        cells = [
            row["model"], f"{row['edits']:,}", row["batch"], f"{row['gpus']}"
            + several[row["layout"]], f"{row['share'] / even:.2f}", milliseconds(row),
            row["bound"], duration(row["training_seconds"]), duration(row["seconds"]),
            f"{row['speedup']:.1f}", f"{row['gpu_bytes'] / GIB:.0f} GiB",
            f"{row['host_bytes'] / GIB:,.0f} GiB",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def milliseconds(row):
    value = 1000 * row["step_seconds"]
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def duration(seconds):
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


def picture(rows):
    """Returns the figure: for each model the speed-up, and what steps wait for."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(12, 4.2 * len(models)), dpi=120, layout="constrained")
    for axes, model in zip(figure.subplots(len(models), 2, squeeze=False), models, strict=True):
        own = [row for row in rows if row["model"] == model]
        draw_speedup(axes[0], model, own)
        draw_steps(axes[1], model, own)
    figure.suptitle("Planned, not measured: GPUs of an H100's kind, eight a node", fontsize=12)
    return figure


def draw_speedup(axes, model, rows):
    """Draws times quicker than one GPU against the number of GPUs."""
    numbers = sorted({row["gpus"] for row in rows})
    axes.plot(numbers, numbers, color="#BBBBBB", linestyle=":", label="as many times as GPUs")
    edits = sorted({row["edits"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    for (_, n, batch), group in groups(rows).items():
        axes.plot(
            [row["gpus"] for row in group], [row["speedup"] for row in group],
            color=list(COLOURS.values())[(0, 4, 2, 3)[batches.index(batch) % 4]],
            linestyle=("-", "--", "-.", ":")[edits.index(n) % 4], marker="o", markersize=4,
            label=f"{n:,} edits, {batch} a step",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="times quicker, whole run")
    axes.set_xticks(numbers, map(str, numbers))
    axes.set_yticks(numbers, map(str, numbers))
    axes.minorticks_off()
    axes.grid(color="#E6E6E6")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(model, fontsize=11)


def draw_steps(axes, model, rows):
    """Draws what the parts of a step take against the number of GPUs."""
    most = max(row["edits"] for row in rows)
    batches = sorted({row["batch"] for row in rows})
    for (_, edits, batch), group in groups(rows).items():
        if edits != most:  # a step knows its mini-batch, and hardly how many edits there are
            continue
        numbers = [row["gpus"] for row in group]
        style = {"linestyle": ("-", "--", "-.", ":")[batches.index(batch) % 4]}
        whole = [1000 * row["step_seconds"] for row in group]
        label = f"the step of {batch}"
        axes.plot(numbers, whole, color="black", linewidth=2, label=label, **style)
        for name in (*AT_ONE_TIME, *AFTERWARDS):
            part = [1000 * row["parts"][name] or math.nan for row in group]
            if any(value > 0 for value in part):
                label = name if batch == batches[0] else None
                axes.plot(numbers, part, color=COLOURS[name], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="ms")
    axes.set_xticks(numbers, map(str, numbers))
    axes.minorticks_off()
    axes.grid(color="#E6E6E6")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.set_title(f"{model}: what a step waits for", fontsize=11)


if __name__ == "__main__":
    main()
