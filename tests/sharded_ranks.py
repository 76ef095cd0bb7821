"""What each of several processes does in the tests of sharded layers."""

import resource

import numpy as np
import torch
from safetensors.torch import save_file
from toys import DOWN_PROJECTION, toy_hparams, toy_requests, toy_tokenizer

from locft_easyedit.models import load_model
from locft_easyedit.modes import only_trainable, with_gradients
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
