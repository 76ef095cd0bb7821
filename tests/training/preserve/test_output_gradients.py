"""How much directions of a matrix's outputs matter: gradients by hand, and what damping does."""

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from torch.nn import functional as F

import locft_easyedit.training.preserve.filters as filters
import locft_easyedit.training.preserve.output_gradients as output_gradients
from locft_easyedit.api import edit_model
from locft_easyedit.errors import ModelError
from locft_easyedit.training.preserve.output_gradients import gradient_moments
from locft_easyedit.training.preserve.spectral_filter import output_filter

MODULES = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
# Of float32 sums in another order: 2e-6 measured.
TOLERANCE = 1e-4


@pytest.fixture
def likeliest(monkeypatch):
    """Draws the likeliest token, so that what is drawn does not depend on the batch."""
    monkeypatch.setattr(torch, "multinomial", lambda p, _: p.argmax(-1, keepdim=True))


def by_hand(model, sequences, ends_only):
    """Sums of g g^T, each text by itself, g by a parameter beside the module's output."""
    sums = dict.fromkeys(MODULES, 0.0)
    for sequence in sequences:
        added = {}

        def hook(module, _, output, added=added):
            name = next(n for n, m in model.named_modules() if m is module)
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        handles = [model.get_submodule(name).register_forward_hook(hook) for name in MODULES]
        logits = model(input_ids=torch.tensor([sequence])).logits[0]
        for handle in handles:
            handle.remove()
        logits = logits[-1:] if ends_only else logits
        F.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
        for name in MODULES:
            g = added[name].grad[0]
            sums[name] = sums[name] + g.T @ g
    return sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_give_nearly_the_same(dtype, likeliest):
    sequences = [[5, 6, 7, 8], [9, 10]]
    how = {"ends_only": True, "cache": None, "description": "", "progress": False}
    exact = gradient_moments(toy_model("gpt2"), ["transformer.h.2.mlp.c_proj"], sequences, **how)
    half = toy_model("gpt2").to(dtype)
    found = gradient_moments(half, ["transformer.h.2.mlp.c_proj"], sequences, **how)
    for name, expected in exact.items():
        assert found[name].shape == (half.config.n_embd, half.config.n_embd)
        # Gradients are scaled in float16, and moments are used but for their scale.
        close = found[name] / found[name].trace() - expected / expected.trace()
        assert close.norm() < 0.1 * (expected / expected.trace()).norm()


@pytest.mark.parametrize("ends_only", [True, False])
def test_gradients_are_those_of_each_text_by_itself(ends_only, likeliest):
    model = toy_model("llama").eval()
    sequences = toy_tokenizer()([r["prompt"] for r in toy_requests(9)])["input_ids"]
    assert len({*map(len, sequences)}) > 1  # padding is part of it
    expected = by_hand(model, sequences, ends_only)
    found = gradient_moments(
        model, MODULES, sequences, ends_only=ends_only, cache=None, description="", progress=False
    )
    assert [*found] == MODULES
    for name in MODULES:
        assert (found[name] - expected[name]).norm() < TOLERANCE * expected[name].norm()
    assert not any(module._forward_hooks for module in model.modules())


def test_they_are_kept_and_read_again(tmp_path, monkeypatch):
    model, sequences = toy_model("llama"), [[5, 6, 7], [8, 9]]
    state = torch.random.get_rng_state()
    how = {"ends_only": False, "cache": tmp_path, "description": "", "progress": False}
    first = gradient_moments(model, MODULES, sequences, **how)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(output_gradients, "_gradients", None)  # is not called again
    again = gradient_moments(model, MODULES, sequences, **how)
    assert all(torch.equal(again[name], first[name]) for name in MODULES)


def test_a_model_with_numbers_that_are_none_is_told():
    model = toy_model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"logits of `LlamaForCausalLM` hold a NaN"):
        gradient_moments(
            model, MODULES, [[5, 6, 7]], ends_only=True, cache=None, description="", progress=False
        )


def test_the_filter_damps_what_matters_most():
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0]
    matters = torch.cat([torch.tensor([50.0, 5.0]), torch.full((14,), 0.1)])
    t = output_filter((directions * matters) @ directions.T)
    kept = torch.linalg.vector_norm(t @ directions, dim=0)
    assert kept[0] < kept[1] < kept[2]
    assert kept.square().mean() == pytest.approx(1.0, rel=1e-4)


def test_at_the_same_losses_less_of_the_rest_moves(tmp_path, monkeypatch):
    """The distributions after texts that the model writes itself move less with both filters."""
    requests = toy_requests(8)
    moved, losses = {}, {}
    for both in (True, False):
        model, tokenizer = toy_model("llama", seed=3), toy_tokenizer(pad_is_eos=True)
        h = toy_hparams(
            rewrite_module_tmp=DOWN_PROJECTION["llama"], alg_name="LocFT-BF+", lr=3e-2,
            num_steps=40, preserve=["sampled"], preserve_dir=str(tmp_path), forms=[],
            epoch_loss_threshold=2.0, batch_loss_threshold=0.0,
        )  # fmt: skip
        if not both:
            monkeypatch.setattr(filters, "output_filter", lambda g, **_: torch.eye(len(g)))
        ids = torch.randint(5, 60, (64, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before = model(input_ids=ids).logits.log_softmax(-1)
            result = edit_model(model, tokenizer, requests, h, progress=False)
            after = model(input_ids=ids).logits.log_softmax(-1)
        moved[both] = float((before.exp() * (before - after)).sum(-1).mean())
        losses[both] = result.losses[-1]
        assert result.converged
    assert losses[True] == pytest.approx(losses[False], abs=0.3)
    assert moved[True] < moved[False]
