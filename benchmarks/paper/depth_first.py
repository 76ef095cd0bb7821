"""Depth-first against breadth-first: one edit after the other, or epochs over all (table 1).

    python benchmarks/paper/depth_first.py --data zsre.json counterfact.json --output depth_first

FT-M trains the matrix itself, LoRA a low-rank change of it; mini-batches have one edit. Depth-first
each edit is trained until its loss is below the threshold, then the next one; breadth-first all of
them in each epoch. The edits stand in five shards, in their order: the picture shows how many of
each are known as training goes on (figure 3). A point is a training of its own, which ends there.
"""

import dataclasses
import statistics

from study import Study, by_file, changes, percent, report, verdict

from locft_easyedit.errors import DataError, NonFiniteLossError
from locft_easyedit.evaluation.summary import summarize
from locft_easyedit.hparams_rules import DEPTH_FIRST
from locft_easyedit.utils.plotting import legend_below, look, new_figure, open_axes

N_SHARDS = 5
EPOCHS = (1, 2, 4, 8)  # of breadth-first trainings that are looked at, before the whole one
# Rates at which one epoch after the other learns nearly all, tried on edits of the other half.
KINDS = {"FT-M": "lr=1e-3", "LoRA": "tuning=lora,lr=1e-2"}
PIPELINES = ("depth_first", "breadth_first")
VARIANTS = {
    f"{kind}_{pipeline}": f"{how},pipeline={pipeline},batch_size=1,min_batches=null"
    for kind, how in KINDS.items()
    for pipeline in PIPELINES
}


class Pipelines(Study):
    """The study, whose picture shows the runs on their way."""

    def report(self, folder):
        self.runs = report.runs_in(folder)
        return super().report(folder)

    def picture(self, rows, model):
        """A row of panels for each file, a panel for each variant, a line for each shard."""
        cases = list(report.grouped(self.runs, "data"))
        names = list(dict.fromkeys(run["variant"] for run in self.runs))
        figure = new_figure(3.5 * len(names), 1.2 + 3.2 * len(cases), [f"{model}: {self.title}"])
        grid = figure.subplots(len(cases), len(names), squeeze=False, sharey=True)
        handles = {}
        for axes_of, (data,) in zip(grid, cases, strict=True):
            for axes, name in zip(axes_of, names, strict=True):
                own = [r for r in self.runs if r["data"] == data and r["variant"] == name]
                draw(axes, own, handles)
                axes.set_title(f"{data}\n{name.replace('_', ' ')}", fontsize=10, parse_math=False)
            axes_of[0].set_ylabel("reliability of the shard, %")
        legend_below(figure, list(handles.values()))
        return figure


def looked_at(bench, hparams):
    """A run's line: its figures at the end, and those of each shard on the way."""
    n = len(bench.edits)
    if n < N_SHARDS:
        raise DataError(f"`--n {n}` must be at least {N_SHARDS}: that many shards are looked at.")
    if len(bench.measured) < n:
        raise DataError(f"`--n {n}` is more than half of the file has. Give less.")
    points = []
    try:
        for n_edits, epochs in stops(n, hparams):
            shorter = dataclasses.replace(hparams, num_steps=epochs)
            with bench.edited(shorter, bench.edits[:n_edits]):
                answers = [{"post": one} for one in bench.by_answer.measure("after")]
            points.append({"edits": n_edits, "epochs": epochs, **by_shard(answers)})
    except NonFiniteLossError as error:
        return bench.line({}, diverged=str(error), points=points, converged=False)
    line = bench.run(hparams)
    if not line["diverged"]:
        end = {"edits": n, "epochs": hparams.num_steps, **by_shard(bench.answers)}
        points.append(end)
    return {**line, "points": points}


def stops(n, hparams):
    """Where training is looked at before its end: after so many edits, and so many epochs."""
    if hparams.pipeline == DEPTH_FIRST:
        return [(n * (i + 1) // N_SHARDS, hparams.num_steps) for i in range(N_SHARDS - 1)]
    return [(n, epochs) for epochs in EPOCHS if epochs < hparams.num_steps]


def by_shard(answers):
    """Reliability and generalization of each shard, of records in their order."""
    n, found = len(answers), {"reliability": [], "generalization": []}
    for i in range(N_SHARDS):
        shard = answers[i * n // N_SHARDS : (i + 1) * n // N_SHARDS]
        generated = summarize(shard)["post"]["generated"]
        for key, values in found.items():
            values.append(generated.get(key))
    return found


def draw(axes, runs, handles):
    """Draws the shards of a variant's runs, the mean over its seeds."""
    open_axes(axes)
    depth_first = any(run["changes"]["pipeline"] == DEPTH_FIRST for run in runs)
    key = "edits" if depth_first else "epochs"
    places = sorted({point[key] for run in runs for point in run["points"]})
    for i in range(N_SHARDS):
        means = []
        for place in places:
            values = [point["reliability"][i] for run in runs for point in run["points"]
                      if point[key] == place]  # fmt: skip
            means.append(100 * statistics.fmean(values))
        colour, marker = look(i)
        label = f"shard {i + 1}"
        [handles[label]] = axes.plot(places, means, color=colour, marker=marker, label=label)
    axes.set(xlabel="edits so far" if depth_first else "epochs over all edits", ylim=(-4, 104))


def claim(rows):
    said = []
    for name, own in by_file(rows):
        of = {row["variant"]: row for row in own}
        for kind in KINDS:
            depth, breadth = (of.get(f"{kind}_{pipeline}") for pipeline in PIPELINES)
            if depth and breadth:
                more = percent(breadth) - percent(depth)
                said.append(
                    f"{name}, {kind}, depth-first to breadth-first: {changes(depth, breadth)}. "
                    f"{verdict(more > 0)}."
                )
    return said


STUDY = Pipelines(
    doc=__doc__,
    title="edits known as training goes on, in five shards",
    paper="at batch size 1, 1,000 edits: FT-M's reliability is 75.3 % depth-first and 99.7 % "
    "breadth-first on ZsRE, AdaLoRA's 3.8 % and 90.5 % (table 1).",
    variants=VARIANTS,
    axis="",
    x=lambda row: row["variant"],
    claim=claim,
    found=looked_at,
)

if __name__ == "__main__":
    STUDY.main()
