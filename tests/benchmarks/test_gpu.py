"""The benchmark of a whole edit on a GPU runs on a CPU as well, at the size of a toy."""

import json
import subprocess
import sys

import pytest
from helpers.toys import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks/gpu.py"
TOY = ("--layers 4 --layer 2 --hidden 64 --inner 128 --heads 2 --kv-heads 1 --vocabulary 1000 "
       "--edits 60 --epochs 2 --row-tokens 64 --batch 20 --steps 1")  # fmt: skip


@pytest.mark.slow
def test_our_steps_have_the_losses_of_the_published_algorithm(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *TOY.split(), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text(encoding="utf-8"))["figures"]
    losses = {row["step"]: row["loss"] for row in figures["steps"]}
    assert losses["ours, float32"] == pytest.approx(losses["published, float32"], abs=1e-5)
    # Both round activations to 8 bits, at other places.
    assert losses["ours, bfloat16"] == pytest.approx(losses["published, bfloat16"], abs=2e-3)
