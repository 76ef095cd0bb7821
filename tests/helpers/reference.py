"""LocFT-BF as plainly as it can be written: the reference that the loop is compared with.

No packing, no padding, no kept prefix: each edit of a mini-batch runs alone through the whole
model, logits are taken everywhere, and PyTorch's unfused Adam makes the update.
"""

import math

import torch
from torch.nn import functional as F


def naive_edit_loss(model, tokenizer, request, *, append_eos=True, reduction="mean"):
    prompt, target = request["prompt"], request["target_new"]
    target = target if target.startswith(" ") else " " + target
    ids = tokenizer(prompt + target)["input_ids"]
    n_prompt = len(tokenizer(prompt)["input_ids"])
    if append_eos:
        ids = [*ids, tokenizer.eos_token_id]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # [L, V]
    scored, labels = logits[n_prompt - 1 : -1].float(), torch.tensor(ids[n_prompt:])
    return F.cross_entropy(scored, labels, reduction=reduction)


def naive_batch_loss(model, tokenizer, batch, hparams):
    by_token = hparams.loss_average == "token"
    losses = [
        naive_edit_loss(
            model,
            tokenizer,
            request,
            append_eos=hparams.append_eos,
            reduction="none" if by_token else "mean",
        )
        for request in batch
    ]
    return torch.cat(losses).mean() if by_token else torch.stack(losses).mean()


def naive_depth_first(model, tokenizer, requests, parameters, hparams):
    """Trains `parameters` in place, one mini-batch after the other; returns the steps' losses."""
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in parameters))
    losses = []
    for start in range(0, len(requests), hparams.batch_size):
        adam = torch.optim.Adam(parameters, lr=hparams.lr, foreach=False, fused=False)
        for _ in range(hparams.num_steps):
            adam.zero_grad()
            batch = requests[start : start + hparams.batch_size]
            loss = naive_batch_loss(model, tokenizer, batch, hparams)
            losses.append(loss.item())
            if loss.item() < hparams.batch_loss_threshold:
                break
            loss.backward()
            adam.step()
    return losses


def naive_cosine(step, n_steps):
    """A linear rise over a tenth of the steps, then half a cosine down."""
    rise = max(1, round(n_steps / 10))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (n_steps - rise))


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
    n_steps = hparams.num_steps * -(-len(requests) // hparams.batch_size)
    generator = torch.Generator().manual_seed(hparams.seed)
    step_losses, epoch_losses = [], []
    for _ in range(hparams.num_steps):
        order = torch.randperm(len(requests), generator=generator).tolist()
        epoch = 0.0
        for start in range(0, len(order), hparams.batch_size):
            batch = [requests[i] for i in order[start : start + hparams.batch_size]]
            adam.zero_grad()
            if hparams.lr_schedule == "cosine":
                adam.param_groups[0]["lr"] = hparams.lr * naive_cosine(len(step_losses), n_steps)
            loss = naive_batch_loss(model, tokenizer, batch, hparams)
            if loss.item() >= hparams.batch_loss_threshold:
                loss.backward()
                adam.step()
            step_losses.append(loss.item())
            epoch += loss.item() * len(batch)
        epoch_losses.append(epoch / len(requests))
        if epoch_losses[-1] < hparams.epoch_loss_threshold:
            break
    return step_losses, epoch_losses
