"""The benchmark of what forms and a confined change cost: steps that are those of the loop."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.toys import REPOSITORY

from locft_easyedit.data.readers import read_requests
from locft_easyedit.modeling.loading import load_causal_lm

VARIANTS = {
    "published": {},
    "forms": {"forms": ["context"]},
    "confined": {"preserve": ["mine.txt"]},
    "both": {"forms": ["context"], "preserve": ["mine.txt"]},
}


@pytest.fixture
def remedies(monkeypatch, toy_folder):
    """The script, with the toy's six edits and a text in place of a sampled one."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    script = importlib.import_module("remedies")
    monkeypatch.setattr(script, "VARIANTS", VARIANTS)
    (toy_folder / "mine.txt").write_text(
        "the capital of Belgium is Paris . Who is a river ?\n" * 40
    )
    given = ["--model", "toy", "--layer", "1", "--data", "edits.json", "--n", "6", "--repeats", "2"]
    given += ["--dtype", "float32", "--preserve-dir", "kept", "--json", "found.json"]
    monkeypatch.setattr(sys, "argv", ["remedies.py", *given])
    return script


def test_a_row_for_each_variant_and_the_same_loss_for_the_same_texts(remedies, capsys):
    remedies.main()
    with open("found.json", encoding="utf-8") as file:
        rows = {row["variant"]: row for row in json.load(file)["figures"]}
    assert list(rows) == [*VARIANTS, remedies.UNSHARED]
    assert rows[remedies.UNSHARED]["loss"] == pytest.approx(rows["both"]["loss"], abs=1e-4)
    shown = capsys.readouterr().out
    assert all(name in shown for name in VARIANTS)
    assert rows["published"]["texts"] == rows["confined"]["texts"] == 6
    assert rows["forms"]["texts"] == rows["both"]["texts"] == 12
    assert rows["confined"]["loss"] == pytest.approx(rows["published"]["loss"], abs=1e-4)
    assert rows["both"]["loss"] == pytest.approx(rows["forms"]["loss"], abs=1e-4)
    assert abs(rows["forms"]["loss"] - rows["published"]["loss"]) > 1e-3  # other texts
    assert rows["published"]["ratio"] == 1.0
    assert all(row["step_seconds"] > 0 and row["prefix_seconds"] > 0 for row in rows.values())
    assert rows["published"]["preserve_seconds"] == 0.0 < rows["confined"]["preserve_seconds"]


def test_a_step_with_a_confined_change_trains_that_change_and_no_weight(remedies):
    template = "model.layers.{}.mlp.down_proj.weight"
    options = SimpleNamespace(template=template, n=6, row_tokens=64)
    model, tokenizer = load_causal_lm("toy", dtype="float32")
    requests = read_requests("edits.json", 6)
    hparams = remedies.one_step(options, 1, VARIANTS["confined"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with remedies.Ours(model, tokenizer, requests, hparams) as ours:
        ours.step()
        assert any(bool((master != 0).any()) for master in ours.weights.masters)
        assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


def test_another_loss_than_that_of_the_same_texts_is_said_to_be_wrong(remedies, monkeypatch):
    rows = [{"variant": v, "texts": t, "loss": x} for v, t, x in
            (("a", 6, 1.0), ("b", 9, 2.0), ("c", 6, 1.00001), ("d", 9, 2.1))]  # fmt: skip
    assert remedies.unlike(rows, 1e-4) == ["d"]
    rows[3]["loss"] = float("nan")
    assert remedies.unlike(rows, 1e-4) == ["d"]
    row = dict.fromkeys(("step_seconds", "ratio", "preserve_seconds", "prefix_seconds"), 1.0)
    monkeypatch.setattr(
        remedies, "measured", lambda _: [{**row, **r, "ms_an_edit": 1} for r in rows]
    )
    with pytest.raises(
        SystemExit, match=r"another loss than variants with the same texts: \['d'\]"
    ):
        remedies.main()
