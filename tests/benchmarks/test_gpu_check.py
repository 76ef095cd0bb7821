"""The check of a GPU, as a toy on the CPU: its stages run, and one that fails stops none."""

import importlib
import json
import shutil
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.toys import REPOSITORY
from helpers.two_devices import two_devices


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs the script; returns its status and what it wrote."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    script = importlib.import_module("gpu_check")
    file = tmp_path / "found.json"

    def run(*arguments, stages=None):
        if stages is not None:
            monkeypatch.setattr(script, "STAGES", stages)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--json", str(file)])
        status = script.main()
        return status, json.loads(file.read_text(encoding="utf-8"))["figures"]

    return SimpleNamespace(run=run, script=script, file=file)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_every_stage_finds_something(check, capsys):
    status, figures = check.run("--tiny")
    assert status == 0, figures
    assert list(figures) == list(check.script.STAGES)
    assert set(figures["losses"]["losses differ by"]) == {"float32", *check.script.VARIANTS}
    told = [
        figures["memory"][f"{where}, pretended"]["told"] for where in ("edit_losses", "prepare")
    ]
    assert [len(messages) for messages in told] == [1, 1]
    whole, apart = (figures["steps"][name] for name in ("rows of 64", "rows of 64 - fused"))
    assert apart["kernels"] > whole["kernels"] > 100
    assert apart["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    found = figures["compiled"]
    assert found["compiled"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-2)
    assert found["compiled"]["most frequent"] != found["plain"]["most frequent"]
    assert figures["whole"]["updates"] == 6
    assert figures["whole"]["ms a step within epochs"] > 0
    assert "all is well" in capsys.readouterr().out


def test_a_stage_that_fails_is_told_and_the_next_one_runs(check, capsys):
    def broken(_):
        raise ZeroDivisionError("of a GPU")

    def following(_):
        written = json.loads(check.file.read_text(encoding="utf-8"))["figures"]
        return {"so far": list(written)}

    status, figures = check.run("--tiny", stages={"broken": (broken, 1), "next": (following, 1)})
    assert status == 1
    assert figures["broken"]["problems"] == ["ZeroDivisionError: of a GPU"]
    assert figures["next"]["so far"] == ["broken"]
    assert "look at: broken" in capsys.readouterr().out


def test_time_ends_what_runs_and_starts_nothing_more(check):
    stages = {"long": (lambda _: time.sleep(60), 0), "more": (lambda _: {}, 30)}
    start = time.monotonic()
    status, figures = check.run("--tiny", "--minutes", "0.2", stages=stages)
    assert status == 1
    assert time.monotonic() - start < 30
    assert figures["long"]["problems"] == ["TimeoutError: the time is up"]
    assert figures["more"]["problems"][0].startswith("TimeoutError: not started: ")


def test_what_is_wrong_is_a_problem(check, monkeypatch):
    losses = iter(range(100))
    monkeypatch.setattr(
        check.script.Check,
        "trained",
        lambda *args, **more: SimpleNamespace(step_losses=[next(losses)], new={"w": torch.ones(1)}),
    )
    status, figures = check.run("--tiny", "--only", "losses", "determinism")
    assert status == 1
    assert figures["determinism"]["problems"] == ["bfloat16: two runs differ"]
    assert len(figures["losses"]["problems"]) == 1 + len(check.script.VARIANTS)


def test_without_a_gpu_it_says_what_to_do(check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        check.run()
    assert "`--tiny` runs the same code on the CPU" in capsys.readouterr().err


class Event:
    """An event of a GPU that is done as soon as it is recorded."""

    def __init__(self, **_):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.mark.slow
def test_what_only_a_gpu_runs_on_a_pretended_one(check, monkeypatch):
    """Its products are those of the CPU; what is asked of CUDA itself is noted."""
    script, limits = check.script, []
    kinds = partial(script.by_kind, device=torch.device("cpu"), repeats=1)
    monkeypatch.setattr(script, "by_kind", lambda step, *_: kinds(step))
    for name in ("SMALL", "WHOLE"):
        monkeypatch.setattr(script, name, getattr(script, name) | script.TINY)
    asked = {
        "Event": Event, "memory_reserved": lambda *_: 3 * 2**30,
        "memory_allocated": lambda *_: 2**20, "set_sync_debug_mode": lambda _: None,
        "set_per_process_memory_fraction": limits.append,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=2**37),
    }  # fmt: skip
    with two_devices(1):
        for name, value in asked.items():
            monkeypatch.setattr(torch.cuda, name, value)
        status, figures = check.run("--only", "memory", "steps", "whole")
    # Nothing runs out of memory that is pretended, and that is told.
    assert status == 1
    assert figures["memory"]["problems"] == [
        f"{where}, real: memory did not run out" for where in ("edit_losses", "prepare")
    ]
    assert min(limits) < 1e-4
    assert limits[-1] == 1.0
    assert set(figures["steps"]) >= {f"rows of {n}" for n in script.ROW_TOKENS}
    assert figures["whole"]["reserved GiB after each epoch"] == [3.0, 3.0]
    assert figures["whole"]["updates"] == 6
