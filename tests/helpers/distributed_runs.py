"""What the processes of tests/test_distributed.py do; each function runs as one rank."""

import json
import os
import signal
import time
from pathlib import Path

import torch

from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from locft_easyedit.api import edit_and_measure, edit_model
from locft_easyedit.distributed.world import get_world
from locft_easyedit.errors import LocFTError
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def edited(kind="llama", dtype="float32", n=14, **changes):
    """Returns a toy that was edited, and the result."""
    model = toy_model(kind).to(DTYPES[dtype])
    settings = {"batch_size": 4, "num_steps": 3, "lr": 5e-3} | changes
    hparams = toy_hparams(**{"rewrite_module_tmp": DOWN_PROJECTION[kind]} | settings)
    return model, edit_model(model, toy_tokenizer(), toy_requests(n), hparams, progress=False)


def edits(folder, cases):
    """Makes one edit after the other; rank 0 saves the matrices."""
    found = []
    for number, case in enumerate(cases):
        _, result = edited(**case)
        if get_world().is_main_process:
            torch.save(dict(result.new), Path(folder, f"{number}.pt"))
        sums = [float(value.double().sum()) for value in result.new.values()]
        found.append([result.losses, result.step_losses, result.n_updates, sums])
    return found


def failures(cases):
    """Returns what each rank meets when an edit cannot be made, and whether the model is whole."""
    found = []
    for everywhere, on_rank_1 in cases:
        model = toy_model()
        former = {name: p.detach().clone() for name, p in model.named_parameters()}
        values = everywhere | (on_rank_1 if get_world().rank == 1 else {})
        n, lr = values.pop("n", 14), values.pop("lr", 5e-3)
        hparams = toy_hparams(batch_size=4, num_steps=3, lr=lr, **values)
        try:
            edit_model(model, toy_tokenizer(), toy_requests(n), hparams, progress=False)
            message = ""
        except LocFTError as error:
            message = f"{type(error).__name__}: {error}"
        whole = all(torch.equal(former[name], p) for name, p in model.named_parameters())
        found.append([message, whole])
    return found


def measured(path, n):
    """Edits and measures records with all parts; returns what a run writes."""
    requests = json.loads(Path(path).read_text())[:n]
    run = edit_and_measure(
        toy_model(), toy_tokenizer(pad_is_eos=True), requests, toy_hparams(lr=5e-3), progress=False
    )
    return list(run.metrics)


def smollm2(folder, data):
    """Edits SmolLM2 with a few facts in its last layers; returns losses and the metrics after."""
    from locft_easyedit.data.readers import read_requests
    from locft_easyedit.hparams import LocFTBFHyperParams
    from locft_easyedit.modeling.loading import load_model

    hparams = LocFTBFHyperParams(
        model_name=folder,
        device="cpu",
        layers=[28],
        rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight",
        lr=4e-3,
        batch_size=5,
        num_steps=3,
        health_check=False,
    )
    model, tokenizer = load_model(hparams)
    run = edit_and_measure(
        model, tokenizer, read_requests(data, 11), hparams, metrics=PLAIN_METRICS, progress=False
    )
    return [run.result.losses, [entry["post"] for entry in run.metrics]]


def dies_once(folder, n_steps):
    """Dies in the middle of the first training; a restart by the launcher goes on from there."""

    from locft_easyedit.training.step import TrainingStep

    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    take, taken = TrainingStep.take_, []

    def dying(self, *args):
        taken.append(1)
        if first_life and get_world().rank == 1 and len(taken) == n_steps:
            os._exit(9)
        return take(self, *args)

    TrainingStep.take_ = dying
    _, result = edited(checkpoint_dir=folder, checkpoint_minutes=0)
    return [len(taken), result.losses]


def editor(path, n):
    """Edits through EasyEdit's editor; returns the metrics of its calls."""
    import locft_easyedit
    from helpers.toys import loaded_hparams

    requests = json.loads(Path(path).read_text())[:n]
    easyedit = locft_easyedit.register()
    editor = easyedit.BaseEditor.from_hparams(loaded_hparams(lr=5e-3))
    together, *_ = editor.edit_requests(requests, sequential_edit=True, verbose=False)
    alone, *_ = editor.edit_requests(requests[:2], sequential_edit=False, verbose=False)
    by_perplexity, *_ = editor.edit_requests(
        requests, sequential_edit=True, verbose=False, eval_metric="ppl"
    )
    return [together, alone, by_perplexity]


def interrupted_while_the_disk_is_slow(folder):
    """A signal to rank 1 in training, and a checkpoint that takes rank 0 seconds to write."""
    from locft_easyedit.errors import EditInterrupted
    from locft_easyedit.training import checkpoints as checkpoint
    from locft_easyedit.training.step import TrainingStep

    write, take, taken = checkpoint.write_checkpoint, TrainingStep.take_, []

    def slowly(*args):
        time.sleep(7)
        write(*args)

    def signalled(self, *args):
        taken.append(1)
        if get_world().rank == 1 and len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args)

    checkpoint.write_checkpoint, TrainingStep.take_ = slowly, signalled
    try:
        edited(checkpoint_dir=folder, checkpoint_minutes=60, num_steps=500)
    except EditInterrupted as interrupted:
        if get_world().rank == 1:  # as the command does
            os._exit(0)
        return str(interrupted)
    return None
