"""Losses of facts and of texts that are to be as in the base, against a naive forward pass."""

import copy

import numpy as np
import pytest
import torch
from helpers.ledgers import SEQUENCES, STARTS, facts, trainer_of, wide_model
from torch.nn import functional as F

from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.training.repair import wrong_texts


def naive(model, sequence, start):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence[:-1]])).logits[0]
    return F.log_softmax(logits[start - 1 :].float(), -1)


@pytest.mark.parametrize("head", [True, False], ids=["head", "logits"])
@pytest.mark.parametrize("kind", ["layer", "mlp", "matrix"])
def test_losses(tmp_path, kind, head):
    model, base = wide_model(), wide_model()
    trainer = trainer_of(model, tmp_path, prefix_cut=kind)
    more = TokenizedTexts.from_lists(SEQUENCES, STARTS)
    with trainer.ready():
        numbered, runner = trainer.facts.numbered([facts(1), facts(2)[1:]], more)
        if not head:
            runner.head = None
        first = len(numbered.texts) - len(more)
        runner.remember_base_(first, 2)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.mul_(-1.5)
        batch = np.array([first + 2, 0, first, 1, first + 3])
        with runner.running():
            losses = runner.edit_losses(batch)
            losses.sum().backward()
        gradient = model.model.layers[2].mlp.down_proj.weight.grad.clone()
        wrong, divergences = runner.away(first + np.arange(4), 3, 0.0)
        none_wrong, _ = runner.away(first + np.arange(4), 3, 1e9)
    assert not none_wrong.any()
    for is_wrong, sequence, start in zip(wrong, SEQUENCES, STARTS, strict=True):
        then = naive(base, sequence, start)
        labels, choices = torch.tensor(sequence[start:]), naive(model, sequence, start).argmax(-1)
        behind = then.gather(1, choices[:, None]) < then.gather(1, labels[:, None])
        assert is_wrong == bool(behind.any())
    expected = []
    for sequence, start in zip(SEQUENCES, STARTS, strict=True):
        then, now = (naive(m, sequence, start) for m in (base, model))
        expected.append(float((then.exp() * (then - now)).sum(-1).mean()))
    assert divergences == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert [losses[i].item() for i in (0, 2, 4)] == pytest.approx(
        [expected[i] for i in (2, 0, 3)], rel=1e-3, abs=1e-6
    )
    for i, text in ((1, 0), (3, 1)):
        ids = numbered.texts.ids[numbered.texts.offsets[text] : numbered.texts.offsets[text + 1]]
        start = int(numbered.texts.target_start[text])
        logs = naive(model, ids.tolist(), start)
        target = torch.tensor(ids[start:])
        assert losses[i].item() == pytest.approx(-logs.gather(1, target[:, None]).mean().item(),
                                                 rel=1e-3)  # fmt: skip
    assert torch.isfinite(gradient).all()
    assert gradient.norm() > 0


def test_the_gradient_of_a_divergence(tmp_path):
    model, base = wide_model(), wide_model()
    trainer = trainer_of(model, tmp_path)
    with trainer.ready():
        more = TokenizedTexts.from_lists(SEQUENCES[:1], STARTS[:1])
        numbered, runner = trainer.facts.numbered([facts(1)], more)
        first = len(numbered.texts) - 1
        runner.remember_base_(first, 2)
        weight = model.model.layers[2].mlp.down_proj.weight
        with torch.no_grad():
            weight.mul_(-1.5)
        with runner.running():
            runner.edit_losses(np.array([first])).sum().backward()
        found = weight.grad.clone()
    other = copy.deepcopy(model)
    with torch.enable_grad():
        logits = other(input_ids=torch.tensor([SEQUENCES[0][:-1]])).logits[0, STARTS[0] - 1 :]
        now, then = F.log_softmax(logits, -1), naive(base, SEQUENCES[0], STARTS[0])
        (then.exp() * (then - now)).sum(-1).mean().backward()
    expected = other.model.layers[2].mlp.down_proj.weight.grad
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6 * float(expected.norm()))


def test_wrong_counts_near_ties_as_it_is_told(tmp_path):
    model = wide_model()
    trainer = trainer_of(model, tmp_path)
    with trainer.ready():
        _, runner = trainer.facts.numbered([facts(2)])
        texts = np.arange(2)
        assert wrong_texts(runner, runner.share, texts, 2, clearly=False).tolist() == [0, 1]
        with torch.no_grad():
            model.lm_head.weight.zero_()  # every token is as likely as every other
        assert wrong_texts(runner, runner.share, texts, 2, clearly=False).tolist() == []
        assert wrong_texts(runner, runner.share, texts, 2, clearly=True).tolist() == [0, 1]
        assert trainer.wrong(runner, texts[1:]).tolist() == [1]
