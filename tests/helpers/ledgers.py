"""Ledgers of a toy model that learns a few facts in a second."""

import copy

import torch

from helpers.toys import TOY_YAML, toy_hparams, toy_model, toy_requests, toy_tokenizer
from locft_easyedit.ledger.facts import Fact
from locft_easyedit.ledger.ledger import Ledger
from locft_easyedit.ledger.recorded_facts import RecordedFacts
from locft_easyedit.ledger.trainer import Trainer
from locft_easyedit.modeling.places import select_place

WIDE = {"hidden_size": 64, "intermediate_size": 512}
NAME = "model.layers.2.mlp.down_proj.weight"
# What a command learns them by, of a model in the folder `base`.
YAML = TOY_YAML.replace("./toy", "./base").replace("num_steps: 3\n", "num_steps: 15\n")
# Some texts as tokens, and where their targets begin.
SEQUENCES = [[5, 9, 30, 41, 2], [7, 8, 50, 60], [300, 301, 302, 9, 10, 2], [40, 41, 42]]
STARTS = [3, 2, 2, 1]


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


def facts(n):
    """Returns up to two facts."""
    texts = [("Ba is in", "Norway"), ("Lo plays for", "Torino")][:n]
    return [
        Fact(i + 1, {"prompt": p, "target_new": t}, None, 1, "") for i, (p, t) in enumerate(texts)
    ]


def trainer_of(model, folder, **changes):
    """Returns what trains facts in a model, with states in a folder."""
    h = ledger_hparams(**changes)
    place = select_place(model, h.layers, h.templates)
    return Trainer(RecordedFacts(model, toy_tokenizer(), h, place, folder))
