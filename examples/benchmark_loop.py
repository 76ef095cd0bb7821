"""Times a training step with and without the frozen prefix and packing, interleaved in one run.

    python examples/benchmark_loop.py --model models/SmolLM2-135M-Instruct --layer 27

All variants make the same steps on the same edits; their losses are compared. Times are medians
of one run on one machine: read the ratios, not the seconds.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from locft_easyedit.data import read_requests
from locft_easyedit.demo.run import FACTS
from locft_easyedit.editing import EditSession
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.models import load_model

VARIANTS = {
    "frozen prefix, packed": {},
    "frozen prefix, padded": {"packing": False},
    "full forward, packed": {"frozen_prefix": False},
    "full forward, padded": {"frozen_prefix": False, "packing": False},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--template", default="model.layers.{}.mlp.down_proj.weight")
    parser.add_argument("--layer", type=int, default=27)
    parser.add_argument("--data", default=str(FACTS), help="JSON file with edits")
    parser.add_argument("--n", type=int, default=100, help="edits, all in one mini-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()

    base = {
        "model_name": options.model,
        "layers": [options.layer],
        "rewrite_module_tmp": options.template,
        "lr": 1e-3,
        "batch_size": options.n,
        "device": options.device,
        "dtype": options.dtype,
    }
    model, tokenizer = load_model(LocFTBFHyperParams(**base))
    requests = read_requests(options.data, options.n)
    batch = np.arange(options.n)
    seconds = {name: [] for name in VARIANTS}
    losses, prefix = {}, 0.0
    for repeat in range(options.repeats + 1):  # the first round only warms up
        for name, changes in VARIANTS.items():
            hparams = LocFTBFHyperParams(**base, **changes)
            with EditSession(model, tokenizer, requests, hparams, progress=False) as session:
                runner = session._runner
                with runner.ready():
                    start = synchronized_time()
                    loss = runner.edit_losses(batch).mean()
                    loss.backward()
                    elapsed = synchronized_time() - start
                model.zero_grad(set_to_none=True)
                if repeat:
                    seconds[name].append(elapsed)
                losses[name] = loss.item()
                prefix = session.timings["prefix"] if name == "frozen prefix, packed" else prefix
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slowest = medians["full forward, padded"]
    print(f"{options.model}, layer {options.layer}, {len(batch)} edits in one mini-batch, "
          f"{options.dtype}, {torch.get_num_threads()} threads")  # fmt: skip
    for name, value in medians.items():
        print(
            f"{name:24s} {value:8.3f} s a step   {slowest / value:5.1f}x   loss {losses[name]:.5f}"
        )
    print(f"recording the prefix, once, with the probes of the model: {prefix:.1f} s")
    if options.json:
        figures = {"seconds": medians, "losses": losses, "prefix_seconds": prefix, **vars(options)}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


def synchronized_time():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
