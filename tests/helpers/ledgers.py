"""Ledgers of a toy model that learns a few facts in a second."""

import copy

import torch

from helpers.toys import TOY_YAML, toy_hparams, toy_model, toy_requests, toy_tokenizer
from locft_easyedit.ledger.ledger import Ledger

WIDE = {"hidden_size": 64, "intermediate_size": 512}
NAME = "model.layers.2.mlp.down_proj.weight"
# What a command learns them by, of a model in the folder `base`.
YAML = TOY_YAML.replace("./toy", "./base").replace("num_steps: 3\n", "num_steps: 15\n")


def wide_model(**config):
    """Returns a toy with room for a few facts in one matrix."""
    return toy_model(**WIDE, **config)


def on_disk(folder, model=None):
    """Saves a wide toy, or another model, in many parts, with the tokenizer; returns where."""
    model = wide_model() if model is None else model
    model.save_pretrained(folder, max_shard_size="50KB")
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


def ledger_hparams(**changes):
    """Returns hyper-parameters by which it learns them."""
    return toy_hparams(**{"num_steps": 15, "lr": 1e-2, "health_check": False} | changes)


def new_ledger(folder, *, tokenizer=None, model=None, **changes):
    """Returns a new ledger of a wide toy."""
    model = wide_model() if model is None else model
    hparams = ledger_hparams(**changes)
    return Ledger.init(folder, hparams, model, tokenizer or toy_tokenizer(), progress=False)


def opened(folder, *, model=None, tokenizer=None):
    """Returns a ledger that is there, with the base model unless another is given."""
    model = wide_model() if model is None else model
    return Ledger.open(folder, model, tokenizer or toy_tokenizer(), progress=False)


def filled_ledger(folder, n_commits=2, **changes):
    """Returns a ledger with three facts a commit."""
    ledger = new_ledger(folder, **changes)
    requests = toy_requests(3 * n_commits)
    for i in range(n_commits):
        ledger.add(requests[3 * i : 3 * i + 3], source=f"day {i}")
    return ledger


def matrix(model):
    """Returns a copy of the trained matrix."""
    return dict(model.named_parameters())[NAME].detach().clone()


def answers(model, tokenizer, requests):
    """Returns whether the model's first choices after each prompt are its target and EOS."""
    found = []
    for request in requests:
        prompt = tokenizer(request["prompt"])["input_ids"]
        whole = tokenizer(f"{request['prompt']} {request['target_new'].strip()}")["input_ids"]
        ids = [*whole, tokenizer.eos_token_id]
        with torch.no_grad():
            choices = model(input_ids=torch.tensor([ids[:-1]])).logits[0].argmax(-1).tolist()
        found.append(choices[len(prompt) - 1 :] == ids[len(prompt) :])
    return found


def superseding(requests, target="Vienna"):
    """Returns the requests with another target."""
    changed = copy.deepcopy(list(requests))
    for request in changed:
        request["target_new"] = target
    return changed
