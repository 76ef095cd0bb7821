"""Every causal model type of the installed transformers, tiny: what can an edit of it do?

    python benchmarks/checks/model_types.py                       # all types, minutes on a CPU
    python benchmarks/checks/model_types.py --types llama,mamba   # some, printed alone
    python benchmarks/checks/model_types.py --write               # all, and the table in the docs

Each type is built from its own configuration class with every size made small, and edited once by
`edit_model`. The losses of its first step are compared with a plain PyTorch loop, so that a type
"trains" only if it trains on what it should. With `--write` the table goes into
benchmarks/results/model_types.json, from which `python scripts/build_docs.py` makes the docs.
"""

import argparse
import datetime
import json
import logging
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_inputs import random_requests, word_tokenizer
from tiny_models import N_LAYERS, NO_LANGUAGE_MODEL, WORDS, tiny_model

from locft_easyedit.errors import LocFTError
from locft_easyedit.evaluation.decoding import can_batch_cache
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.locations import find_locations
from locft_easyedit.plan.reader import ModelReader
from locft_easyedit.prefix.probes import Probes
from locft_easyedit.training.session import EditSession

RESULT = Path(__file__).resolve().parents[1] / "results" / "model_types.json"
N_EDITS = 4
# Why something cannot be had, where the model's own code is the reason.
REASONS = {
    "prophetnet": "no prefix: it runs several streams of unlike positions",
    "xlm": "no prefix: its layers are no modules, their parts lie in lists",
    "zaya": "no prefix: experts are chosen by what the routers below have found",
}
SECONDS = 90  # for a type
TOLERANCE = 1e-4  # of the mean loss of the first step, relative


def place_of(model):
    """Returns the template of the down-projection in the last layer but one, or what there is."""
    found = [one for one in find_locations(model) if one.layer == N_LAYERS - 2]
    preferred = ("down", "shared_down", "mlp", "up", "o", "layer")
    return min(found, key=lambda one: preferred.index(one.module) if one.module in preferred else 9)


@torch.no_grad()
def plain_loss(model, texts):
    """Returns the mean over edits of the mean cross-entropy of their target tokens."""
    losses = []
    for i in range(len(texts)):
        ids = torch.from_numpy(texts.ids[texts.offsets[i] : texts.offsets[i + 1]])[None]
        start = int(texts.target_start[i])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, start - 1 :]
        losses.append(F.cross_entropy(logits.float(), ids[0, start:]))
    return float(torch.stack(losses).mean())


def tried(model_type):
    """Returns what an edit of a type can do: `state` is trains, refused, wrong or not built."""
    found = tried_with(model_type)
    if found["state"] == "trains" and model_type in REASONS:
        found["reason"] = REASONS[model_type]
    if found["state"] == "refused":
        again = tried_with(model_type, is_decoder=True)
        if again["state"] == "trains":
            found = again | {"state": "refused", "reason": "trains with `is_decoder: true`"}
    return found


def tried_with(model_type, **values):
    """Returns the same of a type with some values of its configuration."""
    if model_type in NO_LANGUAGE_MODEL:
        return {"state": "not built", "reason": NO_LANGUAGE_MODEL[model_type]}
    try:
        with limited():
            model = tiny_model(model_type, **values)
    except Exception as error:
        return {"state": "not built", "reason": short(error)}
    found = {"class": type(model).__name__}
    try:
        with limited():
            return found | edited(model)
    except LocFTError as error:
        return found | {"state": "refused", "reason": short(error)}
    except Exception as error:
        return found | {"state": "wrong", "reason": short(error)}


def edited(model):
    """Edits a model; returns what was found."""
    tokenizer, requests = word_tokenizer(WORDS), random_requests(N_EDITS, WORDS)
    place = place_of(model)
    hparams = LocFTBFHyperParams(
        layers=[place.layer],
        rewrite_module_tmp=place.rewrite_module_tmp,
        lr=1e-4,
        num_steps=1,
        batch_size=N_EDITS,
        health_check=False,
    )
    with EditSession(model, tokenizer, requests, hparams, progress=False) as session:
        texts = session.training_texts.texts
        expected = plain_loss(model, texts)
        cached = can_batch_cache(model, texts.ids[: texts.offsets[1]].tolist())
        loss = session.train_().step_losses[0]
        shortcuts = session.shortcuts
        remark = "" if shortcuts.cuts else Probes(model, texts).cuts(session.place, False)[1]
        if shortcuts.cuts and shortcuts.cuts[0].first_layer < place.layer:
            remark = "prefix ends at a layer below: those above share what it makes"
    error = abs(loss - expected) / abs(expected)
    right = error <= TOLERANCE
    return {
        "state": "trains" if right else "wrong",
        "reason": remark if right else f"loss {loss:.6f}, a plain loop gives {expected:.6f}",
        "place": place.module,
        "prefix": shortcuts.cuts[0].kind if shortcuts.cuts else None,
        "packed": shortcuts.packed,
        "cache": cached,
        "plan": planned(model.to("meta"), place),
    }


def planned(model, place):
    """Returns whether the sizes of a model on the meta device can be told."""
    try:
        reader = ModelReader(model, "", [place.layer], place.templates)
        reader.shapes()
        for device in ("cpu", "cuda"):
            reader.activations(torch.bfloat16, 64, device)
    except Exception:
        return False
    return True


@contextmanager
def limited():
    """Ends what takes longer than `SECONDS`."""

    def ring(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def short(error):
    """Returns the first line of an error's message, of a table's width."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if isinstance(error, LocFTError):  # a sentence of its own
        return lines[0].split(". ")[0][:120]
    return f"{type(error).__name__}: {lines[0][:90]}"


def table(found):
    """Returns the file of results that the docs have their table from."""
    yes = {True: "yes", False: "no", None: ""}
    rows = [
        [
            model_type,
            one["state"],
            (one.get("prefix") or "none") if one["state"] == "trains" else "",
            yes[one.get("packed")],
            yes[one.get("cache")],
            yes[one.get("plan")],
            one.get("reason", "").replace("|", "/"),
        ]
        for model_type, one in found.items()
    ]
    states = [one["state"] for one in found.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "title": f"Causal model types of transformers {transformers.__version__}",
        "kind": "measured",
        "how": f"Tiny random models of {N_LAYERS} layers, one step on {N_EDITS} edits: {counts}. "
        "A type trains if the loss of the step is that of a plain PyTorch loop. The prefix is the "
        "deepest cut that leaves its logits as they are; `cache`: texts may share one in decoding; "
        "`plan`: its sizes can be told.",
        "commands": ["python benchmarks/checks/model_types.py --write"],
        "recorded": {"date": datetime.date.today().isoformat(), "commit": commit},
        "columns": [
            {"name": name}
            for name in ("type", "edit", "prefix", "packed", "cache", "plan", "remark")
        ],
        "rows": rows,
    }


def main():
    """Tries the types and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", help="some types, separated by commas")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name} for the docs")
    options = parser.parse_args()
    types = options.types.split(",") if options.types else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    logging.getLogger("locft_easyedit").setLevel(logging.ERROR)
    found, start = {}, time.perf_counter()
    with tqdm(types, unit="type") as bar:
        for model_type in bar:
            bar.set_postfix_str(model_type)
            found[model_type] = tried(model_type)
            if options.types or found[model_type]["state"] == "wrong":
                bar.write(f"{model_type}: {json.dumps(found[model_type])}")
            if options.write:  # at once: what was found stays if this is interrupted
                RESULT.write_text(json.dumps(table(found), indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} types in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
