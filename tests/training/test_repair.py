"""What does not hold after the epochs is trained again: `repairs`."""

import logging
import os
import signal

import numpy as np
import pytest
import torch
from helpers.ledgers import wide_model
from helpers.toys import REPOSITORY, toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.data.training_texts import TrainingTexts, subjects_of
from locft_easyedit.errors import EditInterrupted, HyperParamsError, NonFiniteLossError
from locft_easyedit.training import edit_training
from locft_easyedit.training.checkpoint_file import read_checkpoint
from locft_easyedit.training.checkpoints import FILE_NAME
from locft_easyedit.training.repair import repair_
from locft_easyedit.training.step import TrainingStep

N = 12
KEPT_PROMPTS = str(REPOSITORY / "tests" / "helpers" / "kept_prompts.json")
SETTINGS = {"batch_size": 4, "num_steps": 12, "lr": 1e-2, "health_check": False}
FORMS = ["question_answer", "context"]


def edited(requests=None, **changes):
    model = wide_model()
    requests = toy_requests(N) if requests is None else requests
    hparams = toy_hparams(**SETTINGS | changes)
    return model, edit_model(model, toy_tokenizer(), requests, hparams, progress=False)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(one, other):
    assert all(map(torch.equal, weights(one), weights(other)))


def lost_texts(model, requests=None, **changes):
    """Returns how many texts, in all forms, are not what a plain forward pass chooses."""
    hparams = toy_hparams(**SETTINGS | changes)
    requests = toy_requests(N) if requests is None else requests
    edits = distinct_edits(requests)
    found = TrainingTexts.tokenize(
        toy_tokenizer(), edits.edits, subjects_of(requests, edits, hparams), hparams, None
    ).texts
    lost = 0
    for i in range(len(found)):
        ids = torch.from_numpy(found.ids[found.offsets[i] : found.offsets[i + 1]].astype(np.int64))
        with torch.no_grad():
            choices = model(input_ids=ids[None, :-1]).logits[0].argmax(-1)
        start = int(found.target_start[i])
        lost += not torch.equal(choices[start - 1 :], ids[start:])
    return lost


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"forms": FORMS},
        {"preserve": [KEPT_PROMPTS]},
        {"tuning": "lora", "lr": 5e-2},
        {"frozen_prefix": False, "packing": False},
        {"lr_schedule": "cosine", "loss_average": "token"},
    ],
    ids=str,
)
def test_what_does_not_hold_is_trained_again(changes):
    model, without = edited(**changes)
    before = lost_texts(model, **changes)
    assert before
    assert without.repairs is None
    model, result = edited(repairs=10, **changes)
    assert result.losses == without.losses
    assert result.repairs["wrong_texts"] == before
    assert result.repairs["checked_texts"] == N * (5 if "forms" in changes else 1)
    assert result.repairs["rounds"] >= 1
    assert result.repairs["lost_edits"] == 0
    assert lost_texts(model, **changes) == 0
    assert result.summary()["repairs"] == result.repairs


def test_where_all_hold_nothing_is_trained():
    plain, _ = edited(num_steps=40)
    assert lost_texts(plain) == 0
    model, result = edited(num_steps=40, repairs=10)
    assert result.repairs == {
        "checked_texts": N, "wrong_texts": 0, "rounds": 0, "epochs": 0, "lost_edits": 0
    }  # fmt: skip
    assert_same(model, plain)


def test_edits_that_contradict_each_other_are_not_repaired():
    requests = toy_requests(N)
    other = {**requests[0], "target_new": requests[1]["target_new"] + " " + "x"}
    _, result = edited([*requests, other], repairs=2, num_steps=40)
    assert result.n_trained == N + 1
    assert result.repairs["checked_texts"] == N - 1
    assert result.repairs["lost_edits"] == 0


def test_edits_that_are_lost_all_the_same_are_told(monkeypatch, caplog):
    wrong = np.array([1, 4])
    monkeypatch.setattr(edit_training, "wrong_texts", lambda *args, **options: wrong)
    _, result = edited(repairs=2)
    assert result.repairs["rounds"] == 2
    assert result.repairs["lost_edits"] == 2
    assert "2 of 12 edits do not hold after 2 rounds of repair: request 1: " in caplog.text


def test_rates_and_thresholds_of_the_rounds(monkeypatch):
    taken = []
    take_ = TrainingStep.take_

    def watched(self, batch, rate=1.0):
        taken.append([self.lr * rate, self.threshold, len(batch.own)])
        return take_(self, batch, rate)

    wrong = np.array([1, 4])
    monkeypatch.setattr(TrainingStep, "take_", watched)
    monkeypatch.setattr(edit_training, "wrong_texts", lambda *args, **options: wrong)
    edited(repairs=2, num_steps=3, lr=4e-3, lr_schedule="cosine")
    of_epochs, of_repairs = taken[:9], taken[9:]
    assert {threshold for _, threshold, _ in of_epochs} == {1e-2}
    # Each text of a round beside one that holds, at a constant rate.
    expected = [[1e-3, threshold, 4] for threshold in [1e-3] * 3 + [1e-4] * 3]
    assert np.allclose(of_repairs, expected)


def test_the_best_round_counts():
    value = torch.zeros(1)
    wrong = iter([np.array([3]), np.array([3, 5]), np.array([1, 3, 5])])

    def train_again_(texts, number):
        value.fill_(number)
        return 2

    found = repair_({"w": value}, np.array([1, 3]), lambda: next(wrong), train_again_, 3)
    assert (found.rounds, found.epochs, found.wrong.tolist()) == (3, 6, [3])
    assert value.item() == 1


def test_no_rounds():
    found = repair_({"w": torch.zeros(1)}, np.array([1]), list, lambda *_: 1 / 0, 0)
    assert (found.rounds, found.wrong.tolist()) == (0, [1])


@pytest.fixture
def ctrl_c():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("forms", [None, FORMS])
def test_an_interrupted_repair_goes_on_with_the_same_bits(forms, tmp_path, monkeypatch, caplog):
    changes = {"repairs": 10, "forms": forms}
    plain, expected = edited(**changes)
    changes["checkpoint_dir"] = str(tmp_path)
    in_epochs = 12 * 3
    steps = []
    take_ = TrainingStep.take_

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == in_epochs + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return take_(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "take_", interrupted)
        with pytest.raises(EditInterrupted, match="Interrupted in the repairs that follow"):
            edited(**changes)
    assert len(steps) == in_epochs + 2
    progress = read_checkpoint(tmp_path / FILE_NAME).progress
    assert not progress.finished
    assert progress.epoch == 12
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            TrainingStep, "take_", lambda *args: steps.append(args[0].threshold) or take_(*args)
        )
        caplog.set_level(logging.INFO)
        model, result = edited(**changes)
    assert "training goes on in the repairs" in caplog.text
    assert steps
    assert max(steps) < 1e-2  # the epochs were not made again
    assert_same(model, plain)
    assert result.repairs == expected.repairs
    assert result.losses == expected.losses
    # A finished one is taken as it is, with what its repairs came to.
    model, again = edited(**changes)
    assert_same(model, plain)
    assert again.repairs == expected.repairs


def test_another_number_of_rounds_is_another_training(tmp_path):
    model, _ = edited(checkpoint_dir=str(tmp_path))
    repaired, result = edited(checkpoint_dir=str(tmp_path), repairs=10)
    assert result.repairs["rounds"] >= 1
    assert lost_texts(repaired) == 0 < lost_texts(model)


def test_a_repair_that_diverges_names_the_edits(monkeypatch):
    of_round = edit_training.of_round
    monkeypatch.setattr(edit_training, "of_round", lambda *args: setattr_(of_round(*args), lr=1e39))
    before = weights(wide_model())
    model = wide_model()
    hparams = toy_hparams(**SETTINGS, repairs=3)
    with pytest.raises(NonFiniteLossError, match=r"\(request \d+: .*weights are as they were"):
        edit_model(model, toy_tokenizer(), toy_requests(N), hparams, progress=False)
    assert all(map(torch.equal, weights(model), before))


def setattr_(hparams, **changes):
    for name, value in changes.items():
        setattr(hparams, name, value)
    return hparams


def test_of_the_presets():
    assert toy_hparams().rounds_of_repair == 0
    assert toy_hparams().most_repairs == 10
    plus = toy_hparams(alg_name="LocFT-BF+")
    assert plus.rounds_of_repair == 10
    assert toy_hparams(alg_name="LocFT-BF+", repairs=0).rounds_of_repair == 0
    assert toy_hparams(alg_name="LocFT-BF+", pipeline="depth_first").rounds_of_repair == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"repairs": -1}, "`repairs=-1` must be 0 or more, or null."),
        ({"repairs": 2**31}, "must be 0 or more, or null"),
        ({"repairs": 1, "pipeline": "depth_first"}, "does not go with `pipeline=depth_first`"),
    ],
)
def test_bad_values(changes, said):
    with pytest.raises(HyperParamsError, match=said.replace("(", r"\(")):
        toy_hparams(**changes)


def test_models_of_all_kinds(caplog):
    """A toy that learns nothing is left as its best round had it, and told."""
    model = toy_model("gpt2")
    hparams = toy_hparams(
        rewrite_module_tmp="transformer.h.{}.mlp.c_proj.weight", repairs=1, lr=1e-5
    )
    result = edit_model(model, toy_tokenizer(), toy_requests(3), hparams, progress=False)
    assert result.repairs["lost_edits"] == 3
    assert "3 of 3 edits do not hold" in caplog.text
