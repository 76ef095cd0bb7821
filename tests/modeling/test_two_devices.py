"""The pretended GPUs refuse what real ones refuse."""

import threading

import pytest
import torch
from helpers.two_devices import two_devices
from torch.nn import functional as F


@pytest.fixture
def gpus():
    """Two GPUs for a test."""
    with two_devices() as pretended:
        yield pretended


def on(device, *shape):
    return torch.randn(*shape or (3, 3), device=device)


MIXED = [
    lambda a, b: a + b,
    lambda a, b: a @ b,
    lambda a, b: torch.cat([a, b]),
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: F.linear(a, b),
    lambda a, b: F.embedding(torch.tensor([1]), a),
    lambda a, b: F.cross_entropy(a, torch.tensor([1, 2, 0], device=b.device)),
    lambda a, b: a.index_select(0, torch.tensor([1])),
    lambda a, b: a.index_add(0, torch.tensor([1]), a[:1]),
    lambda a, b: torch.mm(a, a, out=torch.empty(3, 3)),
    lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None]),
    lambda a, b: a.add_(torch.ones(3)),
    lambda a, b: b.cpu() + a,
]


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_what_mixes_devices_is_refused(number, gpus):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXED[number](on("cuda:0"), on("cuda:1"))


def test_what_may_mix(gpus):
    a = on("cuda:0")
    assert (a * torch.tensor(2.0)).device == a.device
    assert a[torch.tensor([1, 0])].device == a.device
    assert torch.empty(3, 3).copy_(a).device == torch.device("cpu")
    a[torch.tensor([1])] = 1.0
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        a[torch.tensor([1], device="cuda:1")]


def test_a_device_is_that_of_the_memory(gpus):
    a = on("cuda:1")
    for tensor in (
        *(a.T, a[0], a.detach(), a.view(-1), torch.nn.Parameter(a), a.float(), a.double(), a * 2),
        *(torch.zeros_like(a), a.new_zeros(2), a.to(torch.float16), torch.stack([a, a]), a.clone()),
        *(a.topk(2).values, a.topk(2).indices, a.sum(), a.split(1)[0], torch.empty(2, device=1)),
    ):
        assert tensor.device == torch.device("cuda", 1)
        assert tensor.is_cuda
    module = torch.nn.Linear(3, 3).to("cuda:0")
    assert module.weight.device == module.bias.device == torch.device("cuda:0")
    assert a.cpu().device == torch.device("cpu")
    assert a.to("cuda:1") is a


def test_gradients_go_back_to_where_they_belong(gpus):
    a, b = on("cuda:0").requires_grad_(), on("cuda:1").requires_grad_()
    (a.to("cuda:1") @ b).sum().backward()
    assert a.grad.device == a.device
    assert b.grad.device == b.device
    assert [c[:2] for c in gpus.crossings] == [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")]


def test_a_backward_pass_is_checked_as_well(gpus):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            return given * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient + torch.ones(3, 3, device="cuda:1")

    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        Wrong.apply(on("cuda:0").requires_grad_()).sum().backward()


def test_an_optimizer_over_both(gpus):
    weights = [torch.nn.Parameter(on(device)) for device in ("cuda:0", "cuda:1")]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, fused=True)
    sum((weight.to("cuda:0") ** 2).sum() for weight in weights).backward()
    optimizer.found_inf = torch.tensor(1.0, device="cuda:1")
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    optimizer.found_inf = torch.tensor(0.0, device="cuda:1")
    optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        assert not torch.equal(weight, old)
        assert optimizer.state[weight]["exp_avg"].device == weight.device


def test_what_needs_the_host(gpus):
    a = on("cuda:0")
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        a.numpy()
    with pytest.raises(RuntimeError, match="cannot pin"):
        a.pin_memory()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(2, generator=torch.Generator(), device="cuda:0")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        on("cuda:2")
    assert a.cpu().numpy().shape == (3, 3)


def test_threads_believe_as_well(gpus):
    found = []

    def work():
        try:
            found.append(on("cuda:0").device)
            on("cuda:0") + on("cuda:1")
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] == torch.device("cuda:0")
    assert "Expected all tensors to be on the same device" in found[1]


def test_nothing_is_left_of_it():
    assert not torch.cuda.is_available() or torch.cuda.device_count() != 7
    before = (torch.cuda.device_count, threading.Thread.run, torch.cuda.is_available())
    with two_devices(7):
        assert torch.cuda.device_count() == 7
        a = on("cuda:6")
    assert a.device == torch.device("cpu")
    assert (torch.cuda.device_count, threading.Thread.run, torch.cuda.is_available()) == before
