"""What a program has turned on around us: no pass, step or product may be made in it."""

import pytest
import torch
from helpers.toys import toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.modeling.modes import own_precision
from locft_easyedit.training.session import EditSession

ids = torch.arange(1, 9)[None]


@pytest.fixture
def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


def edited(**changes):
    model = toy_model()
    result = edit_model(model, toy_tokenizer(), toy_requests(6), toy_hparams(**changes))
    return result.losses, next(iter(result.new.values()))


@pytest.mark.parametrize(
    "changes",
    [{}, {"tuning": "lora", "lora_rank": 2}, {"preserve": ["neighbours"]}, {"packing": False}],
    ids=str,
)
def test_an_edit_inside_autocast_is_the_edit_outside(changes):
    losses, new = edited(**changes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert edited(**changes)[0] == losses
        assert torch.equal(edited(**changes)[1], new)


def test_metrics_inside_autocast_are_those_outside():
    outside = str(Evaluation(toy_model(), toy_tokenizer(), toy_requests(6)).measure())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = str(Evaluation(toy_model(), toy_tokenizer(), toy_requests(6)).measure())
    assert inside == outside


def test_the_program_goes_on_in_its_own_precision_and_with_the_edited_weights(autocast):
    """Autocast keeps copies of the weights it has read; those of before the edit are stale."""
    model = toy_model().requires_grad_()
    before = model(ids).logits
    edit_model(model, toy_tokenizer(), toy_requests(6), toy_hparams())
    after = model(ids).logits
    assert after.dtype == before.dtype == torch.bfloat16
    assert not torch.equal(after, before)


def test_a_session_that_is_left_open_leaves_autocast_alone(autocast):
    session = EditSession(
        toy_model(), toy_tokenizer(), toy_requests(4), toy_hparams(), progress=False
    )
    with session:
        assert torch.is_autocast_enabled("cpu")
        session.train_()
        assert torch.is_autocast_enabled("cpu")


def test_own_precision_outside_autocast_changes_nothing():
    with own_precision():
        assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
