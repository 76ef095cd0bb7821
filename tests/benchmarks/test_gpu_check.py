"""The check of a GPU, as a toy on the CPU: its stages run, and one that fails stops none."""

import importlib
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.toys import REPOSITORY


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


def test_every_stage_finds_something(check, capsys):
    status, figures = check.run("--tiny")
    assert status == 0, figures
    assert list(figures) == list(check.script.STAGES)
    assert set(figures["losses"]["losses differ by"]) == {"float32", *check.script.VARIANTS}
    told = [
        figures["memory"][f"{where}, pretended"]["told"] for where in ("edit_losses", "prepare")
    ]
    assert [len(messages) for messages in told] == [1, 1]
    assert figures["steps"]["rows of 64"]["kernels"] > 100
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
