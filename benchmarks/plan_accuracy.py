"""Compares the memory that `locft plan` tells with what a run really takes, on a CPU.

    python benchmarks/plan_accuracy.py --model models/SmolLM2-135M-Instruct

For each model and precision a plan is made, and a fresh process does what was planned: it loads
the model, records the frozen prefix, measures, trains, measures again. Linux counts the peak of a
process's resident memory (VmHWM), here anew for every phase. Besides the given model one with
random weights is built, for figures in which Python and its libraries are a small part.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from shared import parser_of, write_figures
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.data.tokenization import tokenize_edits
from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.plan.memory_parts import PHASES
from locft_easyedit.plan.plan import make_plan
from locft_easyedit.plan.workload import Machine, Workload
from locft_easyedit.training.session import EditSession
from locft_easyedit.utils.memory import peak_memory

RANDOM = "random weights, 0.65 B"
LIMIT = 0.15


def main():
    parser = parser_of(__doc__, "model", "template", "data", "preserve-dir")
    parser.add_argument("--layer", type=int, nargs="+", default=[20, 14],
                        help="of the given model, and of the random one of 20 layers")  # fmt: skip
    parser.add_argument("--n", type=int, default=100, help="edits")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cut", nargs="+", help="matrix, mlp or layer (as the plan chooses)")
    parser.add_argument("--streamed", action="store_true", help="frozen layers left on disk")
    parser.add_argument("--no-evaluation", action="store_true")
    parser.add_argument("--alg-name", default="LocFT-BF", help="or LocFT-BF+")
    parser.add_argument("--given-only", action="store_true", help="no random model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker))))
        return
    if not sys.platform.startswith("linux"):
        sys.exit("Peaks of single phases are counted by Linux alone.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {Path(options.model).name: (options.model, options.layer[0])}
        if not options.given_only:
            models[RANDOM] = (folder, options.layer[-1])
            build(folder, options.model)
        for name, (path, layer) in models.items():
            for dtype in options.dtype:
                for cut in options.cut or [None]:
                    rows += compare(name, path, layer, dtype, cut, options)
    table(rows)
    write_figures(options, rows)


def build(folder, tokenizer_of):
    """Saves a model with random weights, in bfloat16 as most are, with another's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1536, intermediate_size=4096, head_dim=64,
        num_hidden_layers=20, num_attention_heads=24, num_key_value_heads=8,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare(name, path, layer, dtype, cut, options):
    """Returns a row for each phase of one run, and one for the whole."""
    hparams = LocFTBFHyperParams(
        model_name=str(path), device="cpu", layers=[layer], rewrite_module_tmp=options.template,
        lr=1e-4, num_steps=options.epochs, batch_size=options.batch_size, dtype=dtype,
        batch_loss_threshold=0.0, epoch_loss_threshold=0.0, alg_name=options.alg_name,
        preserve_dir=options.preserve_dir,
    )  # fmt: skip
    plan = plan_for(hparams, options, cut)
    told = {phase: sum(p.bytes for p in plan.chosen.parts if phase in p.phases and
                       p.place == "host") for phase in PHASES}  # fmt: skip
    job = {
        "hparams": hparams.to_dict() | plan.keys(), "data": options.data, "n": options.n,
        "evaluate": not options.no_evaluation,
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(job)], capture_output=True, text=True
    )
    if ran.returncode:
        sys.exit(ran.stderr)
    found = json.loads(ran.stdout.splitlines()[-1])
    setting = {"model": name, "dtype": dtype, "cut": plan.chosen.setting.cut,
               "streamed": plan.chosen.setting.streamed, "layer": layer}  # fmt: skip
    told = {phase: told[phase] for phase in PHASES if phase in found}
    told["whole run"], found["whole run"] = max(told.values()), max(found.values())
    return [
        setting | {"phase": phase, "planned_bytes": told[phase], "measured_bytes": found[phase],
                   "error": told[phase] / found[phase] - 1}
        for phase in told
    ]  # fmt: skip


def plan_for(hparams, options, cut):
    """Returns the plan for the tokens that the edits have."""
    requests = read_requests(options.data, options.n)
    edits = distinct_edits(requests, None).edits
    tokenizer = AutoTokenizer.from_pretrained(hparams.model_name)
    texts = tokenize_edits(tokenizer, edits, append_eos=True, max_positions=None)
    work = Workload.from_hparams(
        hparams, len(edits), evaluate=not options.no_evaluation,
        tokens=float(texts.lengths.mean()),
        targets=float((texts.lengths - texts.target_start).mean()),
    )  # fmt: skip
    machine = Machine(
        gpu=None, host=psutil.virtual_memory().available,
        disk=psutil.disk_usage(tempfile.gettempdir()).free,
    )  # fmt: skip
    hparams = replace(hparams, stream_frozen=options.streamed, prefix_cut=cut)
    plan = make_plan(hparams, work, machine)
    if plan.chosen is None:
        sys.exit(f"The plan says that nothing fits: {plan.candidates[-1].reason}.")
    return plan


def run(hparams, data, n, evaluate):
    """Runs what was planned; returns the peak of each phase in bytes."""
    hparams = LocFTBFHyperParams(**hparams)
    cpu = torch.device("cpu")
    peaks = {}

    def measured(phase, do):
        with peak_memory(cpu) as peak:
            result = do()
        peaks[phase] = max(peaks.get(phase, 0), int(peak.gib * 2**30))
        return result

    requests = read_requests(data, n)
    model, tokenizer = measured("load", lambda: load_model(hparams))
    session = EditSession(model, tokenizer, requests, hparams, progress=False)
    measured("prefix", session.__enter__)
    try:
        if evaluate:
            how = EvalConfig.from_session(session, progress=False)
            evaluation = Evaluation(model, tokenizer, requests, how, metrics=["accuracy"])
            measured("evaluate", lambda: evaluation.measure("before"))
        result = measured("train", lambda: session.train_(progress=False))
        if evaluate:
            measured("evaluate", lambda: evaluation.measure("after"))
    finally:
        session.__exit__(None, None, None)
    assert result.n_updates, "no step was made, and nothing says what one takes"
    return peaks


def table(rows):
    """Prints the figures, and plainly which of them are further apart than the limit."""
    print(f"{'model':28s} {'dtype':9s} {'cut':7s} {'phase':10s} {'planned':>9s} {'measured':>9s} "
          f"{'error':>7s}")  # fmt: skip
    for row in rows:
        print(f"{row['model']:28s} {row['dtype']:9s} {row['cut']:7s} {row['phase']:10s} "
              f"{row['planned_bytes'] / 2**20:5.0f} MiB {row['measured_bytes'] / 2**20:5.0f} MiB "
              f"{row['error']:+7.1%}" + "  OUTSIDE" * (abs(row["error"]) > LIMIT))  # fmt: skip
    outside = [row for row in rows if abs(row["error"]) > LIMIT]
    print(f"\n{len(rows) - len(outside)} of {len(rows)} comparisons are within {LIMIT:.0%}"
          f"{'.' if not outside else '; outside:'}")  # fmt: skip
    for row in outside:
        print(f"  {row['model']}, {row['dtype']}, {row['cut']}: {row['phase']} {row['error']:+.1%}")


if __name__ == "__main__":
    main()
