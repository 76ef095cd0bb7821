"""The outcome of a comparison: its JSON file, its figures, and figures that are no numbers."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from locft_easyedit.compare.outcome import Comparison, Outcome, accuracies, checked, headline
from locft_easyedit.errors import DataError, OutputError
from locft_easyedit.utils.json_fields import write_dataclass

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
    "wrapped": {"reliability": 0.3, "chat_reliability": 0.2, "reliability_in": {"chat": 0.1}},
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


def through_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("figure", [0.5, math.nan, math.inf, -math.inf])
def test_an_outcome_becomes_json_and_back(figure):
    means = {"rewrite_acc": figure, "generated": {"reliability": 1}}
    one = outcome(after_all=means, seconds={"edit": figure}, hparams={"layers": [5], "lr": None})
    # NaN equals nothing, not even itself.
    assert repr(Outcome.from_dict(through_json(one.to_dict()))) == repr(one)


def test_the_file_holds_every_field_and_what_is_no_number(tmp_path):
    made = comparison(outcome(), outcome(seconds_per_edit=math.nan), versions={"torch": "2.13"})
    write_dataclass(tmp_path / "comparison.json", made)
    value = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    first, second = value.pop("outcomes")
    assert Outcome(**first) == made.outcomes[0]
    assert second["seconds_per_edit"] == {"not finite": "nan"}
    assert dataclasses.replace(made, outcomes=[]) == Comparison(**value)


def test_file_holds_any_text(tmp_path):
    reason = "lone \udcff, é, 日本, \x1b[31m"
    made = comparison(outcome(status="failed", reason=reason), n=3)
    write_dataclass(tmp_path / "comparison.json", made)
    text = (tmp_path / "comparison.json").read_text(encoding="utf-8")
    assert json.loads(text)["outcomes"][0]["reason"] == reason
    assert "日本" in text


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


def test_a_result_of_another_version_is_refused():
    damaged = outcome(method="ROME").to_dict()
    del damaged["log"]
    damaged["colour"] = "red"
    with pytest.raises(DataError, match=r"result of ROME .*: colour, log is missing or unknown"):
        Outcome.from_dict(damaged)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_dataclass(tmp_path / "none" / "c.json", comparison())


def test_headline():
    made = replace(outcome(), by_commit=[[0.9], [0.4, 0.7]])
    assert headline(made) == pytest.approx(
        {
            "reliability": 0.7,
            "contains_target": 0.75,
            "generalization": 0.6,
            "wrapped_reliability": 0.3,
            "chat_reliability": 0.2,
            "portability": 0.1,
            "locality": 0.6,
            "rewrite_acc": 0.5,
            "rephrase_acc": 0.4,
            "newest_commit": 0.8,
            "oldest_commit": 0.4,
            "capability": 0.5,
            "seconds_per_edit": 3.0,
            "peak_memory_gib": 1.5,
        }
    )


def test_headline_of_nothing():
    figures = headline(Outcome("FT"))
    assert len(figures) == 14
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
