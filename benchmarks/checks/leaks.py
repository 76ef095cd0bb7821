"""Through which tokens an edit moves prompts that it should leave alone.

    python benchmarks/checks/leaks.py --hparams benchmarks/generalization.yaml \
        --data zsre.json counterfact.json --n 100

The edits are made, by the published method and by `LocFT-BF+`, and taken back. What was added to
the matrix is then put to work at some tokens of each locality prompt alone: at its last one, where
the answer begins, or at those before it, which the last one attends to in the layers above. Told is
how far each moves the next token's distribution: the mean KL in nats against the model before.
"""

import argparse
import sys

import torch
from tqdm import tqdm

from locft_easyedit.api import edit_model
from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.tokenization import ids_of
from locft_easyedit.errors import LocFTError
from locft_easyedit.hparams import LocFTBFHyperParams, read_mapping
from locft_easyedit.hparams_rules import ALG_NAMES
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.modeling.modes import evaluation_mode
from locft_easyedit.modeling.places import owner

PLACES = {"at all tokens": slice(None), "at the last": slice(-1, None), "before it": slice(0, -1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hparams", required=True, help="YAML; its place must be one matrix")
    parser.add_argument("--data", nargs="+", required=True, help="files with edits")
    parser.add_argument("--n", type=int, default=100, help="edits, from the beginning of each file")
    options = parser.parse_args()
    try:
        report(options)
    except LocFTError as error:
        sys.exit(f"leaks.py: {error}")


def report(options):
    values = read_mapping(options.hparams)[1]
    model = None
    print(f"{'file':28} {'method':10}", *(f"{place:>14}" for place in PLACES))
    for path in options.data:
        requests = read_requests(path, options.n)
        prompts = [p for r in requests for e in r["locality"].values() for p in e["prompt"]]
        for name in ALG_NAMES:
            hparams = LocFTBFHyperParams.from_mapping(values | {"alg_name": name}, source=name)
            if model is None:
                model, tokenizer = load_model(hparams)
            result = edit_model(model, tokenizer, requests, hparams)
            [(parameter, new)] = result.new.items()
            change = new.float() - result.original[parameter].float()
            result.restore_(model)
            module = owner(model, parameter)
            moved = means(model, module, change, ids_of(tokenizer, prompts))
            print(f"{path[-28:]:28} {name:10}", *(f"{kl:14.3f}" for kl in moved.values()))


@torch.no_grad()
def means(model, module, change, sequences):
    """The mean KL for each of `PLACES`.

    Args:
        model: The model before the edit.
        module: The linear layer that was edited.
        change: What was added to its weight, as that is stored.
        sequences: The prompts' token ids.
    """
    if tuple(change.shape) != tuple(module.weight.shape) or not isinstance(module, torch.nn.Linear):
        raise LocFTError("The place must be the weight of one linear layer.")
    sums = dict.fromkeys(PLACES, 0.0)
    with evaluation_mode(model):
        for ids in tqdm(sequences, desc="prompts", leave=False):
            ids = torch.tensor([ids], device=model.device)
            before = next_token(model, ids)
            for place, tokens in PLACES.items():

                def add(_, inputs, output, tokens=tokens):
                    output = output.clone()
                    some = torch.nn.functional.linear(inputs[0][:, tokens].float(), change)
                    output[:, tokens] += some.to(output.dtype)
                    return output

                handle = module.register_forward_hook(add)
                after = next_token(model, ids)
                handle.remove()
                sums[place] += float((before.exp() * (before - after)).sum())
    return {place: total / len(sequences) for place, total in sums.items()}


def next_token(model, ids):
    """Log probabilities of what follows, [V] float32."""
    return torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), dim=-1)


if __name__ == "__main__":
    main()
