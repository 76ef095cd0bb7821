"""One evaluation before and after an edit: shared prefix, batch sizes, subsets, damaged models."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.toys import (
    DOWN_PROJECTION,
    FEW_KINDS,
    N_LAYERS,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)

from locft_easyedit.data.batching import in_batches, length_sorted_batches
from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.errors import HyperParamsError, RequestError
from locft_easyedit.evaluation import predictions as choices
from locft_easyedit.evaluation.evaluation import PLAIN_METRICS, Evaluation, finish_
from locft_easyedit.evaluation.perplexity import Perplexity
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.evaluation.teacher_forced import TeacherForced
from locft_easyedit.modeling.places import find_layers
from locft_easyedit.prefix.cut import layer_cut
from locft_easyedit.prefix.store import Budget
from locft_easyedit.training.session import EditSession

ALL = ("accuracy", "generated", "ppl")


def as_json(value):
    return json.dumps(value, sort_keys=True)


def records_with_lists(n):
    records = toy_requests(n)
    for record in records:
        record["locality"]["many"] = {
            "prompt": ["The river is", f"Once more, the river near {record['subject']} is the"],
            "ground_truth": ["Rhine", "Loire and the Rhine"],
        }
    return records


@torch.no_grad()
def edit_(model, layer):
    """An edit in `layer`, strong enough to change answers."""
    for name, parameter in model.named_parameters():
        if f".{layer}." in name and parameter.ndim >= 2:
            parameter.mul_(-0.5)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_the_frozen_prefix_changes_nothing(kind):
    model, tokenizer, records = toy_model(kind), toy_tokenizer(), records_with_lists(6)
    frozen = layer_cut(find_layers(model), 2)
    shared = Evaluation(
        model, tokenizer, records, EvalConfig(5, frozen=frozen), metrics=PLAIN_METRICS
    )
    plain = Evaluation(model, tokenizer, records, EvalConfig(5), metrics=PLAIN_METRICS)
    before = shared.measure()
    assert as_json(before) == as_json(plain.measure())
    edit_(model, 2)
    after = shared.measure()
    assert as_json(after) == as_json(plain.measure())
    assert as_json(after) != as_json(before)
    assert as_json(shared.measure(only=[4, 1])) == as_json([after[4], after[1]])


def test_the_frozen_layers_run_once(monkeypatch):
    never = torch.tensor(False)  # no pass of another form
    monkeypatch.setattr(choices, "too_close", lambda best, model: never.expand(len(best)))
    model, tokenizer = toy_model(), toy_tokenizer()
    how = EvalConfig(packed=True, frozen=layer_cut(find_layers(model), 2))
    evaluation = TeacherForced(model, tokenizer, toy_requests(6), how)
    calls = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    evaluation.measure("", only=[1])  # some texts are no base to share
    assert set(calls) == {0, 1, 2, 3}
    evaluation.measure("")
    calls.clear()
    evaluation.measure("")
    evaluation.measure("", only=[2])
    assert set(calls) == {2, 3}


def test_no_prefix_is_kept_where_memory_is_short(caplog):
    model, tokenizer = toy_model(), toy_tokenizer()
    nothing = Budget(host_gib=0.0, disk_gib=0.0)
    how = EvalConfig(packed=True, frozen=layer_cut(find_layers(model), 2), budget=nothing)
    evaluation = TeacherForced(model, tokenizer, toy_requests(6), how)
    assert evaluation._choices._prefix is None
    assert "all layers run in every measurement" in caplog.text


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_same_for_every_batch_size(kind):
    model, tokenizer, records = toy_model(kind), toy_tokenizer(), records_with_lists(7)
    expected = None
    for batch_size, row_tokens, packed in ((1, 1, False), (3, 40, True), (64, 300, True)):
        how = EvalConfig(batch_size, row_tokens, packed)
        found = as_json(Evaluation(model, tokenizer, records, how, metrics=PLAIN_METRICS).measure())
        expected = expected or found
        assert found == expected


def test_close_choices_are_settled_by_easyedits_own_pass(monkeypatch):
    """With everything counted as close, EasyEdit's padded pass over each question decides."""
    model, tokenizer, records = toy_model("gpt2"), toy_tokenizer(), records_with_lists(5)
    expected = TeacherForced(model, tokenizer, records, EvalConfig()).measure("")
    always = torch.tensor(True)
    monkeypatch.setattr(choices, "too_close", lambda best, model: always.expand(len(best)))
    asked = []
    original = TeacherForced._as_easyedit
    monkeypatch.setattr(
        TeacherForced, "_as_easyedit", lambda self, i: asked.append(i) or original(self, i)
    )
    again = TeacherForced(model, tokenizer, records, EvalConfig())
    assert as_json(again.measure("")) == as_json(expected)
    assert len(asked) == len(again.texts)


def test_an_edit_session_shares_its_layers():
    model, tokenizer, records = toy_model(), toy_tokenizer(), toy_requests(6)
    with EditSession(model, tokenizer, records, toy_hparams(), progress=False) as session:
        how = EvalConfig.from_session(session, progress=False)
        evaluation = Evaluation(model, tokenizer, records, how, metrics=PLAIN_METRICS)
        before = evaluation.measure()
        session.train_()
        after = evaluation.measure()
    assert as_json(after) == as_json(
        Evaluation(model, tokenizer, records, metrics=PLAIN_METRICS).measure()
    )
    assert as_json(before) != as_json(after)
    for pre, post in zip(before, after, strict=True):
        finish_(pre, post)
        assert 0 <= post["locality"]["neighborhood_acc"][0] <= 1
        assert post["generated"]["locality"] in (0.0, 1.0)


@pytest.mark.parametrize("template", ["model.layers.{}.", DOWN_PROJECTION["llama"]])
def test_an_edit_of_the_last_layer_is_measured(template):
    """The pass that records its prefix keeps all positions; later ones run at few of them."""
    model, tokenizer, records = toy_model(), toy_tokenizer(), records_with_lists(6)
    h = toy_hparams(layers=[3], rewrite_module_tmp=template)
    with EditSession(model, tokenizer, records, h, progress=False) as session:
        assert session.shortcuts.tail is not None
        how = EvalConfig.from_session(session, progress=False)
        evaluation = Evaluation(model, tokenizer, records, how, metrics=PLAIN_METRICS)
        assert as_json(evaluation.measure()) == as_json(
            Evaluation(model, tokenizer, records, metrics=PLAIN_METRICS).measure()
        )
        session.train_()
        after = evaluation.measure()
    assert as_json(after) == as_json(
        Evaluation(model, tokenizer, records, metrics=PLAIN_METRICS).measure()
    )


# Perplexity


@torch.no_grad()
def naive_ppl(model, tokenizer, prompt, answer):
    ids = tokenizer(f"{prompt} {answer}")["input_ids"]
    start = max(1, len(tokenizer(prompt)["input_ids"]))
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = [-float(logits[i - 1, ids[i]]) for i in range(start, len(ids))]
    return math.exp(np.mean(losses))


@pytest.mark.parametrize("packed", [True, False])
def test_perplexity_is_the_naive_one(packed):
    model, tokenizer, records = toy_model(), toy_tokenizer(), toy_requests(5)
    found = Perplexity(model, tokenizer, records, EvalConfig(3, packed=packed)).measure("")
    for record, entry in zip(records, found, strict=True):
        target = record["target_new"]
        for part, prompt in (("rewrite", "prompt"), ("rephrase", "rephrase_prompt")):
            expected = naive_ppl(model, tokenizer, record[prompt], target)
            assert entry[f"{part}_ppl"] == pytest.approx(expected, rel=1e-5)


# Bad input


def test_a_damaged_model_gives_nan_everywhere(caplog):
    model, tokenizer, records = toy_model(), toy_tokenizer(), toy_requests(3)
    (pre, *_) = Evaluation(model, tokenizer, records, metrics=ALL).measure()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    entries = Evaluation(model, tokenizer, records, metrics=ALL).measure()
    assert "no finite numbers" in caplog.text
    finish_(pre, entries[0])
    for entry in entries:
        generated = entry["generated"]
        figures = [
            *entry["rewrite_acc"],
            *entry["rephrase_acc"],
            *entry["portability"]["one_hop_acc"],
            entry["rewrite_ppl"],
            generated["reliability"],
            generated["generalization"],
            generated["portability"],
            generated["contains_target"],
        ]
        assert np.isnan(figures).all()
    assert np.isnan(entries[0]["locality"]["neighborhood_acc"]).all()
    assert np.isnan(entries[0]["generated"]["locality"])


def test_only_the_record_that_is_no_number_is_nan():
    model, tokenizer, records = toy_model(), toy_tokenizer(), toy_requests(3)
    records[1]["prompt"] = "<s> " + records[1]["prompt"]
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.bos_token_id] = float("inf")
    # One text a row: in a row of several, NaN would spread by way of masked positions.
    how = EvalConfig(packed=False, batch_size=1)
    found = Evaluation(model, tokenizer, records, how, metrics=["accuracy"]).measure()
    assert [np.isnan(entry["rewrite_acc"][0]) for entry in found] == [False, True, False]


@pytest.mark.parametrize("metrics", [[], ["accuracy", "speed"]])
def test_unknown_metrics(metrics):
    with pytest.raises(HyperParamsError, match="must be one or more of accuracy, generated"):
        Evaluation(toy_model(), toy_tokenizer(), toy_requests(1), metrics=metrics)


def test_bad_records_are_refused_when_the_evaluation_is_made():
    tokenizer = toy_tokenizer()
    records = toy_requests(2)
    records[1]["locality"]["neighborhood"]["prompt"] = " "
    with pytest.raises(RequestError, match="request 1, locality 'neighborhood'"):
        Evaluation(toy_model(), toy_tokenizer(), records)
    long = toy_requests(1)
    long[0]["prompt"] = "a b c d " * 60
    with pytest.raises(RequestError, match="the model's context is 256"):
        Evaluation(toy_model(), toy_tokenizer(), long)
    just = toy_requests(1)
    just[0]["prompt"] = "a"
    while len(tokenizer(just[0]["prompt"])["input_ids"]) < 240:
        just[0]["prompt"] += " b c"
    with pytest.raises(RequestError, match="and 32 for the answer"):
        Evaluation(toy_model(), toy_tokenizer(), just, metrics=["generated"])


# Batches


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("no room"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED: no room")],
    ids=lambda error: type(error).__name__,
)
def test_batches_shrink_where_memory_runs_out(error, caplog):
    seen = []

    def run(batch):
        if len(batch) > 3:
            raise error
        seen.append(batch.tolist())

    lengths = np.array([5, 9, 1, 7, 3, 8, 2, 6, 4, 10])
    in_batches(length_sorted_batches(lengths, 8), run, description="")
    assert sorted(i for batch in seen for i in batch) == list(range(10))
    assert max(map(len, seen)) <= 3
    flat = [lengths[i] for batch in seen for i in batch]
    assert flat == sorted(flat, reverse=True)
    assert "2 from here on" in caplog.text

    def never(batch):
        raise error

    with pytest.raises(type(error), match="no room"):
        in_batches(length_sorted_batches(lengths, 4), never, description="")


def test_other_errors_do_not_shrink_batches(caplog):
    seen = []

    def run(batch):
        seen.append(batch)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_batches([np.arange(4)], run, description="")
    assert len(seen) == 1
    assert not caplog.text


@pytest.mark.parametrize("template", ["model.layers.{}.mlp.down_proj.weight", "model.layers.{}"])
def test_a_place_in_the_last_layer_shares_its_prefix(template):
    model, tokenizer, records = toy_model(), toy_tokenizer(), records_with_lists(5)
    hparams = toy_hparams(layers=[N_LAYERS - 1], rewrite_module_tmp=template, num_steps=1)
    with EditSession(model, tokenizer, records, hparams, progress=False) as session:
        how = EvalConfig.from_session(session, progress=False)
        evaluation = Evaluation(model, tokenizer, records, how, metrics=PLAIN_METRICS)
        for _ in range(2):  # recorded, then replayed
            assert as_json(evaluation.measure()) == as_json(
                Evaluation(model, tokenizer, records, metrics=PLAIN_METRICS).measure()
            )
            session.train_()


def test_choices_of_some_texts_are_put_where_they_belong():
    texts = TokenizedTexts.from_lists([[5] * 4, [5] * 3, [5] * 6, [5] * 2], [1, 2, 2, 1])
    found = choices.ArgmaxPredictions(texts, np.array([0, 2, 3]))
    found.put(np.array([3, 0]), np.array([9, 1, 2, 3]))
    found.put(np.array([2]), np.array([4, 5, 6, 7]))
    assert [found[i] for i in range(4)] == [[1, 2, 3], [], [4, 5, 6, 7], [9]]
    found.replace(0, [7, 8, 9])
    found.replace(3, [1, 2])  # more than were predicted
    assert [found[i] for i in range(4)] == [[7, 8, 9], [], [4, 5, 6, 7], [1, 2]]


def test_kernels_that_know_texts_by_their_first_position(monkeypatch):
    """As FlashAttention does: a text that does not begin at 0 would go on with the one before.

    EasyEdit pads the prompts of one question on the left without telling the model, so that some
    begin later; those texts alone are padded.
    """
    model, tokenizer, records = toy_model(), toy_tokenizer(), records_with_lists(6)
    how = EvalConfig(packed=False)
    expected = Evaluation(model, tokenizer, records, how, metrics=["accuracy"]).measure()

    def by_zeros(position_ids):
        return (position_ids == 0).cumsum(-1)

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", by_zeros)
    with EditSession(model, tokenizer, records, toy_hparams(), progress=False) as session:
        assert session.shortcuts.packed
        assert not session.shortcuts.packed_anywhere
        in_session = EvalConfig.from_session(session, progress=False)
        for how in (EvalConfig(), in_session):
            evaluation = Evaluation(model, tokenizer, records, how, metrics=["accuracy"])
            assert evaluation.packed
            assert evaluation.measure() == expected
