"""What a study finds, its score, and what a choice looks at: rewordings and drift."""

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from helpers.toys import toy_model, toy_requests, toy_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from locft_easyedit.data.readers import read_requests
from locft_easyedit.locate.held_out import reword
from locft_easyedit.locate.score import Drift, score
from locft_easyedit.locate.study.study_outcome import DIVERGED, FIGURES, CellOutcome, StudyOutcome
from locft_easyedit.modeling.locations import Location
from locft_easyedit.training.choice import Cell
from locft_easyedit.training.health import health_texts

DOWN = "model.layers.{}.mlp.down_proj.weight"
SHARES = st.floats(0.0, 1.0)
DRIFTS = st.floats(0.0, 50.0)
# Plain and packed float32 passes differ by their rounding; measured: 7e-9 of 1.7 nats.
DRIFT_TOLERANCE = 1e-6


def cell(layer=0, module="down", lr=1e-3, **figures):
    values = {"reliability": 0.9, "reworded": 0.8, "drift": 0.1, "score": 0.85, **figures}
    return CellOutcome(Cell(Location(layer, module, (DOWN,)), lr), figures=values)


def study(*cells, n_cells=None, **changes):
    values = {"model": "toy", "data": "edits.json", "n": 20, "cells": list(cells)}
    return StudyOutcome(**values | {"n_cells": n_cells or len(cells)} | changes)


@given(SHARES, SHARES, DRIFTS)
def test_the_score_is_a_share_and_no_better_than_thrice_its_worst_part(right, general, drift):
    found = score(right, general, drift)
    worst = max(0.01, min(right, general, math.exp(-drift)))  # less counts as this much
    assert 0.0 <= found <= 1.0
    # A harmonic mean of three lies between its least part and three times that.
    assert worst - 1e-12 <= found <= 3 * worst + 1e-12


@given(SHARES, SHARES, DRIFTS, st.floats(1e-3, 1.0), st.sampled_from(range(3)))
def test_the_score_never_falls_when_a_part_gets_better(right, general, drift, more, which):
    better = [right, general, drift]
    better[which] += -min(more, drift) if which == 2 else min(more, 1 - better[which])
    assert score(*better) >= score(right, general, drift) - 1e-12


def test_the_score_of_known_parts():
    assert score(1.0, 1.0, 0.0) == 1.0
    assert score(0.5, 1.0, 0.0) == pytest.approx(3 / (2 + 1 + 1))
    assert score(1.0, 0.25, math.log(2)) == pytest.approx(3 / (1 + 4 + 2))


@pytest.mark.parametrize(
    "parts",
    [(math.nan, 1.0, 0.0), (1.0, math.nan, 0.0), (1.0, 1.0, math.nan), (1.0, 1.0, math.inf),
     (1.0, 1.0, -0.1), (1.0, math.inf, 0.0)],
)  # fmt: skip
def test_the_score_of_what_is_no_number_is_zero(parts):
    assert score(*parts) == 0.0


def test_places_that_fail_in_one_respect_are_still_told_apart():
    # Nobody answers a rewording; one of them has at least learned the edits.
    assert score(0.9, 0.0, 0.2) > score(0.0, 0.0, 0.01) > 0


def test_a_rewording_holds_the_subject_and_is_another_text():
    for request in toy_requests(12):
        found = reword(request["prompt"])
        assert len(found) == len(set(found)) >= 3
        for text in found:
            assert request["subject"] in text
            assert request["prompt"] not in (text, text.strip())
        assert reword(request["prompt"]) == found


def test_rewordings_of_real_prompts(shared_data):
    for name in ("zsre_1k.json", "counterfact_1k.json"):
        for request in read_requests(shared_data / name, 300):
            for text in reword(request["prompt"]):
                # Small words at the beginning may lose their capital, a subject never does.
                assert request["subject"] in text or text.lower().count(request["subject"].lower())
                assert request["prompt"].strip()[1:] in text
                assert text != request["prompt"]
                assert text != request.get("rephrase_prompt")


def test_a_name_keeps_its_capital_within_a_sentence():
    inside = [
        text for text in reword("The Hague lies in") if not text.endswith("The Hague lies in")
    ]
    assert inside
    assert all(text.endswith("the Hague lies in") for text in inside)
    assert all(text.endswith("Oslo lies in") for text in reword("Oslo lies in"))
    assert any("who wrote Emma?" in text for text in reword("Who wrote Emma?"))


def test_a_question_and_a_statement_have_their_own_frames():
    question, statement = reword("Who wrote Emma?"), reword("Emma was written by")
    assert question[0] == "Question: Who wrote Emma? Answer:"
    assert all(text.endswith("Emma was written by") for text in statement)


@pytest.fixture
def text():
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    texts, problem = health_texts(model, tokenizer)
    assert problem == ""
    return model, texts


def naive_distributions(model, texts):
    """Log probabilities of every token but the first of each text, by plain forward passes."""
    found = []
    for i in range(len(texts)):
        ids = torch.from_numpy(texts.ids[texts.offsets[i] : texts.offsets[i + 1]])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        found.append(torch.log_softmax(logits.double(), dim=-1))
    return torch.cat(found)


@pytest.mark.parametrize("packed", [True, False])
def test_an_unchanged_model_has_not_drifted(text, packed):
    model, texts = text
    assert Drift(model, texts, packed=packed).measure() == 0.0


@pytest.mark.parametrize("packed", [True, False])
def test_drift_is_the_kl_divergence_of_plain_forward_passes(text, packed):
    model, texts = text
    before = naive_distributions(model, texts)
    drift = Drift(model, texts, packed=packed)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(-20)
    after = naive_distributions(model, texts)
    naive = float((before.exp() * (before - after)).sum(-1).mean())
    assert naive > 0.01
    assert drift.measure() == pytest.approx(naive, abs=DRIFT_TOLERANCE)
    # The divergence of the one from the other is not that of the other from the one.
    reverse = float((after.exp() * (after - before)).sum(-1).mean())
    assert abs(reverse - naive) > 10 * DRIFT_TOLERANCE


def test_the_drift_of_weights_that_are_no_numbers_is_none(text):
    model, texts = text
    drift = Drift(model, texts, packed=True)
    weight = model.model.layers[3].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.nan
    assert math.isnan(drift.measure())
    with torch.no_grad():
        weight.copy_(kept)
    assert drift.measure() == 0.0  # what was recorded is still there


def test_drift_leaves_a_training_model_in_training(text):
    model, texts = text
    model.train()
    Drift(model, texts, packed=True).measure()
    assert model.training


def test_a_cell_becomes_json_and_back():
    whole = CellOutcome(
        Cell(Location(3, "mlp", ("a.{}", "b.{}")), 5e-4), DIVERGED, "NaN", {"drift": 0.25}, 7, True,
        {"training": 1.5}, 4096,
    )  # fmt: skip
    assert CellOutcome.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    for f in dataclasses.fields(CellOutcome):
        values = whole.to_dict()
        del values[f.name]
        with pytest.raises(KeyError, match=f.name):
            CellOutcome.from_dict(values)


def test_the_key_of_a_cell_is_a_file_name_of_its_own():
    assert cell(7, "down", 2e-3).cell.key == "layer-07-down-0.002"
    keys = {
        cell(layer, module, lr).cell.key
        for layer, module, lr in itertools.product(range(12), ("q", "gate_up"), (1e-5, 1e-3, 2e-3))
    }
    assert len(keys) == 72


def test_the_best_rate_of_each_place():
    cells = [
        cell(1, "up", 1e-3, score=0.5),
        cell(1, "down", 1e-3, score=0.4),
        cell(1, "down", 2e-3, score=0.6),
        cell(0, "down", 1e-3, score=0.3),
        dataclasses.replace(cell(2), state=DIVERGED, figures={}),
    ]
    best = study(*cells).best_rates()
    assert [(str(one.cell.location), one.cell.lr) for one in best] == [
        ("layer 0 down", 1e-3),
        ("layer 1 up", 1e-3),
        ("layer 1 down", 2e-3),
    ]


def test_the_chosen_cell_has_the_best_score_and_of_equals_less_drift():
    cells = [
        cell(0, score=0.5, drift=0.01),
        cell(1, score=0.9, drift=0.3),
        cell(2, score=0.9, drift=0.2),
        cell(2, lr=2e-3, score=0.9, drift=0.1),
    ]
    found = study(*cells)
    assert found.chosen() is cells[3]
    assert found.chosen() in found.best_rates()
    assert study().chosen() is None
    assert study(dataclasses.replace(cell(), state=DIVERGED, figures={})).chosen() is None


def test_the_order_in_which_cells_were_done_plays_no_part():
    cells = [
        cell(layer, module, lr, score=0.9, drift=0.1)
        for layer, module, lr in itertools.product((2, 1), ("down", "up"), (2e-3, 1e-3))
    ]
    for seed in range(10):
        random.Random(seed).shuffle(cells)
        found = study(*cells)
        assert str(found.chosen().cell) == "layer 1 up, lr 0.001"
        assert [one.cell.lr for one in found.best_rates()] == [1e-3] * 4


@pytest.mark.parametrize("figure", [f for f in FIGURES if f not in ("score", "drift")])
def test_what_the_evaluation_measures_does_not_choose(figure):
    cells = [cell(0, score=0.9), cell(1, score=0.8, **{figure: 1.0})]
    assert study(*cells).chosen() is cells[0]


def test_marked_cells_are_those_without_figures():
    bad = [
        dataclasses.replace(cell(layer, module), state=DIVERGED, figures={})
        for layer, module in ((3, "down"), (1, "down"), (1, "q"))
    ]
    found = study(cell(0), *bad)
    assert found.marked() == [bad[2], bad[1], bad[0]]
    assert found.measured == [cell(0)]
