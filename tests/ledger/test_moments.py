"""Adam's second moments go from one commit to the next, and are kept as the matrices are."""

import shutil

import pytest
import torch
from helpers.ledgers import NAME, filled_ledger, matrix, new_ledger, opened
from helpers.toys import toy_requests

from locft_easyedit.ledger.moments import begin_with_, moments_of
from locft_easyedit.ledger.states import STEP, States
from locft_easyedit.ledger.trainer import Trainer
from locft_easyedit.training.step import TrainingStep

REQUESTS = toy_requests(9)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A ledger of six facts in two commits; not to be changed."""
    return filled_ledger(tmp_path_factory.mktemp("ledger") / "six")


@pytest.fixture
def folder(filled, tmp_path):
    """A copy of its folder."""
    return shutil.copytree(filled.path, tmp_path / "ledger")


@pytest.fixture(scope="module")
def expected(filled, tmp_path_factory):
    """The matrix after three more facts, with nothing amiss in between."""
    other = opened(shutil.copytree(filled.path, tmp_path_factory.mktemp("other") / "ledger"))
    other.add(REQUESTS[6:9])
    return matrix(other.model)


def test_an_optimizer_goes_on_with_the_second_moments_of_another():
    generator = torch.Generator().manual_seed(0)
    trained = torch.randn(3, 4, generator=generator).requires_grad_()
    gradients = [torch.randn(3, 4, generator=generator) for _ in range(4)]
    first = torch.optim.Adam([trained], lr=0.1)
    assert moments_of(first, {"w": trained}) is None
    for gradient in gradients[:3]:
        trained.grad = gradient
        first.step()
    moments = moments_of(first, {"w": trained})
    assert float(moments[STEP]) == 3

    start = torch.zeros(3, 4).requires_grad_()
    second = torch.optim.Adam([start], lr=0.1)
    begin_with_(second, {"w": start}, moments)
    kept = moments["w"].clone()
    start.grad = gradients[3]
    second.step()
    square = 0.999 * kept + 0.001 * gradients[3] ** 2
    step = 0.1 * (0.1 * gradients[3] / (1 - 0.9**4)) / ((square / (1 - 0.999**4)).sqrt() + 1e-8)
    torch.testing.assert_close(start.detach(), -step)
    assert torch.equal(moments["w"], kept)  # what an event has left stays


def test_a_later_process_goes_on_with_them(folder, expected, monkeypatch):
    ledger = opened(folder)
    ledger.add(REQUESTS[6:9])
    assert torch.equal(matrix(ledger.model), expected)

    anew = opened(shutil.copytree(folder, folder.with_name("anew")))
    assert anew.verify(replay=True).problems == []


def test_they_matter(folder, expected, monkeypatch):
    monkeypatch.setattr("locft_easyedit.ledger.trainer.begin_with_", lambda *_: None)
    ledger = opened(folder)
    ledger.add(REQUESTS[6:9])
    assert not torch.equal(matrix(ledger.model), expected)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damaged_ones_are_made_anew(folder, expected, damage, caplog):
    path = States(folder).moments_path(2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    {"gone": path.unlink, "cut": lambda: path.write_bytes(content[:-9]),
     "flipped": lambda: path.write_bytes(content)}[damage]()  # fmt: skip
    ledger = opened(folder)
    assert ledger.verify().problems == ["moments-000002.safetensors is damaged or gone."]
    ledger.add(REQUESTS[6:9])
    assert torch.equal(matrix(ledger.model), expected)
    assert "made anew" in caplog.text


def test_to_look_at_an_earlier_state_they_are_not_needed(folder):
    before = opened(folder).matrices()
    States(folder).moments_path(2).unlink()
    assert all(
        torch.equal(before[name], value) for name, value in opened(folder).matrices().items()
    )
    assert not States(folder).moments_path(2).exists()


def test_what_is_interrupted_leaves_them(folder, expected, monkeypatch):
    ledger = opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "wrong", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.add(REQUESTS[6:9])
    ledger.add(REQUESTS[6:9])
    assert torch.equal(matrix(ledger.model), expected)


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_repairs_are_gentle_and_leave_none(tmp_path, monkeypatch):
    """A fact that a check finds lost is trained at a lower rate."""
    rates, after = [], []
    fit = Trainer._fit_

    def noted(self, *args):
        found = fit(self, *args[:5])  # without what ends a round early
        after.append(self.moments)
        return found

    monkeypatch.setattr(Trainer, "_fit_", noted)

    def watched(runner, weights, hparams, *args, **options):
        rates.append(hparams.lr)
        return TrainingStep(runner, weights, hparams, *args, **options)

    monkeypatch.setattr("locft_easyedit.ledger.trainer.TrainingStep", watched)
    lost = iter([1, 1, 1, 1, 1, 0])
    monkeypatch.setattr(Trainer, "wrong", lambda self, runner, texts: texts[: next(lost)])
    ledger = new_ledger(tmp_path)
    ledger.add(REQUESTS[:3])
    lr = ledger.hparams.lr
    assert rates == pytest.approx([lr] + [lr / 4] * 5)
    assert all(moments is after[0] for moments in after)


def test_the_round_with_the_fewest_lost_facts_counts(tmp_path, monkeypatch):
    lost, seen = iter([2, 1, 3, *[3] * 20]), []

    def pretended(self, runner, texts):
        seen.append(self.place.parameters[NAME].detach().clone())
        return texts[: next(lost)]

    fit = Trainer._fit_
    monkeypatch.setattr(Trainer, "wrong", pretended)
    monkeypatch.setattr(Trainer, "_fit_", lambda *args: fit(*args[:6]))
    ledger = new_ledger(tmp_path, repairs=4)
    added = ledger.add(REQUESTS[:3])
    assert len(seen) == 1 + 4
    assert added.lost == [1]
    assert torch.equal(matrix(ledger.model), seen[1])
    assert not torch.equal(seen[1], seen[-1])


def test_a_repair_ends_once_all_is_right(tmp_path, monkeypatch):
    ledger = new_ledger(tmp_path, num_steps=9, batch_loss_threshold=0, epoch_loss_threshold=0)
    lost = iter([2, 2, 1, 0, 0])  # at first; after the repair's first three epochs; at the end

    def pretended(self, runner, texts):
        return texts[: next(lost)]

    monkeypatch.setattr(Trainer, "wrong", pretended)
    trained = ledger.add(REQUESTS[:3]).event.said["trained"]
    assert (trained["repairs"], trained["epochs"]) == (1, 9 + 3)
    assert next(lost, None) is None


def test_a_low_rank_change_begins_anew(tmp_path):
    ledger = new_ledger(tmp_path, tuning="lora", lora_rank=4, num_steps=2)
    event = ledger.add(REQUESTS[:3]).event
    assert event.said["moments"] is None
    assert not list(tmp_path.rglob("moments-*"))


def test_an_empty_ledger_begins_anew(folder):
    ledger = opened(folder)
    event = ledger.retract(range(1, 7)).event
    assert event.said["moments"] is None
    ledger.add(REQUESTS[:3])
    first = new_ledger(folder.with_name("first"))
    first.add(REQUESTS[:3])
    assert torch.equal(matrix(ledger.model), matrix(first.model))
