"""Losses in chunks against PyTorch's cross-entropy of all logits, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from locft_easyedit.modeling import cross_entropy
from locft_easyedit.modeling.cross_entropy import Head

N_TOKENS, WIDTH, VOCABULARY = 23, 16, 101


def head(dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    changes = {k: bias if v is True else v for k, v in changes.items()}
    return Head(weight.to(dtype), **changes)


def plain(head, hidden, labels):
    bias = None if head.bias is None else head.bias.float()
    logits = F.linear(hidden.float(), head.weight.float(), bias) * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return F.cross_entropy(logits, labels, reduction="none")


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N_TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (N_TOKENS,), generator=generator)


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, 2**25])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0},
     {"bias": True, "scale": 2.0, "softcap": 5.0}],
    ids=str,
)  # fmt: skip
def test_losses_and_gradients(changes, at_once, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(cross_entropy, "_VOCABULARY_CPU", 7)
    made = head(**changes)
    hidden, labels = inputs()
    weights = torch.linspace(0.1, 2.0, N_TOKENS)
    losses = made.token_losses(hidden, labels)
    (losses * weights).sum().backward()
    expected = plain(made, other := hidden.detach().requires_grad_(), labels)
    (expected * weights).sum().backward()
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(hidden.grad, other.grad, atol=1e-5)


def test_a_second_batch_does_not_disturb_the_first():
    """Room for logits is used again, also by a shorter batch and a longer one."""
    made = head()
    hidden, labels = inputs()
    first = made.token_losses(hidden, labels)
    made.token_losses(hidden[:3] * 2, labels[:3])
    made.token_losses(torch.cat([hidden, hidden]), torch.cat([labels, labels]))
    first.sum().backward()
    plain(made, other := hidden.detach().requires_grad_(), labels).sum().backward()
    assert torch.allclose(hidden.grad, other.grad, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_losses(dtype):
    made = head(dtype)
    hidden, labels = inputs(dtype)
    losses = made.token_losses(hidden, labels)
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert hidden.grad.dtype == dtype
    expected = plain(made, other := hidden.detach().float().requires_grad_(), labels)
    expected.mean().backward()
    # Logits near 10 are rounded to 0.03 in bfloat16.
    assert torch.allclose(losses, expected, atol=6e-2)
    assert float((hidden.grad.float() - other.grad).norm() / other.grad.norm()) < 2e-2


def test_without_gradients_none_are_computed():
    made = head()
    hidden, labels = inputs()
    with torch.no_grad():
        losses = made.token_losses(hidden, labels)
    assert not losses.requires_grad
    assert torch.allclose(losses, plain(made, hidden, labels), atol=1e-5)


def test_extreme_logits_stay_finite():
    made = head(scale=1e4)
    hidden, labels = inputs()
    losses = made.token_losses(hidden, labels)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(hidden.grad).all()
    assert torch.allclose(losses, plain(made, hidden, labels), rtol=1e-5)


def test_flat_logits_over_more_tokens_than_float16_has_numbers():
    """A softmax is divided by the vocabulary then, above 65,504."""
    size = 70_000
    generator = torch.Generator().manual_seed(2)
    made = Head((torch.randn(size, WIDTH, generator=generator) * 2).to(torch.float16))
    hidden = (torch.randn(3, WIDTH, generator=generator) * 1e-3).to(torch.float16).requires_grad_()
    labels = torch.tensor([0, 5, size - 1])
    losses = made.token_losses(hidden, labels)
    losses.sum().backward()
    expected = plain(made, other := hidden.detach().float().requires_grad_(), labels)
    expected.sum().backward()
    assert torch.allclose(losses, expected, atol=1e-3)
    assert torch.allclose(hidden.grad.float(), other.grad, rtol=2e-3, atol=2e-3)
