"""How time and peak memory grow with the number of edits, the place and the number of layers.

    python benchmarks/growth.py --edits 1000 10000 100000 --host-gib 1

A whole run each time, as `locft edit` makes it: checks and tokens, frozen prefix, one epoch, all
metrics before and after, `metrics.json`. The model is a small llama of random weights, the edits
random words in the lengths of ZsRE's (15.6 tokens, 4.3 of them the target and its end), with a
rephrase and a locality prompt each: nothing is downloaded. Every number of edits has a process of
its own; its peaks are what Linux counted (VmHWM), phase by phase where this may be set back, and
the largest of many samples of the memory that no file stands for (RssAnon). Hidden states may take
`--host-gib`; the rest of them goes to disk. Exponents are those between two numbers of edits: 1 is
proportional. Times are of one run on one machine; `--cpu` counts the processor's, which other
programs on the machine change less.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from random_inputs import random_model, random_requests, word_tokenizer
from shared import parser_of, write_figures

from locft_easyedit import api as pipeline
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.training import session as editing

GIB = 2**30
PHASES = ("tokens", "prefix", "before", "epoch", "after", "report")


def main():
    options = arguments()
    if options.one is not None:
        one_run(options)
        return
    figures = {"edits": [], "places": [], "layers": []}
    if options.edits:
        rows = figures["edits"]
        for n in options.edits:
            rows.append(in_process(options, n))
            print_row(rows, n)
        print_bytes(rows)
        write_figures(options, figures)
    for name, cases in (
        ("places", [(options.sweep_layers, layer) for layer in options.places]),
        ("layers", [(n_layers, n_layers - 1) for n_layers in options.layer_counts]),
    ):
        print(f"\n{'layers':>7} {'place':>6} {'prefix s':>9} {'epoch s':>8} {'states MiB':>11}")
        for n_layers, layer in cases:
            row = in_process(options, options.sweep_edits, n_layers, layer, measure=False)
            figures[name].append(row)
            print(f"{n_layers:7} {layer:6} {row['seconds']['prefix']:9.2f} "
                  f"{row['seconds']['epoch']:8.2f} {row['state_bytes'] / 2**20:11.1f}",
                  flush=True)  # fmt: skip
    write_figures(options, figures)


def arguments():
    parser = parser_of(__doc__)
    numbers = [100, 1000, 10_000, 30_000, 100_000]
    parser.add_argument("--edits", type=int, nargs="*", default=numbers)
    parser.add_argument("--host-gib", type=float, default=1.0, help="for hidden states, in memory")
    parser.add_argument("--folder", help="where states and results go (a temporary folder)")
    parser.add_argument("--hidden", type=int, default=128, help="the model's width, in 64s")
    parser.add_argument("--inner", type=int, default=256, help="the width within its MLPs")
    parser.add_argument("--words", type=int, default=1024, help="its vocabulary")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--layer", type=int, default=1, help="the place")
    parser.add_argument("--cut", default="matrix", help="where the prefix ends; wide is `matrix`")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--sweep-edits", type=int, default=2000, help="for the two small tables")
    parser.add_argument("--sweep-layers", type=int, default=8)
    parser.add_argument("--places", type=int, nargs="*", default=[0, 2, 4, 6, 7])
    parser.add_argument("--layer-counts", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--no-metrics", action="store_true", help="train only")
    parser.add_argument(
        "--cpu", action="store_true", help="seconds of the processor, not the clock"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(options, n, n_layers=None, layer=None, measure=True):
    """The figures of one run, in a fresh process."""
    given = {
        "hidden": options.hidden, "inner": options.inner, "words": options.words,
        "layers": n_layers or options.layers, "layer": options.layer if layer is None else layer,
        "cut": options.cut, "batch": options.batch, "eval-batch": options.eval_batch,
        "host-gib": options.host_gib, "one": n,
    }  # fmt: skip
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    if options.cpu:
        flags.append("--cpu")
    if not measure or options.no_metrics:
        flags.append("--no-metrics")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, __file__, *flags, "--folder", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_row(rows, n):
    row, before = rows[-1], rows[-2] if len(rows) > 1 else None
    if before is None:
        names = "".join(f"{phase:>10}" for phase in PHASES)
        print(f"{'edits':>8}{names}{'all s':>10} |{'peak GiB':>9}{'anon GiB':>9}{'states GiB':>11}"
              f"{'of it in memory':>16}")  # fmt: skip
    seconds = "".join(f"{row['seconds'].get(phase, 0):10.2f}" for phase in PHASES)
    print(f"{n:8}{seconds}{sum(row['seconds'].values()):10.1f} |{row['peak'] / GIB:9.2f}"
          f"{row['peak_anon'] / GIB:9.2f}{row['state_bytes'] / GIB:11.2f}"
          f"{row['states_in_memory'] / GIB:16.2f}", flush=True)  # fmt: skip
    if before is not None:
        growth = math.log(row["edits"] / before["edits"])

        def exponent(new, old):
            return f"{math.log(max(new, 1e-9) / max(old, 1e-9)) / growth:10.2f}"

        pairs = [(row["seconds"].get(p, 0), before["seconds"].get(p, 0)) for p in PHASES]
        totals = sum(row["seconds"].values()), sum(before["seconds"].values())
        print(f"{'exponent':>8}" + "".join(exponent(*p) for p in [*pairs, totals]), flush=True)


def print_bytes(rows):
    """What an edit takes beside hidden states, from the first to the last number of edits."""
    if len(rows) < 2:
        return
    first, last = rows[0], rows[-1]
    n = last["edits"] - first["edits"]
    print(f"\nBytes an edit, from {first['edits']} to {last['edits']}:")
    print(f"  the requests themselves {(last['requests'] - first['requests']) / n:8.0f}")
    for phase in PHASES:
        if phase in last["phases"]:
            laps = [row["phases"][phase] for row in (first, last)]
            one, other = (lap["anon"] - lap["states"] for lap in laps)
            print(f"  {phase:8} at its peak       {(other - one) / n:8.0f}")


# What follows runs in a process of its own.


def one_run(options):
    if options.cpu:
        time.perf_counter = time.process_time
    model = random_model(options.words, options.hidden, options.inner, options.layers)
    tokenizer = word_tokenizer(options.words)
    memory = Memory()
    base = memory.now()
    requests = random_requests(options.one, options.words)
    memory.lap("requests", (0, 0, 0))
    hparams = LocFTBFHyperParams(
        layers=[options.layer], rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight", lr=1e-3,
        num_steps=1, batch_size=options.batch, eval_batch_size=options.eval_batch,
        prefix_cut=options.cut, prefix_host_gib=options.host_gib, prefix_dir=None,
        epoch_loss_threshold=0.0, batch_loss_threshold=0.0,
    )  # fmt: skip
    tempfile.tempdir = options.folder
    budgets = []

    class Seen(editing.Budget):
        def __init__(self, *given):
            super().__init__(*given)
            budgets.append(self)

    class Watch(pipeline.Stopwatch):
        """Measures memory where a phase ends."""

        def lap(self, phase):
            super().lap(phase)
            memory.lap(phase, budgets[-1].taken)

    editing.Budget, pipeline.Stopwatch = Seen, Watch
    requested = memory.laps["requests"]["left"] - base
    watch = Watch()
    if options.no_metrics:
        with editing.EditSession(model, tokenizer, requests, hparams, progress=False) as session:
            watch.lap("checks and frozen prefix")
            result = session.train_()
            watch.lap("training")
        seconds = {}
    else:
        run = pipeline.edit_and_measure(model, tokenizer, requests, hparams, progress=False)
        result, seconds = run.result, run.seconds
        watch = Watch()
        pipeline.write_run(Path(options.folder) / "results", run, hparams, save="none")
        watch.lap("report")
        seconds["report"] = watch.seconds["report"]
    timings = result.timings
    columns = {
        "tokens": timings["prepare"], "prefix": timings["prefix"],
        "before": seconds.get("metrics before", 0.0), "epoch": timings["train"],
        "after": seconds.get("metrics after", 0.0), "report": seconds.get("report", 0.0),
    }  # fmt: skip
    names = {"prefix": "checks and frozen prefix", "before": "metrics before", "epoch": "training",
             "after": "metrics after", "report": "report"}  # fmt: skip
    memory.stop()
    laps = {short: memory.laps[long] for short, long in names.items() if long in memory.laps}
    most = {
        key: max(lap[key] for lap in memory.laps.values()) for key in ("anon", "file", "states")
    }
    held = laps.get("before", laps.get("prefix", laps["epoch"]))
    print(json.dumps({
        "edits": options.one, "layers": options.layers, "layer": options.layer, "seconds": columns,
        "peak": memory.peak(), "peak_anon": most["anon"], "peak_file": most["file"], "base": base,
        "requests": requested, "states_in_memory": most["states"], "phases": laps,
        "state_bytes": held["states"] + held["disk"], "torch": torch.__version__,
    }))  # fmt: skip


class Memory:
    """What this process takes: at its peak in each phase, and where the phase ends."""

    def __init__(self):
        self.laps, self._high = {}, 0
        self._anon = self._file = 0
        self._resettable = True
        self._running = True
        self._reset()
        threading.Thread(target=self._sample, daemon=True).start()

    def now(self):
        return status()["RssAnon"]

    def lap(self, phase, taken):
        found = status()
        self._see(found)
        self._high = max(self._high, found["VmHWM"])
        self.laps[phase] = {
            "peak": found["VmHWM"] if self._resettable else None, "anon": self._anon,
            "file": self._file, "left": found["RssAnon"], "states": taken[1], "disk": taken[2],
        }  # fmt: skip
        self._reset()

    def peak(self):
        return max(self._high, status()["VmHWM"])

    def stop(self):
        self._running = False

    def _see(self, found):
        self._anon = max(self._anon, found["RssAnon"])
        self._file = max(self._file, found["RssFile"] + found["RssShmem"])

    def _sample(self):
        while self._running:
            self._see(status())
            time.sleep(0.05)

    def _reset(self):
        self._anon = self._file = 0
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._resettable = False


def status():
    """Bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {k: int(v.split()[0]) * 1024 for k, v in fields.items() if k.startswith(("Vm", "Rss"))
            and v.strip().endswith("kB")}  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
