"""The runs that generalization.py has made: their file, tables and verdicts."""

import json
import math
import os
import statistics

import generalization_picture
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from locft_easyedit.errors import DataError
from locft_easyedit.utils.files import output_errors, write_atomically
from locft_easyedit.utils.output import write_json, write_picture
from locft_easyedit.utils.tables import markdown_text, one_line

RUNS = "runs.jsonl"
BASELINE = "published"
RELIABLE = 0.99
# Key, head, factor and decimals; `None` decimals are three digits.
COLUMNS = (
    ("reliability", "reliability %", 100, 1),
    ("generalization", "generalization %", 100, 1),
    ("portability", "portability %", 100, 1),
    ("locality", "locality %", 100, 1),
    ("capability", "capability %", 100, 1),
    ("wrappers", "in wrappers %", 100, 1),
    ("chat", "chat %", 100, 1),
    ("chat_system", "chat, system prompt %", 100, 1),
    ("chat_later", "chat, later turn %", 100, 1),
    ("chat_generalization", "chat, generalization %", 100, 1),
    ("kl", "KL, nats", 1, None),
    ("chat_kl", "KL in chat, nats", 1, None),
    ("ppl_ratio", "perplexity ×", 1, None),
    ("epochs", "epochs", 1, 1),
    ("train_seconds", "training s", 1, None),
    ("preserve_seconds", "preserve s", 1, None),
    ("seconds", "whole edit s", 1, None),
)
LEGEND = (
    "Mean ± sample standard deviation over the seeds. Reliability and generalization: generated "
    "answers that match exactly, to the edits' prompts and to the data's rephrase prompts; in "
    "wrappers and in chat: those of `locft evaluate`, none of them trained but the chat template. "
    "Portability and locality: EasyEdit's, by tokens. Next token kept, KL: on the locality "
    "prompts, against the model before the edit. Perplexity: of a fixed text, after / before. "
    "Seconds are of all edits of a run together."
)


def append(folder, line):
    """Adds a run's line."""
    path = folder / RUNS
    text = json.dumps(line, allow_nan=False) + "\n"
    with output_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def runs_in(folder):
    """The runs that are there; a line that is still being written is none."""
    path = folder / RUNS
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Remove the line, or the file.") from error


def some_runs_in(folder):
    """The runs that are there; none is an error."""
    runs = runs_in(folder)
    if not runs:
        raise DataError(f"{folder / RUNS} holds no runs. Make some first, without `--draw-only`.")
    return runs


def drop_torn_line_(folder):
    """Removes the end of a line whose writing was cut off."""
    path = folder / RUNS
    if path.is_file():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with output_errors(path):
                write_atomically(path, whole)


def write_report(folder):
    """Writes summary.json, table.md and front.png; returns the tables for the terminal."""
    runs = some_runs_in(folder)
    rows, judged = summaries(runs), verdicts(runs)
    write_json(folder / "summary.json", {"rows": rows, "verdicts": judged})
    with output_errors(folder / "table.md"):
        write_atomically(folder / "table.md", markdown(rows, judged).encode())
    figure = generalization_picture.picture(by_case(rows), runs[0]["model"])
    write_picture(folder / "front.png", figure)
    return terminal(rows, judged)


def grouped(items, *keys):
    """Items with the same values of some keys, in the order of their coming."""
    found = {}
    for item in items:
        found.setdefault(tuple(item[key] for key in keys), []).append(item)
    return found


def summaries(runs):
    """A row for each data, half, number of edits and variant: figures over the seeds."""
    rows = []
    for (data, half, n, variant), group in by_case(runs, "variant").items():
        done = [run for run in group if not run["diverged"]]
        figures = {}
        for key, *_ in COLUMNS:
            values = [run["figures"][key] for run in done if key in run["figures"]]
            if values:
                figures[key] = spread(values)
        rows.append({
            "data": data, "half": half, "n": n, "variant": variant,
            "measured": sorted({run["measured"] for run in group}),
            "seeds": sorted(run["seed"] for run in group),
            "diverged": len(group) - len(done),
            "not_finite": sorted({key for run in done for key in run["not_finite"]}),
            "converged": sum(run["converged"] for run in done), "figures": figures,
        })  # fmt: skip
    return rows


def by_case(items, *more):
    """Items of the same file, half and number of edits, files together and small numbers first."""
    files = list(grouped(items, "data", "half"))
    order = sorted(items, key=lambda one: (files.index((one["data"], one["half"])), one["n"]))
    return grouped(order, "data", "half", "n", *more)


def spread(values):
    """Mean and sample standard deviation, which one value does not have."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": values}


def verdicts(runs):
    """What each variant does beside the published method, over the seeds that both have."""
    found = []
    for (data, half, n), group in by_case(runs).items():
        variants = {
            name: {run["seed"]: run["figures"] for run in own if not run["diverged"]}
            for (name,), own in grouped(group, "variant").items()
        }
        baseline = variants.pop(BASELINE, {})
        for name, own in variants.items():
            seeds = sorted(own.keys() & baseline.keys())
            pairs = [(own[seed], baseline[seed]) for seed in seeds]
            if pairs:
                case = {"data": data, "half": half, "n": n, "variant": name, "seeds": seeds}
                found.append(case | verdict(pairs))
    return found


def verdict(pairs):
    """Compares figures with the published method's, seed by seed."""

    def both(key):
        return [(a[key], b[key]) for a, b in pairs if key in a and key in b]

    points = [100 * (a - b) for a, b in both("generalization")]
    moved, baseline = (sum(pair[i] for pair in both("kl")) for i in range(2))
    reliability = [own["reliability"] for own, _ in pairs if "reliability" in own]
    mean = statistics.fmean(reliability) if reliability else None
    return {
        "points": spread(points) if points else None,
        "kl_ratio": moved / baseline if baseline else None,
        "reliability": mean,
        "reliable": mean is not None and round(mean, 9) >= RELIABLE,  # means are not exact
    }


def told(judged):
    """A verdict as a sentence."""
    points, ratio = judged["points"], judged["kl_ratio"]
    parts = []
    if points is not None:
        more = cell(points, 1, 1, sign="+")
        parts.append(f"{more} points of generalization against {BASELINE}")
    if ratio is not None:
        parts.append(f"{ratio:.3g} times its KL")
    if judged["reliability"] is not None:
        reached = "at least" if judged["reliable"] else "below"
        parts.append(
            f"reliability {100 * judged['reliability']:.1f} % ({reached} {100 * RELIABLE:.0f} %)"
        )
    return f"{judged['variant']}: {'; '.join(parts) or 'no figures'}."


def title(rows):
    """The heading of a table, of the rows of one case."""
    row, measured = rows[0], sorted({number for row in rows for number in row["measured"]})
    numbers = " to ".join(f"{number:,}" for number in dict.fromkeys((measured[0], measured[-1])))
    return f"{row['data']}, {row['n']:,} edits; measured on {numbers}, {row['half']} half"


def heads(rows):
    """The columns that have a figure."""
    return [column for column in COLUMNS if any(column[0] in row["figures"] for row in rows)]


def cells(row, columns):
    """A row's texts: the variant first, with how many of its seeds diverged."""
    name = row["variant"]
    if row["diverged"]:
        name += f" ({row['diverged']} of {len(row['seeds'])} diverged)"
    if row["not_finite"]:
        name += f" (not finite: {', '.join(row['not_finite'])})"
    figures = [(row["figures"].get(key), factor, places) for key, _, factor, places in columns]
    return [name, *("-" if found is None else cell(found, *how) for found, *how in figures)]


def cell(found, factor, places, sign=""):
    """Mean ± standard deviation; of three digits the mean has, the deviation has as many places."""
    mean, sd = factor * found["mean"], found["sd"]
    if places is None:
        size = math.floor(math.log10(abs(mean))) if mean else 0
        places = min(max(2 - size, 0), 6)
    text = f"{mean:{sign}.{places}f}"
    return text if sd is None else f"{text} ± {factor * sd:.{places}f}"


def terminal(rows, judged):
    """All tables and verdicts as text."""
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        for case, group in by_case(rows).items():
            columns = heads(group)
            table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            table.add_column("variant", overflow="fold")
            for _, head, *_ in columns:
                table.add_column(head, justify="right")
            for row in group:
                table.add_row(*map(Text, cells(row, columns)))
            console.print(Text(one_line(title(group)), style="bold"))
            console.print(table)
            for one in judged:
                if (one["data"], one["half"], one["n"]) == case:
                    console.print(Text(told(one)))
            console.print()
        console.print(Text(LEGEND, style="dim"))
    return capture.get().rstrip()


def markdown(rows, judged):
    """The same for GitHub."""
    lines = []
    for case, group in by_case(rows).items():
        columns = heads(group)
        lines += [f"**{markdown_text(title(group))}**", ""]
        texts = [["variant", *(head for _, head, *_ in columns)]]
        texts += [cells(row, columns) for row in group]
        table = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in texts]
        lines += [table[0], "| :-- |" + " --: |" * len(columns), *table[1:], ""]
        own = [one for one in judged if (one["data"], one["half"], one["n"]) == case]
        lines += [f"- {markdown_text(told(one))}" for one in own] + [""]
    return "\n".join([*lines, LEGEND, ""])
