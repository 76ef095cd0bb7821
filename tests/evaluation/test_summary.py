"""The summary against means that are written out in the test."""

import json
import random

import pytest

from locft_easyedit.evaluation.summary import summarize


def mean(values):
    return sum(values) / len(values)


def naive(metrics, phase, *keys):
    """The mean over the records that have the figure, of the mean over its prompts."""
    values = []
    for record in metrics:
        value = record.get(phase, {})
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            values.append(mean(value) if isinstance(value, list) else value)
    return mean(values) if values else None


def random_record(draw):
    """A record as the evaluation makes it; each part is missing now and then."""

    def shares():
        return [draw.random() for _ in range(draw.randint(1, 4))]

    def phase():
        values = {
            "rewrite_acc": shares(),
            "rephrase_acc": shares(),
            "rewrite_ppl": draw.random() * 9,
            "ood_acc": draw.random(),
            "time": 3.0,
            "metric_meta": {"rewrite": {"protocol": "x"}},
            "locality": {
                "near_acc": shares(),
                "far_acc": shares(),
                "near_output": [[1, 2], [3]],
            },
            "portability": {"hop_acc": shares(), "alias_acc": shares(), "hop_output": [[4]]},
            "fluency": {"ngram_entropy": draw.random() * 6},
            "generated": {
                "reliability": draw.choice([0.0, 1.0]),
                "generalization": draw.random(),
                "answer": "Oslo",
                "rephrase_answers": ["Oslo", "Rome"],
                "stopped": True,
            },
        }
        for section in ("locality", "portability", "generated"):
            for key in list(values[section]):
                if draw.random() < 0.3:
                    del values[section][key]
        return {key: value for key, value in values.items() if draw.random() < 0.8}

    return {"case_id": 0, "pre": phase(), "post": phase()}


FIGURES = [
    ("rewrite_acc",),
    ("rephrase_acc",),
    ("rewrite_ppl",),
    ("ood_acc",),
    ("locality", "near_acc"),
    ("locality", "far_acc"),
    ("portability", "hop_acc"),
    ("portability", "alias_acc"),
    ("fluency", "ngram_entropy"),
    ("generated", "reliability"),
    ("generated", "generalization"),
]


@pytest.mark.parametrize("seed", range(20))
def test_summary_equals_naive_means(seed):
    draw = random.Random(seed)
    metrics = [random_record(draw) for _ in range(draw.randint(1, 12))]
    summary = summarize(metrics)
    assert list(summary) == ["pre", "post"]
    for phase in summary:
        found = dict(summary[phase])
        for section in ("locality", "portability", "fluency", "generated"):
            found |= {(section, key): mean for key, mean in found.pop(section, {}).items()}
        found = {key if isinstance(key, tuple) else (key,): mean for key, mean in found.items()}
        expected = {keys: naive(metrics, phase, *keys) for keys in FIGURES}
        expected = {keys: value for keys, value in expected.items() if value is not None}
        # The order of additions differs: a few units in the last place.
        assert found == pytest.approx(expected, rel=1e-14)
        assert {type(value) for value in found.values()} <= {float}
    json.dumps(summary)


def test_prompts_first_then_records():
    metrics = [{"post": {"rewrite_acc": [1.0, 0.0]}}, {"post": {"rewrite_acc": [1.0]}}]
    assert summarize(metrics)["post"] == {"rewrite_acc": 0.75}


def test_records_without_a_figure_do_not_count():
    metrics = [
        {"pre": {"rewrite_acc": [0.0]}},
        {"pre": {"rewrite_acc": [1.0], "locality": {"near_acc": [0.5]}}},
        {"pre": {"locality": {}}},
        {},
    ]
    assert summarize(metrics) == {
        "pre": {"rewrite_acc": 0.5, "locality": {"near_acc": 0.5}},
        "post": {},
    }


@pytest.mark.parametrize(
    "metrics", [[], [{}], [{"pre": {}, "post": {"time": 1, "locality": {"near_output": [[1]]}}}]]
)
def test_nothing_to_average(metrics):
    assert summarize(metrics) == {"pre": {}, "post": {}}
