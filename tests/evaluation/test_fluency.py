"""Fluency in batches: the same for every batch size, and distributed as EasyEdit's samples."""

import numpy as np
import pytest
import torch
from helpers.toys import toy_model, toy_requests, toy_tokenizer

from locft_easyedit.evaluation import fluency
from locft_easyedit.evaluation.fluency import batched_fluency, fluency_of


def values(entries):
    return np.array([entry["ngram_entropy"] for entry in entries])


@pytest.fixture
def short_texts(monkeypatch):
    """Texts of 30 tokens: their entropies vary more, and a test is quick."""
    monkeypatch.setattr(fluency, "_TOTAL_TOKENS", 30)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_same_for_every_batch_size(kind, short_texts):
    model, tokenizer, records = toy_model(kind), toy_tokenizer(), toy_requests(9)
    state = torch.get_rng_state()
    one, many = (
        batched_fluency(model, tokenizer, records, words=str.split, batch_size=size)
        for size in (1, 7)
    )
    assert one == many
    assert torch.equal(torch.get_rng_state(), state)


def test_a_record_has_numbers_of_its_own(short_texts):
    model, tokenizer, records = toy_model(), toy_tokenizer(), toy_requests(4)
    everything = batched_fluency(model, tokenizer, records, words=str.split)
    some = batched_fluency(model, tokenizer, records[2:3], words=str.split, numbers=[2])
    assert some == everything[2:3]


def test_as_easyedits_in_distribution(short_texts):
    """Means of 200 samples of the same prompt, by both ways, within four standard errors."""
    model, tokenizer = toy_model(), toy_tokenizer()
    records = toy_requests(1) * 200
    torch.manual_seed(0)
    one_by_one = values(fluency_of(model, tokenizer, records, words=list))
    batched = values(batched_fluency(model, tokenizer, records, words=list))
    error = np.sqrt((one_by_one.var() + batched.var()) / len(records))
    assert error < 0.05
    assert abs(one_by_one.mean() - batched.mean()) < 4 * error
    assert batched.std() == pytest.approx(one_by_one.std(), rel=0.3)
    # Greedy texts or draws from all tokens would be far away.
    greedy = values(batched_fluency(Sharp(model), tokenizer, records[:1], words=list))
    assert abs(greedy[0] - one_by_one.mean()) > 4 * error


def test_prompts_longer_than_the_text(short_texts):
    model, tokenizer = toy_model(), toy_tokenizer()
    records = [{"prompt": "a word " * 40}, *toy_requests(2)]
    found = batched_fluency(model, tokenizer, records, words=str.split)
    assert found[0] == fluency_of(model, tokenizer, records[:1], words=str.split)[0]
    assert len(found) == 3
    assert batched_fluency(model, tokenizer, [], words=str.split) == []


class Sharp(torch.nn.Module):
    """A model whose first choice has all the probability."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        return (
            getattr(super().__getattr__("inner"), name)
            if name != "inner"
            else (super().__getattr__(name))
        )

    def forward(self, **inputs):
        output = self.inner(**inputs)
        output.logits = output.logits * 1e4
        return output
