"""What does not hold after the epochs is trained again: `repairs`."""

import dataclasses
import logging
import os
import re
import shutil
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
from locft_easyedit.training import edit_repair
from locft_easyedit.training.checkpoint_file import read_checkpoint
from locft_easyedit.training.checkpoints import FILE_NAME, Checkpoints
from locft_easyedit.training.repair import Repaired, repair_
from locft_easyedit.training.session import EditSession
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
    monkeypatch.setattr(edit_repair, "wrong_texts", lambda *args, **options: wrong)
    _, result = edited(repairs=2)
    assert result.repairs["rounds"] == 2
    assert result.repairs["lost_edits"] == 2
    said = "2 of 12 edits do not hold, plainly or in another form, after 2 rounds of repair: "
    assert said + "request 1: " in caplog.text


def test_rates_and_thresholds_of_the_rounds(monkeypatch):
    taken = []
    take_ = TrainingStep.take_

    def watched(self, batch, rate=1.0):
        taken.append([self.lr * rate, self.threshold, len(batch.own)])
        return take_(self, batch, rate)

    wrong = np.array([1, 4])
    monkeypatch.setattr(TrainingStep, "take_", watched)
    monkeypatch.setattr(edit_repair, "wrong_texts", lambda *args, **options: wrong)
    edited(repairs=2, num_steps=3, lr=4e-3, lr_schedule="cosine")
    of_epochs, of_repairs = taken[:9], taken[9:]
    assert {threshold for _, threshold, _ in of_epochs} == {1e-2}
    # Each text of a round beside one that holds, at a constant rate.
    expected = [[1e-3, threshold, 4] for threshold in [1e-3] * 3 + [1e-4] * 3]
    assert np.allclose(of_repairs, expected)


def begun(wrong, rounds=0, epochs=0):
    return Repaired(rounds, epochs, np.array(wrong))


def test_the_best_round_counts():
    value = torch.zeros(1)
    wrong = iter([np.array([3]), np.array([3, 5]), np.array([1, 3, 5])])

    def train_again_(texts, number):
        value.fill_(number)
        return 2

    found = repair_({"w": value}, begun([1, 3]), lambda: next(wrong), train_again_, 3)
    assert (found.rounds, found.epochs, found.wrong.tolist()) == (3, 6, [3])
    assert value.item() == 1


def test_rounds_that_help_nobody_end():
    wrong, told = iter([np.array([3]), *[np.array([3, 5])] * 9]), []
    found = repair_(
        {"w": torch.zeros(1)}, begun([1, 3], 2, 7), lambda: next(wrong), lambda *_: 1, 10,
        patience=3, better=told.append,
    )  # fmt: skip
    assert (found.rounds, found.epochs, found.wrong.tolist()) == (6, 11, [3])
    assert [(one.rounds, one.epochs, one.wrong.tolist()) for one in told] == [(3, 8, [3])]


def test_a_round_that_diverges_is_the_last():
    value = torch.zeros(1)

    def train_again_(texts, number):
        value.fill_(number)
        if number == 2:
            raise NonFiniteLossError("nan")
        return 1

    found = repair_({"w": value}, begun([1, 3]), lambda: np.array([1]), train_again_, 9)
    assert (found.rounds, found.wrong.tolist(), value.item()) == (2, [1], 1)


def test_no_rounds():
    found = repair_({"w": torch.zeros(1)}, begun([1]), list, lambda *_: 1 / 0, 0)
    assert (found.rounds, found.wrong.tolist()) == (0, [1])


def test_the_best_round_of_a_session_is_what_it_returns(monkeypatch):
    """The second of three rounds leaves the fewest wrong: its bits are those of two rounds."""
    wrong_texts = edit_repair.wrong_texts

    def pretended(n_rounds):
        # Of the checks of all texts: before the rounds, and after each.
        counts = iter([3, 2, 1, 2][: n_rounds + 1])

        def found(runner, share, texts, *args, **options):
            wrong_texts(runner, share, texts, *args, **options)
            return texts[: next(counts)] if len(texts) == N else texts

        monkeypatch.setattr(edit_repair, "wrong_texts", found)
        return edited(repairs=n_rounds, num_steps=3)

    two, first = pretended(2)
    three, second = pretended(3)
    assert_same(three, two)
    assert first.repairs | {"rounds": 3, "epochs": 9} == second.repairs
    assert second.repairs["lost_edits"] == 1
    [value] = second.new.values()
    assert torch.equal(value, three.model.layers[2].mlp.down_proj.weight)


@pytest.mark.parametrize("changes", [{}, {"preserve": [KEPT_PROMPTS]}, {"forms": FORMS}], ids=str)
def test_in_half_precision_the_edited_model_holds_them(changes):
    changes |= {"num_steps": 15, "dtype": "bfloat16"}
    hparams = toy_hparams(**SETTINGS | changes, repairs=10)
    model = wide_model().to(torch.bfloat16)
    result = edit_model(model, toy_tokenizer(), toy_requests(N), hparams, progress=False)
    assert result.repairs["wrong_texts"] > 0
    assert result.repairs["lost_edits"] == 0
    assert lost_texts(model, **changes) == 0


def test_edits_one_at_a_time():
    model, hparams = wide_model(), toy_hparams(**SETTINGS | {"num_steps": 3}, repairs=20)
    with EditSession(
        model, toy_tokenizer(), toy_requests(3), hparams, progress=False, alone=True
    ) as session:
        for i in (0, 1, 0):
            result = session.train_([i])
            assert result.repairs["checked_texts"] == 1
            assert result.repairs["wrong_texts"] == 1
            assert result.repairs["lost_edits"] == 0
            assert lost_texts(model, toy_requests(3)[i : i + 1]) == 0
            result.restore_(model)


def test_where_all_contradict_each_other_nothing_is_checked():
    one = toy_requests(1)[0]
    _, result = edited([one, {**one, "target_new": "x"}], repairs=2)
    assert result.repairs["checked_texts"] == 0
    assert result.repairs["rounds"] == 0


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
    assert progress.repairs["rounds"] == 0
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


def test_repairs_go_on_from_each_round(tmp_path, monkeypatch):
    plain, expected = edited(repairs=10, num_steps=6)
    copies, write = [], Checkpoints._write

    def written(self, progress, tensors):
        done = write(self, progress, tensors)
        if progress.repairs is not None:
            copies.append(tmp_path / str(len(copies)))
            shutil.copytree(self.path.parent, copies[-1])
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write", written)
        edited(repairs=10, num_steps=6, checkpoint_dir=str(tmp_path / "run"))
    assert len(copies) > 3
    for copy in copies:
        model, result = edited(repairs=10, num_steps=6, checkpoint_dir=str(copy))
        assert_same(model, plain)
        assert result.repairs == expected.repairs


def test_another_number_of_rounds_is_another_training(tmp_path):
    model, _ = edited(checkpoint_dir=str(tmp_path))
    repaired, result = edited(checkpoint_dir=str(tmp_path), repairs=10)
    assert result.repairs["rounds"] >= 1
    assert lost_texts(repaired) == 0 < lost_texts(model)


def test_a_repair_that_diverges_leaves_what_was_before_it(monkeypatch, caplog):
    plain, _ = edited()
    of_round = edit_repair.of_round

    monkeypatch.setattr(
        edit_repair, "of_round", lambda *args: dataclasses.replace(of_round(*args), lr=1e39)
    )
    model, result = edited(repairs=3)
    assert "Round 1 of repair diverged; the best state before it counts." in caplog.text
    assert_same(model, plain)
    assert result.repairs["lost_edits"] == result.repairs["wrong_texts"] > 0


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
        ({"repairs": 2**31}, "`repairs=2147483648` must be below 2**31."),
        ({"repairs": 1, "pipeline": "depth_first"}, "does not go with `pipeline=depth_first`"),
    ],
)
def test_bad_values(changes, said):
    with pytest.raises(HyperParamsError, match=re.escape(said)):
        toy_hparams(**changes)


def test_models_of_all_kinds(caplog):
    """A toy that learns nothing is left as its best round had it, and told."""
    model = toy_model("gpt2")
    hparams = toy_hparams(
        rewrite_module_tmp="transformer.h.{}.mlp.c_proj.weight", repairs=1, lr=1e-5
    )
    result = edit_model(model, toy_tokenizer(), toy_requests(3), hparams, progress=False)
    assert result.repairs["lost_edits"] == 3
    assert "3 of 3 edits do not hold, plainly" in caplog.text
