"""What the studies of the paper's claims share: runs of variants, a table, a picture, a verdict.

A study is variants of the hyper-parameters, files of edits and what the paper says of them; its
runs are those of ../generalization.py, a line of OUTPUT/runs.jsonl each, and are not made again.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

import generalization  # noqa: E402
import generalization_report as report  # noqa: E402
from generalization_bench import CAPABILITY  # noqa: E402

from locft_easyedit.data.readers import read_requests  # noqa: E402
from locft_easyedit.errors import LocFTError  # noqa: E402
from locft_easyedit.hparams import LocFTBFHyperParams, read_mapping  # noqa: E402
from locft_easyedit.modeling.loading import load_model  # noqa: E402
from locft_easyedit.utils.files import output_errors, write_atomically  # noqa: E402
from locft_easyedit.utils.output import write_json, write_picture  # noqa: E402
from locft_easyedit.utils.plotting import (  # noqa: E402
    legend_below,
    look,
    new_figure,
    open_axes,
    plain_log_ticks,
)

HPARAMS = BENCHMARKS / "generalization.yaml"
# Key -> how a picture's axis calls it.
FIGURES = {
    "reliability": "reliability, % ↑",
    "generalization": "generalization, % ↑",
    "capability": "capability, % ↑",
    "kl": "KL on locality prompts, nats ↓",
}


@dataclass
class Study:
    """A claim of the paper, and what it is tried with.

    Attributes:
        doc: The script's docstring.
        title: What the picture shows.
        paper: What the paper says, in a sentence.
        variants: Name -> changes of the hyper-parameters, as `--set` has them.
        axis: What the x axis counts.
        x: A row's place on it: a number, or a text where the axis has names.
        series: Which line of the picture a row belongs to.
        claim: Says of the rows whether the claim is seen: a sentence for each file.
        n: Edits together.
        made: Makes files of edits of those that were given: called with the options and the folder
            they go to, returns their paths.
        found: What a run's line says of it, as generalization.make_runs takes it.
        log_x: Whether the x axis is logarithmic.
    """

    doc: str
    title: str
    paper: str
    variants: dict[str, str]
    axis: str
    x: Callable[[dict], float | str]
    claim: Callable[[list[dict]], list[str]]
    series: Callable[[dict], str] = lambda row: file_of(row)
    n: tuple[int, ...] = (100,)
    made: Callable | None = None
    found: Callable = lambda bench, hparams: bench.run(hparams)
    log_x: bool = False

    def main(self):
        """Makes the runs that are not there yet, and what is made of all of them."""
        options = self.arguments()
        try:
            folder = Path(options.output)
            if not options.draw_only:
                if self.made is not None and options.data:
                    options.data = self.made(options, folder)
                generalization.make_runs(options, self.found)
            print(self.report(folder))
        except LocFTError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: {error}")

    def arguments(self):
        parser = argparse.ArgumentParser(description=self.doc.split("\n")[0])
        parser.add_argument("--model", help="folder (that of the hparams)")
        parser.add_argument("--hparams", default=str(HPARAMS),
                            help="YAML with what all runs have in common")  # fmt: skip
        parser.add_argument("--data", nargs="+", default=[], help="files with edits")
        parser.add_argument("--n", type=int, nargs="+", default=list(self.n), help="edits together")
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--only", nargs="+", default=[], choices=list(self.variants),
                            help="some of the variants")  # fmt: skip
        parser.add_argument("--all", default="", metavar="KEY=VALUE,...",
                            help="changes of the hyper-parameters that all runs have")  # fmt: skip
        parser.add_argument("--half", default="report", help="report or choose")
        parser.add_argument("--output", required=True, help="folder for runs, table and picture")
        parser.add_argument("--draw-only", action="store_true", help="of the runs that are there")
        options = parser.parse_args()
        names = options.only or list(self.variants)
        changes = {name: self.variants[name] for name in names}
        options.set = [f"{name}:{','.join(filter(None, [changes[name], options.all]))}"
                       for name in names]  # fmt: skip
        options.variants, options.measure = [], [CAPABILITY]
        options.stats_dir = "data/stats"
        return options

    def report(self, folder):
        """Writes summary.json, table.md and study.png; returns the table and the verdict."""
        runs = report.some_runs_in(folder)
        rows = report.summaries(runs)
        said = self.claim([row for row in rows if row["figures"]])
        write_json(folder / "summary.json", {"rows": rows, "paper": self.paper, "seen": said})
        table = report.markdown(rows, [])
        text = "\n".join([table, f"The paper: {self.paper}", "", *said, ""])
        with output_errors(folder / "table.md"):
            write_atomically(folder / "table.md", text.encode())
        if any(row["figures"] for row in rows):
            write_picture(folder / "study.png", self.picture(rows, runs[0]["model"]))
        return "\n".join([report.terminal(rows, []), "", f"The paper: {self.paper}", *said])

    def picture(self, rows, model):
        """A panel for each figure, a line for each series, the spread over seeds as bars."""
        keys = [key for key in FIGURES if any(key in row["figures"] for row in rows)]
        figure = new_figure(4.0 * len(keys), 4.4, [f"{model}: {self.title}"])
        names = list(dict.fromkeys(self.series(row) for row in rows))
        places = list(dict.fromkeys(self.x(row) for row in rows))
        named = isinstance(places[0], str)
        handles = {}
        for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            open_axes(axes)
            factor = 1 if key == "kl" else 100
            for i, name in enumerate(names):
                own = [row for row in rows if self.series(row) == name and key in row["figures"]]
                if not own:
                    continue
                xs = [places.index(self.x(row)) if named else self.x(row) for row in own]
                means = [factor * row["figures"][key]["mean"] for row in own]
                spread = [factor * (row["figures"][key]["sd"] or 0) for row in own]
                colour, marker = look(i)
                order = sorted(range(len(xs)), key=xs.__getitem__)
                handles[name] = axes.errorbar(
                    [xs[k] for k in order], [means[k] for k in order],
                    yerr=[spread[k] for k in order], color=colour, marker=marker, capsize=2.5,
                    linestyle="none" if named else "-", label=name,
                )  # fmt: skip
            axes.set(xlabel=self.axis, ylabel=FIGURES[key])
            if factor == 100:
                axes.set_ylim(-4, 104)
            if named:
                axes.set_xticks(range(len(places)), places, rotation=30, ha="right")
                axes.set_xlim(-0.5, len(places) - 0.5)
            elif self.log_x:
                axes.set_xscale("log")
                axes.set_xlim(min(places) / 1.3, max(places) * 1.3)
                plain_log_ticks(axes.xaxis)
        legend_below(figure, list(handles.values()))
        return figure


def loaded(options):
    """The model that all runs begin with, and its tokenizer."""
    values = read_mapping(options.hparams)[1]
    values |= {"model_name": options.model} if options.model else {}
    return load_model(LocFTBFHyperParams.from_mapping(values, source=options.hparams))


def rewritten(options, folder, suffix, change_):
    """Writes each file with its requests changed, beside the file itself; returns the paths.

    Args:
        options: What was asked for.
        folder: Where the new files go.
        suffix: What is added to a file's name.
        change_: Changes a file's requests in place.
    """
    paths = []
    for path in options.data:
        requests = read_requests(path)
        change_(requests)
        new = folder / f"{Path(path).stem}{suffix}.json"
        with output_errors(new):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(new, json.dumps(requests, ensure_ascii=False).encode())
        paths += [path, str(new)]
    return paths


def file_of(row):
    """A row's file, without its ending."""
    return Path(row["data"]).stem


def by_file(rows):
    """Rows of the same file together: (its name, the rows)."""
    for own in report.grouped(rows, "data").values():
        yield file_of(own[0]), own


def percent(row, key="reliability"):
    """A row's mean as a percentage; NaN where it was not measured."""
    found = row["figures"].get(key)
    return math.nan if found is None else 100 * found["mean"]


def mean(row, key):
    """A row's mean; NaN where it was not measured."""
    return row["figures"][key]["mean"] if key in row["figures"] else math.nan


def changes(before, after):
    """How the figures between 0 and 1 and the KL differ between two rows, as a text."""
    parts = [
        f"{key} {percent(before, key):.1f} -> {percent(after, key):.1f} %"
        for key in ("reliability", "generalization", "capability")
        if key in before["figures"] and key in after["figures"]
    ]
    return ", ".join([*parts, f"KL {mean(before, 'kl'):.3g} -> {mean(after, 'kl'):.3g}"])


def verdict(seen):
    """The word for whether a claim is seen."""
    return "Seen" if seen else "Not seen"
