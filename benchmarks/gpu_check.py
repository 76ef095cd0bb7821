"""One GPU, checked and measured in nine minutes: is it correct, and where does a step's time go?

    python benchmarks/gpu_check.py               # one H100 or H200: Llama-3-8B's shape, 3,000 edits
    python benchmarks/gpu_check.py --tiny        # the same code on a CPU, at the size of a toy
    python benchmarks/gpu_check.py --only losses determinism

Correctness comes first: the tests marked `gpu`, losses against a CPU's, two runs to the bit, memory
that runs out, flash-attention's borders between texts. Then rates and times: matrix products of a
step's shapes, a step with its kernels by kind and what the host waits for, a whole edit with an
event at every step, an evaluation, a step of compiled layers. Weights and edits are random (see
`gpu.py`); nothing is downloaded.

A stage that fails says so, and the next one runs. All figures are in the JSON file after each
stage, so that a run that is cut off leaves what it has found. A stage is not started where its
usual time is more than what is left, and ended when the time is up. Exit status 1: a stage has
failed, or has found something wrong.
"""

import contextlib
import faulthandler
import importlib.util
import logging
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import gpu
import torch
from gpu_kernels import Marks, by_kind, event_ms, matmul_figures, waits
from random_inputs import HEAD_SCALE, random_requests, word_tokenizer
from shared import RUNS, parser_of, timed, write_figures
from step import Ours, one_step, published, step_flop

from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.modeling.forward import run_next
from locft_easyedit.training.session import EditSession
from locft_easyedit.training.step import TrainingStep
from locft_easyedit.utils.memory import peak_memory

SMALL = gpu.LLAMA_3_8B | {
    "layers": 6, "layer": 3, "hidden": 1024, "inner": 4096, "heads": 8, "kv_heads": 4,
    "vocabulary": 8000, "epochs": 3, "edits": 200, "batch": 100, "row_tokens": 64,
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
WHOLE = gpu.LLAMA_3_8B | {"edits": 3000, "batch": 100, "row_tokens": 64}
TINY = {"layers": 5, "layer": 2, "hidden": 32, "inner": 64, "heads": 2, "kv_heads": 1,
        "vocabulary": 200, "epochs": 2, "edits": 24, "batch": 8}  # fmt: skip
# Beside the plain run of a small model in float32: the same losses are wanted of all.
VARIANTS = {
    "padded": {"packing": False},
    "no frozen prefix": {"frozen_prefix": False},
    "cut at the layer": {"prefix_cut": "layer"},
    "micro-batches": {"micro_batch_size": 7},
    "products fused": {"fused": True},
    "products apart": {"fused": False},
}
# Of losses near 9: what other sums round, and what activations of 8 and 11 bits do.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
ROW_TOKENS = (64, 128, 256)
_RESERVE = 10  # seconds, for a stage that is ended and for the figures


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU: is the script right")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to end, at the latest")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), help="these stages alone")
    options = parser.parse_args()
    options.json = options.json or str(RUNS / "gpu_check.json")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is there. `--tiny` runs the same code on the CPU.")
    check = Check(options)
    print(f"{check.name}, torch {torch.__version__}; figures: {options.json}", flush=True)
    # Whatever hangs: a signal does not reach what waits for the GPU.
    faulthandler.dump_traceback_later(60 * options.minutes, exit=True, file=sys.__stderr__)
    try:
        for stage in options.only or STAGES:
            check.run(stage)
    finally:
        faulthandler.cancel_dump_traceback_later()
    bad = [name for name, found in check.figures.items() if found.get("problems")]
    print(f"\n{check.elapsed():.0f} s; " + (f"look at: {', '.join(bad)}" if bad else "all is well"))
    return 1 if bad else 0


class Check:
    """What the stages share: the device, the sizes, the large model, the time that is left."""

    def __init__(self, options):
        self.options, self.figures, self.start = options, {}, time.perf_counter()
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.cuda = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU"
        smaller = TINY if options.tiny else {}
        more = {"dtype": "bfloat16", "folder": None, "template": gpu.TEMPLATE}
        self.small = SimpleNamespace(**SMALL | smaller | more)
        self.whole = SimpleNamespace(**WHOLE | smaller | more)
        self._model = None

    def elapsed(self):
        return time.perf_counter() - self.start

    def run(self, name):
        """Runs a stage, notes what it found or why it failed, and writes everything."""
        stage, usual = STAGES[name]
        began, left = self.elapsed(), 60 * self.options.minutes - _RESERVE - self.elapsed()
        print(f"\n== {name}", flush=True)
        try:
            if usual > left:
                raise TimeoutError(f"not started: {left:.0f} s are left, it usually takes {usual}")
            with ended_after(left):
                found = stage(self)
        except Exception as error:  # the next stage is worth as much
            traceback.print_exc()
            found = {"problems": [f"{type(error).__name__}: {error}"[:500]]}
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
        self.figures[name] = found | {"seconds": round(self.elapsed() - began, 1)}
        for key, value in self.figures[name].items():
            print(f"{key}: {value}", flush=True)
        write_figures(self.options, self.figures, device=self.name)

    def model(self):
        """The large model, made once; its weights are the same after each stage."""
        if self._model is None:
            self._model = gpu.random_model(self.whole, self.device, torch.bfloat16)
            with torch.no_grad():  # see `random_inputs.random_model`
                self._model.lm_head.weight *= HEAD_SCALE
        return self._model

    def inputs(self, sizes, n=None):
        return word_tokenizer(sizes.vocabulary), random_requests(n or sizes.edits, sizes.vocabulary)

    def session(self, dtype="float32", device=None, attention="sdpa", fused=None, **changes):
        """A session of the small model, whose weights are the same on all devices."""
        model = gpu.random_model(self.small, "cpu", getattr(torch, dtype))
        model.set_attn_implementation(attention)
        model = model.to(device or self.device)
        hparams = gpu.hparams_of(self.small, **changes)
        inputs = self.inputs(self.small)
        return EditSession(model, *inputs, hparams, progress=False, fused=fused)

    def trained(self, *args, **more):
        with self.session(*args, **more) as session:
            return session.train_()


@contextlib.contextmanager
def ended_after(seconds):
    """Raises a `TimeoutError` in what runs within for longer."""

    def end(*_):
        raise TimeoutError("the time is up")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def apart(one, other):
    """The largest difference between two trainings' losses."""
    return max(abs(a - b) for a, b in zip(one.step_losses, other.step_losses, strict=True))


# Correctness


def tests(check):
    if not check.cuda:
        return {"tests": "left out: they skip themselves on a CPU"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
    )
    bad = [] if done.returncode == 0 else [f"pytest ended with {done.returncode}"]
    return {"tests": done.stdout[-1500:], "problems": bad}


def losses(check):
    """The small model on a CPU, on the device, and by every way through the model."""
    expected, found, problems = check.trained(device="cpu"), {}, []
    runs = {"float32": {}} | VARIANTS
    if not check.options.tiny:
        runs |= {dtype: {"dtype": dtype} for dtype in ("bfloat16", "float16")}
    for name, changes in runs.items():
        found[name] = apart(check.trained(**changes), expected)
        if not found[name] <= TOLERANCE[changes.get("dtype", "float32")]:
            problems.append(f"{name}: losses differ from those of the CPU in float32")
    return {"losses differ by": found, "problems": problems}


def determinism(check):
    found, problems = {}, []
    for dtype in ("bfloat16",) if check.options.tiny else ("float32", "bfloat16", "float16"):
        one, other = check.trained(dtype), check.trained(dtype)
        found[dtype] = {
            "losses differ by": apart(one, other),
            "weights": all(torch.equal(one.new[name], other.new[name]) for name in one.new),
        }
        if one.step_losses != other.step_losses or not found[dtype]["weights"]:
            problems.append(f"{dtype}: two runs differ")
    return {"equal to the bit": found, "problems": problems}


def memory(check):
    """Memory that runs out in a step, and in the thread that prepares the next one."""
    with check.session() as session, peak_memory(check.device) as peak:
        before = torch.cuda.memory_allocated() if check.cuda else 0
        whole = session.train_()
    del session  # its model has to go
    taken = peak.gib * 2**30 - before
    found, problems = {"training takes, GiB": taken / 2**30}, []
    for where in ("edit_losses", "prepare"):
        for real in (False, True) if check.cuda else (False,):
            name = f"{where}, {'real' if real else 'pretended'}"
            with told() as messages:
                result = short_of_memory(check, where, 0.6 * taken if real else None)
            found[name] = {"losses differ by": apart(result, whole), "told": messages}
            if not messages:
                problems.append(f"{name}: memory did not run out")
            if not apart(result, whole) <= TOLERANCE["float32"]:
                problems.append(f"{name}: other losses than with enough memory")
    return found | {"problems": problems}


def short_of_memory(check, where, room):
    """A training with an error in the third call of a method, or with less memory from then on."""
    with check.session() as session:
        limit = None if room is None else torch.cuda.memory_allocated() + room
        runner, calls = session._runner, []
        own = getattr(runner, where)

        def failing(batch):
            calls.append(1)
            if len(calls) != 3:
                return own(batch)
            if limit is None:
                raise torch.cuda.OutOfMemoryError("pretended")
            torch.cuda.empty_cache()
            allowed = torch.cuda.memory_allocated() if where == "prepare" else limit
            share = allowed / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share)
            try:
                return own(batch)
            finally:
                if where == "prepare":  # the step beside it may go on
                    torch.cuda.set_per_process_memory_fraction(1.0)

        setattr(runner, where, failing)
        try:
            return session.train_()
        finally:
            if check.cuda:
                torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def told():
    """Yields a list of what the training step warns of."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("locft_easyedit.training.step")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def flash(check):
    """Texts in one row that begin at other positions than 0 must not see each other."""
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    (borders, _), _ = prepare_fa_kwargs_from_position_ids(
        torch.tensor([[0, 1, 2, 3, 3, 4, 5, 0, 1]])
    )
    found = {"borders as transformers finds them": borders.tolist(), "right": [0, 4, 7, 9]}
    if importlib.util.find_spec("flash_attn") is None:
        return found | {"flash-attn": "not installed"}
    expected = check.trained("bfloat16")
    result = check.trained("bfloat16", attention="flash_attention_2")
    found |= {"packed": result.packed, "losses differ by": apart(result, expected)}
    bad = not found["losses differ by"] <= TOLERANCE["bfloat16"]
    return found | {"problems": ["losses differ from those of sdpa"] if bad else []}


# Rates and times


def ceilings(check):
    """What the card's own products reach at the shapes of a step: its true ceiling."""
    tokens = (1408, 1536, 8192) if check.cuda else (32,)
    return matmul_figures(check.whole, tokens, 430 if check.cuda else 16, check.device)


def steps(check):
    """One mini-batch again and again: rows of several lengths, and less of what makes it fast."""
    model, sizes = check.model(), check.whole
    tokenizer, batch = check.inputs(sizes, sizes.batch)
    flop = step_flop(model, sizes.layer, batch, tokenizer)
    found, repeats = {"TFLOP": flop / 1e12}, 10 if check.cuda else 1
    variants = [(n, ()) for n in (ROW_TOKENS if check.cuda else ROW_TOKENS[:1])]
    less = (("fused",), ("shared",), ("shared", "masks"))
    variants += [(ROW_TOKENS[0], without) for without in less]
    for row_tokens, without in variants:
        options = SimpleNamespace(**vars(sizes) | {"row_tokens": row_tokens, "n": len(batch)})
        hparams = one_step(options, sizes.layer, {})
        with Ours(model, tokenizer, batch, hparams, without, fused=True) as ours:
            ms = event_ms(ours.step, check.device, repeats)
            found[" - ".join([f"rows of {row_tokens}", *without])] = {
                "ms": ms, "TFLOP/s": flop / ms / 1e9, "loss": ours.step(),
                **by_kind(ours.step, check.device, min(repeats, 5)),
                "waits, one of which is the benchmark's": waits(ours.step, check.device),
            }  # fmt: skip
    theirs = published(model, tokenizer, batch, sizes.layer, sizes)
    found["published, bfloat16"] = {"ms": event_ms(theirs, check.device, min(repeats, 3))}
    return found


def compiled(check):
    """A step with `compile_layers`, and one without, where products are fused."""
    model, sizes, found = check.model(), check.whole, {}
    tokenizer, batch = check.inputs(sizes, sizes.batch)
    options = SimpleNamespace(**vars(sizes) | {"row_tokens": ROW_TOKENS[0], "n": len(batch)})
    for name, compile_layers in (("plain", False), ("compiled", True)):
        hparams = one_step(options, sizes.layer, {"compile_layers": compile_layers})
        start = time.perf_counter()
        with Ours(model, tokenizer, batch, hparams) as ours:
            prepared = time.perf_counter() - start
            seconds, loss = timed(ours.step, check.device)
            ms = event_ms(ours.step, check.device, 10 if check.cuda else 1)
            kinds = by_kind(ours.step, check.device, 1)
            used = ours.session.shortcuts.compiled is not None
        found[name] = {"ms": ms, "prepared, seconds": prepared, "first step, seconds": seconds,
                       "loss": loss, **kinds}  # fmt: skip
    apart = abs(found["plain"]["loss"] - found["compiled"]["loss"])
    problems = [] if used else ["no layer was compiled"]
    problems += ["compiled layers have another loss"] * (not apart <= TOLERANCE["bfloat16"])
    return found | {"problems": problems}


def whole(check):
    """A whole edit, with an event after each step: what a step takes within a run."""
    model, sizes = check.model(), check.whole
    tokenizer, requests = check.inputs(sizes)
    warm = SimpleNamespace(**vars(sizes) | {"epochs": 1})
    gpu.edit(model, tokenizer, requests[: sizes.batch], gpu.hparams_of(warm), check.device)
    marks, take_ = Marks(check.device), TrainingStep.take_

    def marked(self, *args):
        outcome = take_(self, *args)
        marks.add()
        return outcome

    TrainingStep.take_ = marked
    try:
        edit = gpu.edit(model, tokenizer, requests, gpu.hparams_of(sizes), check.device)
    finally:
        TrainingStep.take_ = take_
    flop = step_flop(model, sizes.layer, requests, tokenizer) * edit["epochs"]
    return {
        "TFLOP/s": flop / edit["seconds"]["train"] / 1e12,
        **marks.figures(len(marks) // edit["epochs"]),
        **{key: value for key, value in edit.items() if key != "losses"},
    }


def evaluation(check):
    """The metrics of some records, by batch size, and what one step of decoding takes."""
    model, sizes, found = check.model(), check.whole, {}
    tokenizer, records = check.inputs(sizes, 256 if check.cuda else 4)
    for metrics in ("accuracy", "generated"):
        for batch_size in (64, 256) if check.cuda else (4,):
            how = EvalConfig(batch_size, sizes.row_tokens)
            one = Evaluation(model, tokenizer, records, how, metrics=(metrics,))
            seconds, _ = timed(one.measure, check.device)
            found[f"{metrics}, batches of {batch_size}"] = {
                "records": len(records), "seconds": seconds, "a second": len(records) / seconds
            }  # fmt: skip
    rows = 64 if check.cuda else 2
    ids = torch.randint(3, sizes.vocabulary, (rows, 20), device=check.device)
    with torch.no_grad():
        _, cache = run_next(model, None, input_ids=ids)
        ms = event_ms(lambda: run_next(model, cache, input_ids=ids[:, :1]), check.device, 8)
    return found | {f"one more token of {rows} rows, ms": ms}


# Each with the seconds that it usually takes on one H100, by estimate.
STAGES = {
    "tests": (tests, 60), "losses": (losses, 40), "determinism": (determinism, 30),
    "memory": (memory, 30), "flash": (flash, 10), "ceilings": (ceilings, 20),
    "steps": (steps, 60), "whole": (whole, 80), "evaluation": (evaluation, 60),
    "compiled": (compiled, 90),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
