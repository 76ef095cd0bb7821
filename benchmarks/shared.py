"""What the benchmarks share: their common arguments, interleaved timing, figures as JSON."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from locft_easyedit.cli.demo import FACTS

RUNS = Path(__file__).resolve().parent / "results" / "runs"
OPTIONS = {
    "model": {"default": "models/SmolLM2-135M-Instruct", "help": "folder of the model"},
    "template": {
        "default": "model.layers.{}.mlp.down_proj.weight",
        "help": "name of the trained matrix, with {} for the layer",
    },
    "data": {"default": str(FACTS), "help": "JSON file with edits (the demo's facts)"},
    "device": {"help": "cpu, cuda, cuda:N (a GPU if there is one)"},
    "row-tokens": {"type": int, "default": 64, "help": "most tokens of a packed row"},
    "preserve-dir": {"help": "where what LocFT-BF+ measures once is kept"},
}


def parser_of(doc, *names):
    """Returns a parser with those of `OPTIONS` that are named, and `--json`.

    Args:
        doc: The script's docstring; its first line is the description.
        names: Keys of `OPTIONS`.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.add_argument(
        "--json", nargs="?", const=str(RUNS / f"{Path(sys.argv[0]).stem}.json"), metavar="FILE",
        help="also write the figures, without FILE into benchmarks/results/runs/",
    )  # fmt: skip
    return parser


def write_figures(options, figures, **more):
    """Writes figures, with the options and torch's version, if `--json` asks for it."""
    if options.json is None:
        return
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"figures": figures, **more, "options": vars(options), "torch": torch.__version__}
    path.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")


def synchronize(device):
    """Waits for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(action, device):
    """Returns the seconds that an action takes, until the device is done, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = action()
    synchronize(device)
    return time.perf_counter() - start, result


def interleaved(steps, repeats, device, after_round=lambda: None):
    """Takes each step in turn, `repeats` times after a round that only warms up.

    Returns:
        The median seconds of each step, and each one's losses in the order of the rounds.
    """
    seconds, losses = {name: [] for name in steps}, {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            taken, loss = timed(step, device)
            seconds[name].append(taken)
            losses[name].append(loss)
        after_round()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}, losses


def matmul_rate(device, dtype):
    """Returns the machine's own best rate for matrix products, in FLOP/s."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    return max(2 * n**3 / timed(lambda: a @ a, device)[0] for _ in range(4))
