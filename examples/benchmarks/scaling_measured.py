"""What plans for several GPUs rest on, against small runs on this machine. See `scaling.py`.

    python examples/benchmarks/scaling.py --measure models/SmolLM2-135M-Instruct \
        --what links shares steps

`links`   two processes exchange gradients over gloo; the model's rate is measured in the same run,
          by sending a text of the same size both ways at one time.
`shares`  the largest part of real mini-batches of real edits, in edits and in tokens, against what
          chance is computed to give; no processes are needed.
`steps`   seconds a step of one process and of two, one thread each, started with accelerate.

Everything is a ratio of two figures of one run: seconds alone say something about this machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from locft_easyedit.data import read_requests
from locft_easyedit.demo.run import FACTS
from locft_easyedit.plan.cost import ring_seconds
from locft_easyedit.plan.setting import largest_share
from locft_easyedit.report import prepare_folder
from locft_easyedit.requests import distinct_edits
from locft_easyedit.tokens import tokenize_edits

# Bytes of float32 gradients: down-projections of SmolLM2-135M, of a 3B and of an 8B model.
GRADIENTS = (4 * 576 * 1536, 4 * 3072 * 8192, 4 * 4096 * 14336)
REPEATS = 5
RANKS = (2, 8, 64)
EPOCHS = 300
LAYER = 20


def main(options):
    data = options.data or [str(FACTS)]
    found = {}
    if "links" in options.what:
        found["links"] = links()
    if "shares" in options.what:
        found["shares"] = [row for path in data for row in shares(options.measure, path, options)]
    if "steps" in options.what:
        exchange = found.get("links") or links()
        found["steps"] = steps(options.measure, data[0], exchange)
    if options.output:
        path = prepare_folder(options.output) / "scaling_measured.json"
        path.write_text(json.dumps(found | {"options": vars(options)}, indent=2), encoding="utf-8")
        print(f"written: {path}")


def links(sizes=GRADIENTS):
    """Prints and returns the seconds of all-reduces of two processes, measured and modelled."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(exchange, (folder, sizes), nprocs=2)
        rows = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    print(f"{'gradients':>12} {'link':>12} {'all-reduce':>12} {'modelled':>12} {'ratio':>7}")
    for row in rows:
        row["modelled_seconds"] = ring_seconds(row["bytes"], 2, row["gb_per_second"])
        row["ratio"] = row["seconds"] / row["modelled_seconds"]
        print(f"{row['bytes'] / 2**20:8.1f} MiB {row['gb_per_second']:7.2f} GB/s "
              f"{1000 * row['seconds']:9.2f} ms {1000 * row['modelled_seconds']:9.2f} ms "
              f"{row['ratio']:7.2f}")  # fmt: skip
    return rows


def exchange(rank, folder, sizes):
    """Measures, in one of two processes, the rate of the link and all-reduces."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    rows = []
    for size in sizes:
        gradients, received = torch.ones(size // 4), torch.empty(size // 4)

        def both_ways(sent=gradients, received=received):
            for work in (dist.isend(sent, 1 - rank), dist.irecv(received, 1 - rank)):
                work.wait()

        # By turns, so that what else the machine does hits both.
        seconds = {both_ways: [], lambda given=gradients: dist.all_reduce(given): []}
        for _ in range(1 + REPEATS):
            for do, taken in seconds.items():
                dist.barrier()
                start = time.perf_counter()
                do()
                taken.append(time.perf_counter() - start)
        sending, reducing = (float(np.median(taken[1:])) for taken in seconds.values())
        rows.append({"bytes": size, "gb_per_second": size / sending / 1e9, "seconds": reducing})
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def shares(model, path, options, ranks=RANKS, epochs=EPOCHS):
    """Prints and returns the largest parts of real mini-batches, measured and computed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    edits = distinct_edits(read_requests(path), None).edits
    texts = tokenize_edits(tokenizer, edits, append_eos=True, max_positions=None)
    lengths = texts.input_lengths
    spread = float(lengths.std() / lengths.mean())
    print(f"\n{Path(path).name}: {len(edits)} edits of {lengths.mean():.1f} tokens, standard "
          f"deviation {spread:.2f} of that; {epochs} epochs")  # fmt: skip
    print(f"{'batch':>6} {'ranks':>6} {'computed':>9} {'in edits':>9} {'ratio':>7} {'+-':>6} "
          f"{'in tokens':>10} {'ratio':>7}")  # fmt: skip
    rows = []
    for batch in sorted({b for b in options.batches if b <= len(edits)} | {min(100, len(edits))}):
        for n in ranks:
            in_edits, in_tokens = parts(lengths, batch, n, epochs)
            even = min(batch, len(edits)) / n
            row = {
                "data": Path(path).name, "batch": batch, "ranks": n,
                "computed": largest_share(len(edits), batch, n).mean / even,
                "in_edits": float(in_edits.mean()) / even,
                "standard_error": float(in_edits.std() / len(in_edits) ** 0.5) / even,
                "in_tokens": float(in_tokens.mean()) * n,
            }  # fmt: skip
            row["ratio"] = row["in_edits"] / row["computed"]
            row["ratio_in_tokens"] = row["in_tokens"] / row["computed"]
            rows.append(row)
            print(f"{batch:6} {n:6} {row['computed']:9.3f} {row['in_edits']:9.3f} "
                  f"{row['ratio']:7.3f} {row['standard_error'] / row['computed']:6.3f} "
                  f"{row['in_tokens']:10.3f} {row['ratio_in_tokens']:7.3f}")  # fmt: skip
    return rows


def parts(lengths, batch, ranks, epochs):
    """Returns, for every whole mini-batch, the most edits of a rank and the most of its tokens.

    Edits are dealt out in turn by length, and shuffled as training shuffles them.
    """
    owner = np.empty(len(lengths), dtype=int)
    owner[np.argsort(-lengths, kind="stable")] = np.arange(len(lengths)) % ranks
    generator = torch.Generator().manual_seed(0)
    in_edits, in_tokens = [], []
    for _ in range(epochs):
        order = torch.randperm(len(lengths), generator=generator).numpy()
        for start in range(0, len(order) - batch + 1, batch):
            here = order[start : start + batch]
            in_edits.append(np.bincount(owner[here], minlength=ranks).max())
            tokens = np.bincount(owner[here], weights=lengths[here], minlength=ranks)
            in_tokens.append(tokens.max() / tokens.sum())
    return np.array(in_edits), np.array(in_tokens)


def steps(model, path, exchange, n=40, batch=20, epochs=3, repeats=3):
    """Prints and returns the seconds a step of one process and of two, one thread each.

    By turns, and the quickest of each: what else runs on the machine makes steps longer only. Two
    processes need two cores to themselves; with less this says nothing.
    """
    taken = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            for processes, seconds in taken.items():
                output = Path(folder) / f"{processes}-{number}"
                seconds.append(trained(model, path, n, batch, epochs, processes, output))
    n_steps = epochs * n / batch
    one, two = (min(seconds) / n_steps for seconds in taken.values())
    share = largest_share(n, batch, 2).mean / batch
    # The place's gradients are the smallest that were exchanged.
    found = {
        "seconds_a_step": {p: [s / n_steps for s in seconds] for p, seconds in taken.items()},
        "measured": two / one, "modelled": share + exchange[0]["seconds"] / one,
        "load": os.getloadavg()[0], "cores": os.cpu_count(),
    }  # fmt: skip
    print(f"\nTwo processes take {found['measured']:.2f} of one's time for a step of {batch}; the "
          f"plan's terms give {found['modelled']:.2f} (the larger part of the mini-batch, "
          f"{share:.2f}, and the exchange).")  # fmt: skip
    if found["load"] > found["cores"]:
        print(f"But {found['load']:.1f} programs wanted {found['cores']} cores: this says little.")
    return found


def trained(model, path, n, batch, epochs, processes, output):
    """Returns the seconds that `locft edit` trains with so many processes."""
    # With `--cpu` accelerate starts one process; where there is no GPU these are several on a CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
              "--num_machines", "1", "--num_processes", str(processes), "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0",
              "--num_cpu_threads_per_process", "1", "-m"]  # fmt: skip
    keys = [
        "edit", "--config-name", "smollm2-135m", f"model_name={Path(model).resolve()}",
        f"data={Path(path).resolve()}", f"n={n}", f"batch_size={batch}", f"num_steps={epochs}",
        "batch_loss_threshold=0", "epoch_loss_threshold=0", f"layers=[{LAYER}]", "device=cpu",
        "health_check=false", "save=none", f"output={output}",
    ]  # fmt: skip
    start = launch if processes > 1 else [sys.executable, "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([*start, "locft_easyedit", *keys], env=environment, capture_output=True,
                         text=True, cwd=output.parent)  # fmt: skip
    if ran.returncode:
        sys.exit(f"{processes} processes failed:\n{ran.stderr[-3000:]}")
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return metrics["training"]["seconds"]["train"]
