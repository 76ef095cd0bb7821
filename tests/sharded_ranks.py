"""What each of several processes does in the tests of sharded layers."""

import numpy as np
import torch
from safetensors.torch import save_file
from toys import DOWN_PROJECTION, toy_hparams, toy_requests, toy_tokenizer

from locft_easyedit.delta.delta import Delta
from locft_easyedit.delta.file import save_delta
from locft_easyedit.models import load_model
from locft_easyedit.modes import only_trainable, with_gradients
from locft_easyedit.offload import left_on_disk
from locft_easyedit.pipeline import edit_and_measure
from locft_easyedit.place import select_place
from locft_easyedit.requests import distinct_edits
from locft_easyedit.runner import TextRunner
from locft_easyedit.sharding import lockstep, sharded_layers
from locft_easyedit.tokens import tokenize_edits
from locft_easyedit.weights import TrainedWeights
from locft_easyedit.world import here


def steps(folder, kind, place, dealt, out, dtype="float32"):
    """Trains a few steps with the simplest loop; returns the losses and what was seen.

    Args:
        folder: The model's.
        kind: Of toy.
        place: Layers.
        dealt: For every step and rank, the micro-batches of edits that it runs.
        out: Where rank 0 puts the trained matrices.
        dtype: Precision.
    """
    world = here()
    h = toy_hparams(
        model_name=folder,
        layers=place,
        rewrite_module_tmp=DOWN_PROJECTION[kind],
        shard_frozen=world.several,
        stream_frozen=False,
        device="cpu",
        dtype=dtype,
    )
    model, _ = load_model(h)
    chosen = select_place(model, h.layers, h.templates)
    texts = tokenize_edits(toy_tokenizer(), distinct_edits(toy_requests(8)).edits)
    runner = TextRunner(model, texts, row_tokens=64, packed=False, prefix=None)
    losses = []
    with only_trainable(model, chosen.parameters.values()), with_gradients():
        weights = TrainedWeights(chosen.parameters)
        optimizer = torch.optim.Adam(weights.masters, lr=1e-2)
        for step in dealt:
            mine = step[world.rank] if world.several else [b for rank in step for b in rank]
            n_edits = sum(len(batch) for rank in step for batch in rank)
            total = torch.zeros(())
            weights.clear_gradients_()
            with lockstep(model):
                for batch in mine:
                    loss = runner.edit_losses(np.array(batch)).sum() / n_edits
                    loss.backward()
                    weights.collect_gradients_()
                    total += loss.detach()
            for master in weights.masters:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
            world.sum_([total, *(master.grad for master in weights.masters)])
            optimizer.step()
            weights.publish_()
            losses.append(float(total))
        if world.first:
            save_file({k: v.float() for k, v in weights.values().items()}, out)
    sharded = sharded_layers(model)
    world.close()
    return {"losses": losses, "taken_part": sharded.n_taken_part if sharded else 0}


def runs(folder, kind, out, *several):
    """Edits and measures, once for each of `several` changes of the hyper-parameters.

    Args:
        folder: The model's.
        kind: Of toy.
        out: A folder in which rank 0 puts the trained matrices, by the run's number.
        several: Changes, and how many requests there are.
    """
    world = here()
    found = []
    for number, (changes, n) in enumerate(several):
        values = {"rewrite_module_tmp": DOWN_PROJECTION[kind], "device": "cpu"} | changes
        h = toy_hparams(model_name=folder, **values)
        model, tokenizer = load_model(h)
        sharded = sharded_layers(model)
        whole = dict(model.named_parameters())
        run = edit_and_measure(model, tokenizer, toy_requests(n), h, progress=False)
        if world.first:
            save_file(run.result.new, f"{out}/{number}")
            save_delta(f"{out}/{number}.edit", Delta.of(run.result, model, h))
        found.append(
            {
                "losses": run.result.step_losses,
                "metrics": list(run.metrics),
                "perplexity": run.result.health.perplexity_after,
                "sharded": None if sharded is None else len(sharded),
                "taken_part": 0 if sharded is None else sharded.n_taken_part,
                "numel": {name: local_numel(parameter) for name, parameter in whole.items()},
                "streamed": left_on_disk(model),
            }
        )
        del model, run, whole, sharded
    world.close()
    return found


def local_numel(parameter):
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
