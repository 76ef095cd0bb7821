"""LocFT-BF as plainly as it can be written: the reference that the loop is compared with.

No packing, no padding, no kept prefix: each edit of a mini-batch runs alone through the whole
model, logits are taken everywhere, and PyTorch's unfused Adam makes the update.
"""

import torch
from torch.nn import functional as F


def naive_edit_loss(model, tokenizer, request, *, append_eos=True):
    prompt, target = request["prompt"], request["target_new"]
    target = target if target.startswith(" ") else " " + target
    ids = tokenizer(prompt + target)["input_ids"]
    n_prompt = len(tokenizer(prompt)["input_ids"])
    if append_eos:
        ids = [*ids, tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # [L, V]
    return F.cross_entropy(logits[n_prompt - 1 : -1].float(), torch.tensor(ids[n_prompt:]))


def naive_locft_bf(model, tokenizer, requests, parameters, hparams, **adam):
    """Trains `parameters` in place; returns the losses of the steps and of the epochs."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    adam = torch.optim.Adam(
        parameters,
        **{"lr": hparams.lr, "weight_decay": hparams.weight_decay} | adam,
        foreach=False,
        fused=False,
    )
    generator = torch.Generator().manual_seed(hparams.seed)
    step_losses, epoch_losses = [], []
    for _ in range(hparams.num_steps):
        order = torch.randperm(len(requests), generator=generator).tolist()
        epoch = 0.0
        for start in range(0, len(order), hparams.batch_size):
            batch = [requests[i] for i in order[start : start + hparams.batch_size]]
            adam.zero_grad()
            losses = [
                naive_edit_loss(model, tokenizer, r, append_eos=hparams.append_eos) for r in batch
            ]
            loss = torch.stack(losses).mean()
            if loss.item() >= hparams.batch_loss_threshold:
                loss.backward()
                adam.step()
            step_losses.append(loss.item())
            epoch += loss.item() * len(batch)
        epoch_losses.append(epoch / len(requests))
        if epoch_losses[-1] < hparams.epoch_loss_threshold:
            break
    return step_losses, epoch_losses
