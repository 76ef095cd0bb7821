"""How far a model's answer to a rewording is from its answer to the prompt, in nats."""

import math

import pytest
import torch
from helpers.toys import CONTEXT, toy_hparams, toy_model, toy_tokenizer

from locft_easyedit.training.rewordings.answer_filter import ANSWER_TOKENS, AnswerFilter

GROUPS = [
    ("Who wrote Emma?", ["By whom was Emma written?", "Who wrote Emma?"]),
    ("The capital of Peru is", []),
    ("He was born in", ["His place of birth was", "He was, as far as anybody can tell, born in"]),
]


def naive(model, tokenizer, one, other):
    """Half of the sum of both KL divergences, from a pass for each text and token alone."""
    one, other = (
        tokenizer(f"Question: {text}\nAnswer:" if text.endswith("?") else text)["input_ids"]
        for text in (one, other)
    )
    nats = []
    for _ in range(ANSWER_TOKENS):
        with torch.no_grad():
            p, q = (
                torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), 0)
                for ids in (one, other)
            )
        nats.append(float(((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2))
        one, other = [*one, int(p.argmax())], [*other, int(p.argmax())]
    return sum(nats) / len(nats)


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"eval_batch_size": 2}])
def test_the_divergence_of_whole_passes(changes):
    model, tokenizer = toy_model(), toy_tokenizer()
    model.train()
    found = AnswerFilter(model, tokenizer, toy_hparams(**changes)).divergences(GROUPS)
    assert model.training
    model.eval()
    for (prompt, texts), values in zip(GROUPS, found, strict=True):
        expected = [naive(model, tokenizer, prompt, text) for text in texts]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found[0][1] == pytest.approx(0, abs=1e-5)
    assert found[0][0] > 1e-3


def test_a_tokenizer_that_ends_every_text():
    model, h = toy_model(), toy_hparams()
    ended = AnswerFilter(model, toy_tokenizer(bos=True, eos=True), h).divergences(GROUPS)
    assert ended == AnswerFilter(model, toy_tokenizer(bos=True), h).divergences(GROUPS)
    assert ended[0][0] > 1e-3


def test_what_the_context_cannot_hold_is_far():
    one = AnswerFilter(toy_model(), toy_tokenizer(), toy_hparams())
    long = "word " * CONTEXT
    assert one.divergences([("a", [long, "b"]), (long, ["b"])])[0][0] == math.inf
    assert one.divergences([(long, ["b"])]) == [[math.inf]]


def test_a_model_that_is_broken_is_close_to_nothing():
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    [[value]] = AnswerFilter(model, toy_tokenizer(), toy_hparams(packing=False)).divergences(
        [("a", ["b"])]
    )
    assert not value <= 1e9
