"""EasyEdit's own methods in generalization.py: its code makes the edits, measured like ours.

A method runs in a process of its own, since some keep state in their modules, and in float32, as
EasyEdit loads models. Its hyper-parameters are those of `locft compare`: EasyEdit's for a Llama, by
rules for this model.
"""

import itertools
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from generalization_bench import Bench
from tqdm import tqdm

from locft_easyedit.compare.edits import method_editor
from locft_easyedit.compare.job import Job, model_id
from locft_easyedit.easyedit import register
from locft_easyedit.easyedit.peers.corpus import corpus_from_model
from locft_easyedit.easyedit.peers.covariance import stats_name, write_key_covariances
from locft_easyedit.easyedit.peers.peer_hparams import peer_hparams
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.loading import load_causal_lm
from locft_easyedit.prefix.shortcuts import Shortcuts
from locft_easyedit.training.health import HealthCheck

METHODS = ("ROME", "MEMIT", "AlphaEdit")
DTYPE = "float32"
SEED = 42  # EasyEdit's
DOCUMENTS, DOCUMENT_TOKENS = 400, 150  # as in `locft compare`


def run_apart(*task):
    """Does what `run` does, in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *task).result()


def run(method, values, edits, measured, stats_dir):
    """Makes the edits with a method of EasyEdit and measures; returns what the run's line says.

    Args:
        method: One of `METHODS`.
        values: The hyper-parameters that all variants have in common.
        edits: The requests.
        measured: Those of them that metrics are taken on.
        stats_dir: Where key covariances are kept.
    """
    hparams = LocFTBFHyperParams.from_mapping(values, source="what all variants share")
    easyedit = register()
    path = str(Path(hparams.model_name).resolve())
    stats_dir = str(Path(stats_dir).resolve())
    model, tokenizer = load_causal_lm(path, device=hparams.device, dtype=DTYPE)
    bench = Bench(model, tokenizer, edits, measured, hparams)
    text = HealthCheck(model, tokenizer, Shortcuts(packed=bench.by_token.packed))
    text.before()
    job = Job(method, path, "", None, None, DTYPE, stats_dir=stats_dir)
    job.statistics = covariances(method, model, tokenizer, path, stats_dir, hparams)
    editor = method_editor(job, model, tokenizer, len(edits), easyedit)
    asks = [edit for edit in edits if not editor.needs_subject or is_asked(edit)]
    before = os.getcwd()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where AlphaEdit leaves its projection
        try:
            torch.manual_seed(SEED)
            for chunk in tqdm(list(in_chunks(asks, editor.chunk)), desc=method, unit="call"):
                editor.editor.edit_([editor.ended(edit) for edit in chunk])
        finally:
            os.chdir(before)
    seconds = time.perf_counter() - start
    ratio = text.after({}, {}, lr=hparams.lr).perplexity_ratio
    figures = bench.after() | {"seconds": seconds} | ({} if ratio is None else {"ppl_ratio": ratio})
    return bench.line(
        figures, trained=len(asks), seconds={"edit": seconds}, updates=None, converged=False,
        method={"hparams": editor.values, "notes": editor.notes},
    )  # fmt: skip


def covariances(method, model, tokenizer, path, stats_dir, hparams):
    """The second moments of keys that a method reads from files; `None` if it reads none."""
    plan = peer_hparams(method, model, device=hparams.device or 0, n_edits=1, stats_dir=stats_dir,
                        corpus_name="none", n_samples=1)  # fmt: skip
    if not plan.covariance_modules:
        return None
    corpus = corpus_from_model(model, tokenizer, DOCUMENTS, tokens_per_document=DOCUMENT_TOKENS,
                               batch_size=hparams.eval_batch_size, cache=stats_dir)  # fmt: skip
    write_key_covariances(model, tokenizer, corpus, plan.covariance_modules, stats_dir=stats_dir,
                          model_id=model_id(path))  # fmt: skip
    return {"name": stats_name(corpus, model), "n_samples": len(corpus.texts)}


def is_asked(edit):
    """Whether the subject is in the prompt."""
    return bool(edit.get("subject")) and edit["subject"] in edit["prompt"]


def in_chunks(items, size):
    """Lists of `size` items, in order."""
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk
