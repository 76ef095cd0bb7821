"""The simulation on paper of more GPUs."""

import importlib
import json
import sys

import pytest
from helpers.toys import REPOSITORY
from plan.test_candidates import plan_for

from locft_easyedit.plan.units import GIB
from locft_easyedit.plan.workload import Machine


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script, in this process; returns what it prints."""

    def with_arguments(*arguments):
        monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
        monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, arguments)])
        importlib.import_module("scaling").main()
        return capsys.readouterr().out

    return with_arguments


def test_table_picture_and_where_it_stops(run, tmp_path):
    told = run(
        "--models", "llama3-8b", "--edits", 3000, "--batches", 100, "--gpus", 1, 8, 16,
        "--show", 1, 16, "--nvlink", 250, "--output", tmp_path,
    )  # fmt: skip
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["gpus"] for row in rows] == [1, 8, 16]
    machine = Machine(
        gpu=80 * GIB, host=2048 * GIB, disk=16 * 1024 * GIB, gpus=8, nodes=2, nvlink=250.0
    )
    plan = plan_for(machine=machine)
    assert rows[2]["seconds"] == pytest.approx(plan.seconds)
    assert rows[2]["parts"] == pytest.approx(plan.step().seconds)
    assert rows[2]["bound"] == "gradient exchange"
    assert rows[0]["speedup"] == 1
    assert rows[2]["speedup"] == pytest.approx(rows[0]["seconds"] / rows[2]["seconds"])
    text = (tmp_path / "scaling.md").read_text()
    assert text in told
    assert "| llama3-8b | 3,000 | 100 | 16 | 1.75 |" in text
    assert "| 100 | 8 |" not in text  # one that is not to be shown
    assert "3,000 edits, 100 a step: to 8 GPUs. From there to 16 the time grows by" in text
    assert "the largest of 16 ranks has 1.75 times an even part." in text
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
