"""The loop's own decisions: thresholds without waiting, micro-batches of even work."""

import weakref
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from helpers.toys import toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.distributed.world import World
from locft_easyedit.errors import NonFiniteLossError
from locft_easyedit.prefix.runner import Prepared, TextRunner
from locft_easyedit.training import edit_training as editing
from locft_easyedit.training.step import MicroBatch, TrainingStep
from locft_easyedit.training.trained_weights import TrainedWeights


def run(**changes):
    return edit_model(
        toy_model("llama"), toy_tokenizer(), toy_requests(14), toy_hparams(**changes),
        progress=False,
    )  # fmt: skip


class OnDevice(TrainingStep):
    """Steps of which the host does not wait for the losses."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.host_may_sync = False


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3}], ids=str)
def test_a_threshold_on_the_device_gives_what_one_on_the_host_gives(changes, monkeypatch):
    """As on a GPU, where the host must not wait for each loss."""
    settings = {"batch_loss_threshold": 5.9, "num_steps": 6, "lr": 5e-3, **changes}
    on_host = run(**settings)
    assert 0 < on_host.n_updates < len(on_host.step_losses)

    monkeypatch.setattr(editing, "TrainingStep", OnDevice)
    on_device = run(**settings)
    assert on_device.step_losses == on_host.step_losses
    assert on_device.n_updates == on_host.n_updates
    assert all(torch.equal(on_device.new[name], value) for name, value in on_host.new.items())


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_micro_batches_are_whole_and_even(size):
    random = np.random.default_rng(size)
    batch = random.permutation(23)
    lengths = random.integers(2, 60, size=23)
    parts = MicroBatch(size).split(batch, lengths)
    assert sorted(np.concatenate(parts).tolist()) == list(range(23))
    assert max(map(len, parts)) <= size
    assert len(parts) == -(-23 // size)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    tokens = [int(lengths[np.isin(batch, part)].sum()) for part in parts]
    # Dealt longest first, to and fro: parts differ by less than one of the longest.
    if len(parts[0]) > 1:
        assert max(tokens) - min(tokens) <= lengths.max() + 1


def test_one_micro_batch_is_the_batch_itself():
    batch = np.array([5, 2, 9])
    [part] = MicroBatch(3).split(batch, np.array([4, 40, 10]))
    assert part.tolist() == [5, 2, 9]


def test_a_wait_for_the_losses_of_an_epoch_is_watched(monkeypatch):
    watched = []

    @contextmanager
    def warning_of_waits(self, what):
        watched.append(what)
        yield

    monkeypatch.setattr(World, "warning_of_waits", warning_of_waits)
    run(num_steps=2)
    assert watched == ["an epoch's losses"] * 2


# What is not finite


@pytest.mark.parametrize("kind", [TrainingStep, OnDevice])
def test_a_gradient_that_overflows_where_the_loss_does_not(kind, monkeypatch):
    monkeypatch.setattr(editing, "TrainingStep", kind)
    monkeypatch.setattr(TrainedWeights, "loss_scale", 2.0**30)
    model = toy_model("llama").to(torch.float16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    told = r"The gradient of a loss of \d.* became infinite or NaN in epoch 1, mini-batch 1 \(req"
    with pytest.raises(NonFiniteLossError, match=told):
        edit_model(model, toy_tokenizer(), toy_requests(14), toy_hparams(), progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# Memory


@pytest.fixture(params=[False, True], ids=["by itself", "in a thread"])
def in_thread(request, monkeypatch):
    """Whether mini-batches are prepared while another one trains."""
    monkeypatch.setattr(TextRunner, "prefetch_in_thread", request.param)
    return request.param


def watching(monkeypatch, prepare):
    """Has `prepare(runner's own, texts)` prepare the texts of training steps, and only those."""

    class Watched(TrainingStep):
        def __init__(self, runner, *args, **options):
            super().__init__(runner, *args, **options)
            runner.prepare = partial(prepare, runner.prepare)

    monkeypatch.setattr(editing, "TrainingStep", Watched)


def failing(monkeypatch, error, when):
    """Has preparing texts fail when they say so; returns how many there were each time."""
    failures = []

    def prepare(own, texts):
        if when(texts):
            failures.append(len(texts))
            raise error
        return own(texts)

    watching(monkeypatch, prepare)
    return failures


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_ahead_of_a_step_halves_as_in_the_step(
    error, in_thread, monkeypatch, caplog
):
    whole = run()
    failures = failing(monkeypatch, error, lambda texts: len(texts) > 1)
    halved = run()
    assert halved.step_losses == pytest.approx(whole.step_losses, abs=1e-5)
    told = [r.getMessage() for r in caplog.records if "do not fit into memory" in r.getMessage()]
    assert [one[:7] for one in told] == ["4 texts", "2 texts"]
    assert "`micro_batch_size: 1` starts there" in told[-1]
    assert set(failures) == {4, 2}


def test_a_single_text_that_has_no_room_beside_another_step_comes_after_it(in_thread, monkeypatch):
    settings = {"micro_batch_size": 1, "num_steps": 2}
    whole = run(**settings)
    not_yet = {3, 8, 13}
    failures = failing(
        monkeypatch,
        torch.cuda.OutOfMemoryError("full"),
        lambda texts: any(text in not_yet and not_yet.discard(text) is None for text in texts),
    )
    assert run(**settings).step_losses == whole.step_losses
    assert failures == [1] * 3


def test_a_text_that_never_has_room_ends_the_edit(in_thread, monkeypatch):
    failing(monkeypatch, torch.cuda.OutOfMemoryError("full"), lambda texts: 5 in texts)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="full"):
        run()


def test_another_error_ahead_of_a_step_is_none_of_memory(in_thread, monkeypatch, caplog):
    failing(monkeypatch, RuntimeError("shapes differ"), lambda texts: True)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run()
    assert "do not fit into memory" not in caplog.text


@pytest.mark.parametrize("most", [100, 1])
def test_what_was_prepared_is_gone_before_it_is_prepared_again(most, in_thread, monkeypatch):
    """Halved or in the next epoch: memory that has run out needs what the old one took."""
    edit_losses, made, again = TextRunner.edit_losses, [], []

    def prepare(own, texts):
        former = [ref for ref, of in made if set(of) & set(texts.tolist())]
        again.extend(ref() is not None for ref in former)
        found = own(texts)
        made.append((weakref.ref(found), texts.tolist()))
        return found

    def losses(self, batch):
        if isinstance(batch, Prepared) and batch.n_texts > most:
            raise torch.cuda.OutOfMemoryError("no room")
        return edit_losses(self, batch)

    watching(monkeypatch, prepare)
    monkeypatch.setattr(TextRunner, "edit_losses", losses)
    run()
    assert len(again) > 14
    assert not any(again)
