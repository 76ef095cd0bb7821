"""What the processes of a ledger deal out among them, and give each other."""

import numpy as np
import pytest
import torch
from helpers.launching import launch
from helpers.ledgers import ledger_hparams, wide_model
from helpers.toys import toy_tokenizer

from locft_easyedit.data.batching import length_sorted_batches
from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.distributed.world import Partition, World, get_world
from locft_easyedit.ledger.dealing import joined_partitions, tokens_of, whole_batches
from locft_easyedit.ledger.recording import Recorder
from locft_easyedit.ledger.recording_together import exchange_states
from locft_easyedit.modeling.places import select_place


@pytest.mark.parametrize(("n_texts", "n"), [(0, 2), (3, 2), (25, 2), (25, 4), (2, 3)])
def test_whole_batches_are_those_of_one_process(n_texts, n):
    lengths = np.random.default_rng(n_texts).integers(1, 9, n_texts)
    batches = length_sorted_batches(lengths, 4)
    found = []
    for rank in range(n):
        own = whole_batches(World(rank, n), lengths, 4)
        assert (np.diff(own) > 0).all()
        found += [own[batch].tolist() for batch in length_sorted_batches(lengths[own], 4)]
    assert sorted(found) == sorted(batch.tolist() for batch in batches)


def test_tokens_of_some_texts():
    texts = TokenizedTexts.from_lists([[1, 2, 3], [4, 5], [6, 7, 8, 9]], [1, 1, 2])
    assert tokens_of(texts, np.array([0, 2])).tolist() == [0, 1, 3, 4, 5]
    assert tokens_of(texts, np.array([], np.int64)).tolist() == []


def test_joined_partitions():
    parts = [Partition.of_rank(World(1, 2), np.array(sizes)) for sizes in ([5, 4, 3], [2], [9, 8])]
    joined = joined_partitions(parts)
    assert joined.own.tolist() == [1, 5]
    assert joined.positions_of(np.array([5, 0, 3, 1])).tolist() == [1, 0]


def test_commits_of_one_fact_are_shared_as_well(tmp_path):
    model, h = wide_model(), ledger_hparams()
    place = select_place(model, h.layers, h.templates)
    tokenizer, owners = toy_tokenizer(), []
    for i in range(60):
        ids = tokenizer(f"Fact {i} is in Norway")["input_ids"]
        texts = TokenizedTexts.from_lists([ids], [len(ids) - 1])
        shares = [
            Recorder(model, h, place, tmp_path, World(rank, 3)).share_of(texts).own
            for rank in range(3)
        ]
        [owner] = [rank for rank, own in enumerate(shares) if len(own)]
        owners.append(owner)
    assert min(np.bincount(owners, minlength=3)) >= 10


def exchanged(broken):
    """Lets ranks give each other the states of 11 tokens; returns what each has of its own."""
    world = get_world()
    states = torch.randn(11, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    states[4] = -0.0
    held = np.arange(world.rank, 11, world.size)
    got = torch.zeros_like(states)

    def keep(first, part):
        if broken == world.rank:
            raise OSError("no room")
        got[first : first + len(part)] = part

    try:
        exchange_states(world, 11, (3, torch.bfloat16), held, lambda i: states[held][i], keep)
    except Exception as error:
        return str(error)
    return torch.equal(got.view(torch.int16), states.view(torch.int16))


@pytest.mark.processes
def test_states_are_exchanged_to_the_bit():
    assert [rank.value for rank in launch(2, "ledger.test_dealing:exchanged", None)] == [True] * 2
    first, second = launch(2, "ledger.test_dealing:exchanged", 1)
    assert first.value == "Rank 1 of 2 failed: OSError: no room"
    assert second.value == "no room"
