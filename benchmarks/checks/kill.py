"""Kills `locft edit` at random moments, starts it again, and compares the result bit for bit.

    python benchmarks/checks/kill.py --kills 50
    python benchmarks/checks/kill.py --kills 50 --model FOLDER --data zsre_1k.json --layer 27

First a run that nobody disturbs. Then the same command again and again, each time in a folder of
its own: it is ended by SIGKILL at a moment drawn at random from the whole run (start, frozen
prefix, metrics before, training with a checkpoint after every step, metrics after, writing), and
started again, several times, until it is left alone. After every kill all that lies in the folder
has to be whole; at the end matrices, losses and metrics have to be equal to the first run's.
Without `--model` the model is a small llama of random weights: nothing is downloaded. Exit status 1
if anything differs.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HPARAMS = """alg_name: LocFT-BF
model_name: {model}
device: cpu
layers: [{layer}]
rewrite_module_tmp: model.layers.{{}}.mlp.down_proj.weight
lr: {lr}
num_steps: {epochs}
batch_size: {batch_size}
batch_loss_threshold: 0
epoch_loss_threshold: 0
checkpoint_minutes: 0
"""
PRELOADED = ["locft_easyedit.cli.edit", "locft_easyedit.evaluation.report", "matplotlib.figure"]


def main():
    parser = parser_of(__doc__, kills=50, n=40, lr=1e-3, epochs=25, batch_size=8)
    parser.add_argument("--kills-a-run", type=int, default=5, help="at most")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for `locft edit`")
    with tempfile.TemporaryDirectory(prefix="locft-kill-") as scratch:
        return checked(parser.parse_args(), Path(scratch))


def parser_of(title, *, kills, n, lr, epochs, batch_size):
    """A parser of what a check by kills takes, with these defaults."""
    parser = argparse.ArgumentParser(description=title.split("\n")[0])
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder; default: a small llama of random weights")
    parser.add_argument("--data", help="a JSON file with edits; needed with --model")
    parser.add_argument("--n", type=int, default=n, help="edits")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", help="write the figures there")
    return parser


def checked(options, scratch):
    yaml, data = prepared(options, scratch)
    command = ["edit", "--config-name", yaml, f"data={data}", f"n={options.n}", *options.overrides]

    def run(folder, kill_after=None):
        return run_apart(context, [*command, f"output={folder}"], folder, kill_after)

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # each start costs no import
    run(scratch / "warm-up")
    start = time.perf_counter()
    status = run(scratch / "reference")
    seconds = time.perf_counter() - start
    if status != 0:
        print((scratch / "reference.log").read_text())
        raise SystemExit("The run that nobody disturbed failed.")
    expected = result_of(scratch / "reference")
    print(f"undisturbed: {seconds:.1f} s, {expected['steps']} steps", flush=True)

    draw = random.Random(options.seed)
    phases, wrong, runs, kills = Counter(), [], 0, 0
    while kills < options.kills:
        folder = scratch / f"run-{runs}"
        runs += 1
        for _ in range(options.kills_a_run):
            if run(folder, draw.uniform(0, seconds)) is not None:
                break  # it was done before
            kills += 1
            phase, problem = state_of(folder)
            phases[phase] += 1
            if problem:
                wrong.append(f"{folder.name}, killed {phase}: {problem}")
        status = run(folder)
        if status != 0:
            wrong.append(f"{folder.name}: exit status {status}\n{log_of(folder)}")
        else:
            wrong += [f"{folder.name}: {what}" for what in differences(folder, expected)]
        print(f"{runs} runs, {kills} kills, {len(wrong)} wrong", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    report(options, phases, wrong, runs, kills)
    return 1 if wrong else 0


def report(options, phases, wrong, runs, kills):
    print(f"\n{kills} kills in {runs} runs; killed")
    for phase, count in phases.most_common():
        print(f"{count:5}  {phase}")
    print("\n".join(wrong) or "every resumed run: matrices, losses and metrics equal bit for bit")
    if options.json:
        figures = {"kills": kills, "runs": runs, "phases": dict(phases), "wrong": wrong}
        Path(options.json).write_text(json.dumps(figures, indent=1))


def prepared(options, scratch):
    """Writes what commands need; returns the paths of the YAML and of the data."""
    model, data = options.model, options.data
    if model is None:
        model, data = scratch / "model", scratch / "edits.json"
        make_toy(options, model, data)
    yaml = scratch / "kill.yaml"
    values = {"model": Path(model).resolve(), "layer": options.layer, "lr": options.lr}
    values |= {"epochs": options.epochs, "batch_size": options.batch_size}
    yaml.write_text(HPARAMS.format(**values) + f"dtype: {options.dtype}\n")
    return str(yaml), Path(data).resolve()


def make_toy(options, folder, data):
    from random_inputs import random_model, random_requests, word_tokenizer

    words = 600
    random_model(words, hidden=64, inner=192, layers=4).save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    data.write_text(json.dumps(random_requests(options.n, words)))


def run_apart(context, arguments, folder, kill_after=None):
    """Runs `locft` in a process; returns its exit status, or `None` if it was killed."""
    process = context.Process(target=child, args=(arguments, str(log_path(folder))))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def child(arguments, log):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    from locft_easyedit.__main__ import main as locft

    sys.exit(locft(arguments))


def log_path(folder):
    return folder.with_name(folder.name + ".log")


def log_of(folder):
    return log_path(folder).read_text(errors="replace")[-2000:]


def state_of(folder):
    """Returns how far a killed run had come, and what is not whole in its folder."""
    from locft_easyedit.training.checkpoint_file import read_checkpoint
    from locft_easyedit.training.checkpoints import FILE_NAME

    if not (folder / "run.json").exists():
        return "before it had begun", None
    try:
        done = json.loads((folder / "run.json").read_text())["finished"]
        for path in folder.glob("*.json"):
            json.loads(path.read_text())
        for path in folder.glob("*.safetensors"):
            trained(path)
        checkpoint = folder / "checkpoint" / FILE_NAME
        progress = read_checkpoint(checkpoint).progress if checkpoint.exists() else None
    except Exception as error:
        return "in an unknown state", f"{type(error).__name__}: {error}"
    if done:
        return "after its end", None
    if progress is not None:
        after = "after training, while measuring or writing"
        return (after if progress.finished else "while training"), None
    measured = (folder / "checkpoint" / "before.jsonl").exists()
    return ("before the first step" if measured else "in prefix or metrics before"), None


def trained(path):
    from safetensors.torch import load_file

    return {k: v for k, v in load_file(path).items() if not k.startswith("original.")}


def result_of(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    [matrices] = folder.glob("*.safetensors")
    return {
        "matrices": trained(matrices),
        "losses": metrics["training"]["losses"],
        "records": metrics["records"],
        "steps": metrics["training"]["updates"],
    }


def differences(folder, expected):
    import torch

    found = result_of(folder)
    for name, value in expected["matrices"].items():
        if not torch.equal(found["matrices"][name], value):
            yield f"{name} differs"
    for part in ("losses", "records", "steps"):
        if found[part] != expected[part]:
            yield f"{part} differ"


if __name__ == "__main__":
    sys.exit(main())
