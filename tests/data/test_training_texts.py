"""Rewordings in training: which texts an epoch has, and the training against plain code."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.reference import naive_edit_loss
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.data.training_texts import TrainingTexts
from locft_easyedit.data.variants import Variants
from locft_easyedit.training.session import EditSession

# Measured: 3e-6; rounding of packed rows.
LOSS_TOLERANCE = 1e-5
WORDS = ("Again:", "Then:", "Once more:")


def reworded(**changes):
    values = {"forms_per_epoch": 2, "num_steps": 3, "batch_size": 4, "lr": 1e-3, "row_tokens": 40}
    return toy_hparams(**(values | changes))


def requests_with_rewordings(n):
    """Requests of which request i brings i % 4 rewordings."""
    requests = toy_requests(n)
    for i, request in enumerate(requests):
        request["rewordings"] = [f"{word} {request['prompt']}" for word in WORDS[: i % 4]]
    return requests


def test_without_rewordings_text_i_is_edit_i():
    batch = np.array([3, 0, 2])
    assert Variants.own_alone(4).texts(batch, epoch=7).tolist() == [3, 0, 2]


def test_rewordings_take_turns_and_own_wordings_come_first():
    variants = Variants.in_turns(np.array([3, 0, 5]), 2, seed=0)
    assert variants.first.tolist() == [0, 4, 5, 11]
    seen = {0: [], 1: [], 2: []}
    for epoch in range(15):
        texts = variants.texts(np.array([2, 0, 1]), epoch)
        assert texts[:3].tolist() == [5, 0, 4]
        for text in texts[3:]:
            seen[int(np.searchsorted(variants.first, text, side="right")) - 1].append(int(text))
        assert len(set(texts.tolist())) == len(texts) == 7
    assert {text: seen[0].count(text) for text in (1, 2, 3)} == {1: 10, 2: 10, 3: 10}
    assert {seen[2].count(text) for text in range(6, 11)} == {6}
    assert seen[1] == []


@pytest.mark.parametrize("each", [0.25, 0.5, 1.5])
def test_a_part_of_a_rewording_is_one_in_some_epochs(each):
    n = 400
    variants = Variants.in_turns(np.full(n, 3), each, seed=0)
    trained = np.zeros((12, variants.first[-1]), np.int64)
    for epoch, row in enumerate(trained):
        np.add.at(row, variants.texts(np.arange(n), epoch), 1)
    trained = trained.reshape(12, n, 4)
    assert (trained[:, :, 0] == 1).all()
    others = trained[:, :, 1:].sum(2)
    # An edit's come evenly, and edits begin at different times: every epoch has about as many.
    assert {math.floor(each), math.ceil(each)} == set(others.flatten().tolist())
    assert set(others.sum(0).tolist()) == {round(12 * each)}
    assert abs(others.mean(1) - each).max() < 0.1
    assert np.ptp(trained[:, :, 1:].sum(0), axis=1).max() <= 1
    assert variants.most == 1 + math.ceil(each)


def test_an_edit_with_fewer_rewordings_than_asked_for_gives_each_once():
    texts = Variants.in_turns(np.array([1]), 3, seed=1).texts(np.array([0]), epoch=4)
    assert texts.tolist() == [0, 1]


def test_texts_are_each_edits_own_and_then_its_rewordings():
    edits = distinct_edits(requests_with_rewordings(5)).edits
    tokenizer = toy_tokenizer()
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 5, reworded(), 256)
    assert len(made.texts) == made.variants.first[-1] == 5 + 6
    for i, edit in enumerate(edits):
        first = made.variants.first[i]
        assert made.wordings[i] == [edit.prompt, *edit.rewordings]
        for k, prompt in enumerate(made.wordings[i]):
            ids = tokenizer(f"{prompt} {edit.target.strip()}")["input_ids"]
            start = made.texts.offsets[first + k]
            assert made.texts.ids[start : start + len(ids)].tolist() == ids
    assert made.summary["trained"] == made.summary["rewordings"] == 6
    assert made.summary["edits_without_rewordings"] == 2


def test_rewordings_that_are_too_long_are_left_out_and_counted():
    edits, tokenizer = distinct_edits(requests_with_rewordings(5)).edits, toy_tokenizer()
    everything = TrainingTexts.tokenize(tokenizer, edits, [None] * 5, reworded(), 256)
    own = TrainingTexts.tokenize(tokenizer, edits_alone(edits), [None] * 5, reworded(), 256)
    shortest = int(own.texts.lengths.max())
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 5, reworded(), shortest)
    dropped = int((everything.texts.lengths > shortest).sum())
    assert made.summary["dropped_too_long"] == dropped > 0
    assert made.summary["trained"] == 6 - dropped
    assert len(made.texts) == len(everything.texts) - dropped
    assert made.texts.lengths.max() <= shortest


def edits_alone(edits):
    return [replace(edit, rewordings=()) for edit in edits]


def naive_reworded(model, tokenizer, edits, made, parameters, hparams):
    """Trains with rewordings, text by text; returns the losses of the steps."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    adam = torch.optim.Adam(parameters, lr=hparams.lr, foreach=False, fused=False)
    generator = torch.Generator().manual_seed(hparams.seed)
    losses = []
    for epoch in range(hparams.num_steps):
        order = torch.randperm(len(edits), generator=generator).tolist()
        for start in range(0, len(order), hparams.batch_size):
            texts = []
            for i in order[start : start + hparams.batch_size]:
                pool, turn = made.wordings[i][1:], int(made.variants.turn[i])
                begun, each = turn / 2**31, hparams.forms_per_epoch
                before, after = int(begun + epoch * each), int(begun + (epoch + 1) * each)
                shown = range(before, before + min(len(pool), after - before))
                prompts = [edits[i].prompt, *(pool[(turn + k) % len(pool)] for k in shown)]
                texts += [{"prompt": p, "target_new": edits[i].target} for p in prompts]
            adam.zero_grad()
            loss = torch.stack([naive_edit_loss(model, tokenizer, text) for text in texts]).mean()
            loss.backward()
            adam.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("micro", "each"), [(None, 2), (1, 2), (None, 0.5), (1, 1.5)])
def test_training_with_rewordings_is_that_of_plain_code(micro, each):
    hparams = reworded(micro_batch_size=micro, forms_per_epoch=each)
    requests = requests_with_rewordings(9)
    tokenizer, edits = toy_tokenizer(), distinct_edits(requests).edits
    model, plain = toy_model("llama"), toy_model("llama").eval()
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 9, hparams, 256)
    name = DOWN_PROJECTION["llama"].format(hparams.layers[0])
    expected = naive_reworded(plain, tokenizer, edits, made, [plain.get_parameter(name)], hparams)
    result = edit_model(model, tokenizer, requests, hparams, progress=False)
    assert result.step_losses == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert result.n_trained == 9
    assert result.summary()["augmented"]["rewordings"] == 12


def test_a_session_trains_some_of_its_edits_with_their_own_rewordings():
    model, hparams, requests = toy_model("llama"), reworded(), requests_with_rewordings(7)
    with EditSession(model, toy_tokenizer(), requests, hparams, progress=False) as session:
        result = session.train_([6])
        result.restore_(model)
        again = session.train_([6])
    assert result.n_trained == 1
    alone = edit_model(toy_model("llama"), toy_tokenizer(), [toy_requests(7)[6]], hparams)
    assert result.step_losses != alone.step_losses
    assert result.step_losses == again.step_losses
