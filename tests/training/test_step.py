"""The loop's own decisions: thresholds without waiting, micro-batches of even work."""

import numpy as np
import pytest
import torch
from helpers.toys import toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.training import session as editing
from locft_easyedit.training.step import MicroBatch, TrainingStep


def run(**changes):
    return edit_model(
        toy_model("llama"), toy_tokenizer(), toy_requests(14), toy_hparams(**changes),
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3}], ids=str)
def test_a_threshold_on_the_device_gives_what_one_on_the_host_gives(changes, monkeypatch):
    """As on a GPU, where the host must not wait for each loss."""
    settings = {"batch_loss_threshold": 5.9, "num_steps": 6, "lr": 5e-3, **changes}
    on_host = run(**settings)
    assert 0 < on_host.n_updates < len(on_host.step_losses)

    class OnDevice(TrainingStep):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.host_may_sync = False

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
