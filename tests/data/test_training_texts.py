"""Rewordings in training: which texts an epoch has, and the training against plain code."""

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


def augmented(**changes):
    values = {"augment": 2, "num_steps": 3, "batch_size": 4, "lr": 1e-3, "row_tokens": 40}
    return toy_hparams(**(values | changes))


def test_without_rewordings_text_i_is_edit_i():
    batch = np.array([3, 0, 2])
    assert Variants.own_alone(4).texts(batch, epoch=7).tolist() == [3, 0, 2]


def test_rewordings_take_turns_and_own_wordings_come_first():
    variants = Variants.in_turns(np.array([[3, 0, 5]]), [2], seed=0)
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


def test_an_edit_with_fewer_rewordings_than_asked_for_gives_each_once():
    texts = Variants.in_turns(np.array([[1]]), [3], seed=1).texts(np.array([0]), epoch=4)
    assert texts.tolist() == [0, 1]


def test_texts_are_each_edits_own_and_then_its_rewordings():
    edits = distinct_edits(toy_requests(5)).edits
    tokenizer, hparams = toy_tokenizer(), augmented()
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 5, hparams, 256)
    assert len(made.texts) == made.variants.first[-1]
    for i, edit in enumerate(edits):
        first = made.variants.first[i]
        for k, prompt in enumerate(made.prompts[i]):
            ids = tokenizer(f"{prompt} {edit.target.strip()}")["input_ids"]
            start = made.texts.offsets[first + k]
            assert made.texts.ids[start : start + len(ids)].tolist() == ids
        assert made.prompts[i][0] == edit.prompt
        assert made.prompts[i][1:]
    assert made.summary["trained"] == sum(len(own) - 1 for own in made.prompts)
    assert made.summary["edits_without_rewordings"] == 0


def test_rewordings_that_are_too_long_are_left_out_and_counted():
    edits, tokenizer = distinct_edits(toy_requests(5)).edits, toy_tokenizer()
    everything = TrainingTexts.tokenize(tokenizer, edits, [None] * 5, augmented(), 256)
    own = TrainingTexts.tokenize(tokenizer, edits, [None] * 5, augmented(augment=0), 256)
    shortest = int(own.texts.lengths.max())
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 5, augmented(), shortest)
    dropped = int((everything.texts.lengths > shortest).sum())
    assert made.summary["dropped_too_long"] == dropped > 0
    assert len(made.texts) == len(everything.texts) - dropped
    assert made.texts.lengths.max() <= shortest


def naive_augmented(model, tokenizer, edits, made, parameters, hparams):
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
                pool = made.prompts[i][1:]
                turn = int(made.variants.turn[1, i]) + epoch * hparams.augment
                shown = min(len(pool), hparams.augment)
                prompts = [edits[i].prompt, *(pool[(turn + k) % len(pool)] for k in range(shown))]
                texts += [{"prompt": p, "target_new": edits[i].target} for p in prompts]
            adam.zero_grad()
            loss = torch.stack([naive_edit_loss(model, tokenizer, text) for text in texts]).mean()
            loss.backward()
            adam.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("micro", [None, 1])
def test_training_with_rewordings_is_that_of_plain_code(micro):
    hparams, requests = augmented(micro_batch_size=micro), toy_requests(9)
    tokenizer, edits = toy_tokenizer(), distinct_edits(requests).edits
    model, plain = toy_model("llama"), toy_model("llama").eval()
    made = TrainingTexts.tokenize(tokenizer, edits, [None] * 9, hparams, 256)
    name = DOWN_PROJECTION["llama"].format(hparams.layers[0])
    expected = naive_augmented(plain, tokenizer, edits, made, [plain.get_parameter(name)], hparams)
    result = edit_model(model, tokenizer, requests, hparams, progress=False)
    assert result.step_losses == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert result.n_trained == 9
    assert result.summary()["augmented"]["rewordings"] > 9


def test_a_session_trains_some_of_its_edits_with_their_own_rewordings():
    model, hparams = toy_model("llama"), augmented()
    with EditSession(model, toy_tokenizer(), toy_requests(6), hparams, progress=False) as session:
        result = session.train_([4])
        result.restore_(model)
        again = session.train_([4])
    assert result.n_trained == 1
    assert result.step_losses == again.step_losses
