"""The outcome of a comparison: its JSON file, its figures, and figures that are no numbers."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locft_easyedit.compare.outcome import (
    Comparison,
    Outcome,
    accuracies,
    checked,
    headline,
    read_comparison,
    write_comparison,
)
from locft_easyedit.errors import DataError, OutputError

FIGURES = {
    "rewrite_acc": 0.5,
    "rephrase_acc": 0.4,
    "locality": {"neighborhood_acc": 0.3, "distracting_acc": 0.9},
    "portability": {"one_hop_acc": 0.2},
    "generated": {
        "reliability": 0.7,
        "generalization": 0.6,
        "portability": 0.1,
        "locality": 0.8,
        "contains_target": 0.75,
    },
    "fluency": {"ngram_entropy": 5.5},
}


def outcome(**changes):
    values = {
        "method": "ROME",
        "n_edits": 10,
        "after_all": FIGURES,
        "right_after_each": {"rewrite_acc": 1.0, "generated": {"reliability": 0.95}},
        "capability": {"tasks": {"mmlu": 0.25, "sst2": {"acc": 0.75}}, "mean": 0.5},
        "seconds": {"load": 2.0, "edit": 30.0},
        "seconds_per_edit": 3.0,
        "peak_memory_gib": 1.5,
        "peak_memory_of": "process",
    }
    return Outcome(**values | changes)


def comparison(*outcomes, **changes):
    values = {
        "model": "SmolLM2-135M",
        "data": "ZsRE",
        "n": 10,
        "easyedit": "PyPI release 0.0.1.dev0",
        "device": "CPU",
        "dtype": "float32",
        "before": {"rewrite_acc": 0.1},
    }
    return Comparison(**values | changes, outcomes=list(outcomes))


texts = st.text(max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
hparams = st.recursive(
    st.none() | st.booleans() | texts | finite,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def comparisons(numbers):
    flat = st.dictionaries(texts, numbers, max_size=3)
    means = st.fixed_dictionaries(
        {}, optional={"rewrite_acc": numbers, "generated": flat, "locality": flat}
    )
    capability = st.fixed_dictionaries({"tasks": flat, "mean": numbers})
    rows = st.builds(
        Outcome,
        method=texts,
        status=st.sampled_from(["ok", "failed", "unavailable", "not finite"]),
        reason=st.none() | texts,
        n_edits=st.integers(0, 9),
        after_all=means,
        right_after_each=st.none() | means,
        capability=st.none() | capability,
        seconds=flat,
        seconds_per_edit=st.none() | numbers,
        peak_memory_gib=st.none() | numbers,
        peak_memory_of=st.sampled_from([None, "GPU", "process"]),
        corpus=st.none() | texts,
        hparams=st.dictionaries(texts, hparams, max_size=3),
        notes=st.lists(texts, max_size=2),
        log=st.none() | texts,
    )
    return st.builds(
        Comparison,
        **dict.fromkeys(("model", "data", "easyedit", "device", "dtype"), texts),
        n=st.integers(0, 9),
        versions=st.dictionaries(texts, texts, max_size=2),
        before=means,
        capability_before=st.none() | capability,
        outcomes=st.lists(rows, max_size=3),
    )


def through_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


@settings(max_examples=60, deadline=None)
@given(comparisons(finite))
def test_round_trip(made):
    assert Comparison.from_dict(through_json(made.to_dict())) == made
    for row in made.outcomes:
        assert Outcome.from_dict(through_json(row.to_dict())) == row


@settings(max_examples=60, deadline=None)
@given(comparisons(st.sampled_from([math.nan, math.inf, -math.inf, 0.5])))
def test_round_trip_of_what_is_no_number(made):
    again = Comparison.from_dict(through_json(made.to_dict()))
    assert repr(again) == repr(made)  # NaN equals nothing, not even itself


def test_file_holds_any_text(tmp_path):
    made = comparison(outcome(status="failed", reason="lone \udcff, é, 日本, \x1b[31m"), n=3)
    write_comparison(tmp_path / "comparison.json", made)
    assert read_comparison(tmp_path / "comparison.json") == made
    assert "日本" in (tmp_path / "comparison.json").read_text(encoding="utf-8")


def test_values_of_other_libraries_become_plain():
    given_means = {"generated": {"reliability": np.float32(0.5)}}
    row = Outcome(
        "FT",
        after_all=given_means,
        seconds_per_edit=torch.tensor(2.0),
        n_edits=np.int64(3),
        hparams={"device": torch.device("cpu"), "file": Path("a/b"), "layers": (1, 2), 3: True},
    )
    assert row.after_all == {"generated": {"reliability": 0.5}}
    assert type(row.after_all["generated"]["reliability"]) is float
    assert (type(row.seconds_per_edit), type(row.n_edits)) == (float, int)
    assert row.hparams == {"device": "cpu", "file": "a/b", "layers": [1, 2], "3": True}
    given_means["generated"]["reliability"] = 0.0
    assert row.after_all["generated"]["reliability"] == 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", 3, r"`method=3` is not a text"),
        ("status", "fine", r"`status='fine'` is not one of ok, failed, unavailable, not finite"),
        ("reason", ["x"], r"`reason=\['x'\]` is not a text or null"),
        ("n_edits", -1, r"`n_edits=-1` is not a whole number"),
        ("n_edits", True, r"`n_edits=True` is not a whole number"),
        ("after_all", [0.5], r"`after_all=\[0.5\]` is not means"),
        ("after_all", {"rewrite_acc": "0.5"}, r"is not means as `summarize` returns them"),
        ("after_all", {"generated": 0.5}, r"is not means as `summarize` returns them"),
        ("right_after_each", 0.5, r"`right_after_each=0.5` is not means"),
        ("capability", {"mean": 0.5}, r"is not a mapping with `tasks`"),
        ("capability", {"tasks": {}, "mean": "high"}, r"is not a mapping with `tasks`"),
        ("seconds", None, r"`seconds=None` is not a mapping of numbers"),
        ("seconds_per_edit", "3", r"`seconds_per_edit='3'` is not a number or null"),
        ("peak_memory_gib", [], r"`peak_memory_gib=\[\]` is not a number or null"),
        ("peak_memory_of", "disk", r"`peak_memory_of='disk'` is not one of GPU, process or null"),
        ("corpus", 1, r"`corpus=1` is not a text or null"),
        ("hparams", [], r"`hparams=\[\]` is not a mapping"),
        ("notes", "one", r"`notes='one'` is not a list of texts"),
        ("notes", [1], r"`notes=\[1\]` is not a list of texts"),
        ("log", 1, r"`log=1` is not a text or null"),
    ],
)
def test_damaged_outcome(field, value, message):
    damaged = comparison(outcome(), outcome()).to_dict()
    damaged["outcomes"][1][field] = value
    with pytest.raises(DataError, match=rf"outcomes\[1\]: .*{message}"):
        Comparison.from_dict(damaged)
    with pytest.raises(DataError, match=message):
        Outcome.from_dict(damaged["outcomes"][1])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", "10", r"`n='10'` is not a whole number"),
        ("versions", {"torch": 2}, r"is not a mapping of texts"),
        ("before", None, r"`before=None` is not means"),
        ("capability_before", {}, r"`capability_before=\{\}` is not a mapping with `tasks`"),
        ("outcomes", {}, r"`outcomes=\{\}` is not a list"),
        ("outcomes", ["ROME"], r"outcomes\[0\] is a str, not a mapping"),
    ],
)
def test_damaged_comparison(field, value, message):
    damaged = comparison(outcome()).to_dict() | {field: value}
    with pytest.raises(DataError, match=message):
        Comparison.from_dict(damaged)


def test_all_problems_in_one_error():
    damaged = comparison(outcome()).to_dict()
    del damaged["device"]
    damaged["colour"] = "red"
    damaged["outcomes"][0]["status"] = "good"
    del damaged["outcomes"][0]["log"]
    with pytest.raises(DataError, match=r"has no `device`") as caught:
        Comparison.from_dict(damaged, source="results/comparison.json")
    for part in (
        "results/comparison.json is no comparison",
        "unknown field `colour`",
        "`status='good'`",
        "outcomes[0] has no `log`",
        "Run the comparison again",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_no_mapping(value):
    with pytest.raises(DataError, match=r"the comparison is a .*, not a mapping"):
        Comparison.from_dict(value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_file_that_does_not_parse(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(DataError, match=r"c\.json cannot be read as the JSON file"):
        read_comparison(tmp_path / "c.json")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_comparison(tmp_path / "none.json")
    with pytest.raises(OutputError, match="cannot be written"):
        write_comparison(tmp_path / "none" / "c.json", comparison())


def test_headline():
    assert headline(outcome()) == pytest.approx(
        {
            "reliability": 0.7,
            "contains_target": 0.75,
            "generalization": 0.6,
            "portability": 0.1,
            "locality": 0.6,
            "rewrite_acc": 0.5,
            "rephrase_acc": 0.4,
            "capability": 0.5,
            "seconds_per_edit": 3.0,
            "peak_memory_gib": 1.5,
            "reliability_right_after_each": 0.95,
            "rewrite_acc_right_after_each": 1.0,
        }
    )


def test_headline_of_nothing():
    figures = headline(Outcome("FT"))
    assert len(figures) == 12
    assert set(figures.values()) == {None}


def test_zero_is_a_figure():
    row = Outcome("FT", after_all={"rewrite_acc": 0, "generated": {"reliability": 0.0}})
    assert headline(row)["rewrite_acc"] == 0.0
    assert headline(row)["reliability"] == 0.0


def test_locality_is_never_averaged_over_what_is_left():
    kept = {"locality": {"near_acc": 1.0, "near_output_length": 7, "far_acc": 0.5}}
    assert accuracies(kept)["locality"] == 0.75
    for lost in (math.nan, None):
        kept["locality"]["far_acc"] = lost
        assert math.isnan(accuracies(kept)["locality"])


def with_figure(path, value):
    """An outcome in which the figure at the dotted `path` is `value`."""
    first, *rest = path.split(".")
    values = outcome().to_dict()
    inner = values
    for key in [first, *rest][:-1]:
        inner = inner[key]
    inner[path.rpartition(".")[2]] = value
    return Outcome(**values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path",
    [
        "after_all.rewrite_acc",
        "after_all.generated.contains_target",
        "after_all.locality.neighborhood_acc",
        "after_all.fluency.ngram_entropy",
        "right_after_each.generated.reliability",
        "capability.mean",
        "capability.tasks.mmlu",
        "capability.tasks.sst2.acc",
        "seconds.edit",
        "seconds_per_edit",
        "peak_memory_gib",
    ],
)
def test_checked_names_what_is_no_number(path, value):
    broken = with_figure(path, value)
    found = checked(broken)
    assert found.status == "not finite"
    assert f"{path} is {value}" in found.reason
    assert repr(dataclasses.replace(found, status="ok", reason=None)) == repr(broken)


@pytest.mark.parametrize(
    "path",
    ["after_all.rewrite_acc", "right_after_each.rewrite_acc", "capability.mean", "seconds.edit"],
)
def test_checked_names_what_became_null(path):
    found = checked(with_figure(path, None))
    assert found.status == "not finite"
    assert f"{path} is None" in found.reason


def test_checked_says_why_capability_has_no_mean():
    lost = {"tasks": {"sst2": {"value": None, "n": 9}}, "mean": None, "reason": "without: sst2"}
    assert "capability.mean is None (without: sst2)" in checked(outcome(capability=lost)).reason


def test_checked_counts_what_it_does_not_name():
    found = checked(Outcome("FT", seconds={str(i): math.nan for i in range(8)}))
    assert "seconds.4 is nan" in found.reason
    assert "seconds.5" not in found.reason
    assert "and 3 more" in found.reason


def test_checked_leaves_the_others():
    for row in (
        outcome(),
        outcome(seconds_per_edit=None, peak_memory_gib=None, capability=None),
        Outcome("FT", "failed", "no layer 40", seconds_per_edit=math.nan),
    ):
        assert checked(row) is row
