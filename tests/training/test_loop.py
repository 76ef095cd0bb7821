"""The loop with everything on against the naive reference, on the same mini-batches."""

import copy
import json

import pytest
import torch
from helpers.reference import naive_depth_first, naive_locft_bf
from helpers.toys import DOWN_PROJECTION, TOY_KINDS, toy_model, toy_requests, toy_tokenizer
from transformers import get_cosine_schedule_with_warmup

from locft_easyedit.api import edit_model
from locft_easyedit.data.requests import make_requests
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.training.loop import rates
from locft_easyedit.training.session import EditSession

# Measured over 20 steps: losses differ by 9.5e-7 at most on the toys, and the trained change by
# 1.0e-6 of its norm (float32 rounding). The real model is larger: see there.
LOSS_TOLERANCE = 5e-6
CHANGE_TOLERANCE = 1e-5
# Measured on SmolLM2 over 2 to 6 steps: 2.2e-5 of losses near 10, and 1.6e-3 to 4.0e-3 of the
# change: Adam's first steps divide each gradient by its own size, also those that are rounding.
REAL_LOSS_TOLERANCE = 1e-4
REAL_CHANGE_TOLERANCE = 1e-2


def hparams_for(template, **changes):
    values = {
        "layers": [2],
        "rewrite_module_tmp": template,
        "lr": 5e-3,
        "batch_size": 4,
        "num_steps": 4,
        "row_tokens": 40,
    }
    return LocFTBFHyperParams(**(values | changes))


def compare(
    model,
    tokenizer,
    requests,
    hparams,
    loss_tolerance=LOSS_TOLERANCE,
    change_tolerance=CHANGE_TOLERANCE,
):
    """Runs both, compares, and returns the result."""
    reference = copy.deepcopy(model)
    result = edit_model(model, tokenizer, requests, hparams, progress=False)
    parameters = dict(reference.named_parameters())
    steps, epochs = naive_locft_bf(
        reference, tokenizer, requests, [parameters[name] for name in result.new], hparams
    )
    assert len(result.step_losses) == len(steps)
    assert len(result.losses) == len(epochs)
    loss_error = max(abs(a - b) for a, b in zip(result.step_losses, steps, strict=True))
    change_error = max(
        float((result.new[n] - p.detach()).norm() / (p.detach() - result.original[n]).norm())
        for n, p in ((name, parameters[name]) for name in result.new)
    )
    assert loss_error <= loss_tolerance
    assert change_error <= change_tolerance
    return result


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_losses_and_weights_are_those_of_the_reference(kind):
    result = compare(
        toy_model(kind), toy_tokenizer(), toy_requests(18), hparams_for(DOWN_PROJECTION[kind])
    )
    assert result.packed
    assert result.frozen_prefix
    assert result.n_updates == 20


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False},
        {"frozen_prefix": False},
        {"packing": False, "frozen_prefix": False},
        {"micro_batch_size": 3},
        {"layers": [0]},
        {"layers": [1, 3]},
        {"layers": [3]},
        {"append_eos": False},
        {"weight_decay": 0.1},
        {"rewrite_module_tmp": ["model.layers.{}.mlp.up_proj", "model.layers.{}.self_attn.q_proj"]},
        {"rewrite_module_tmp": "model.layers.{}."},
        {"batch_loss_threshold": 5.5},  # between the losses: some steps are left out
        {"epoch_loss_threshold": 6.0},  # reached before the last epoch
        {"batch_size": 100},
        {"batch_size": 1},
        {"loss_average": "token"},
        {"loss_average": "token", "micro_batch_size": 3},
        {"lr_schedule": "cosine", "num_steps": 6},
    ],
    ids=str,
)
def test_every_setting_agrees_with_the_reference(changes):
    h = hparams_for(DOWN_PROJECTION["llama"], **changes)
    result = compare(toy_model("llama"), toy_tokenizer(), toy_requests(18), h)
    if "batch_loss_threshold" in changes:
        assert 0 < result.n_updates < len(result.step_losses)
    if "epoch_loss_threshold" in changes:
        assert result.converged
        assert len(result.losses) < h.num_steps


def test_few_edits_are_trained_in_more_mini_batches():
    def losses(**how):
        h = hparams_for(DOWN_PROJECTION["llama"], num_steps=2, **how)
        model = toy_model("llama")
        return edit_model(model, toy_tokenizer(), toy_requests(11), h, progress=False).step_losses

    found = losses(batch_size=100, min_batches=5)
    assert len(found) == 2 * 6
    assert found == losses(batch_size=2)


@pytest.mark.parametrize("changes", [{}, {"batch_size": 1}, {"loss_average": "token"}], ids=str)
def test_depth_first_is_one_mini_batch_after_another(changes):
    h = hparams_for(
        DOWN_PROJECTION["llama"],
        **{"pipeline": "depth_first", "num_steps": 8, "batch_loss_threshold": 5.85} | changes,
    )
    model, tokenizer, requests = toy_model("llama"), toy_tokenizer(), toy_requests(10)
    reference = copy.deepcopy(model)
    result = edit_model(model, tokenizer, requests, h, progress=False)
    parameters = dict(reference.named_parameters())
    losses = naive_depth_first(
        reference, tokenizer, requests, [parameters[name] for name in result.new], h
    )
    # One that is learned early ends early, and not all are.
    assert len(requests) / h.batch_size < len(losses) < 8 * -(-len(requests) // h.batch_size)
    assert result.step_losses == pytest.approx(losses, abs=LOSS_TOLERANCE)
    for name, value in result.new.items():
        change = parameters[name].detach() - result.original[name]
        assert (value - parameters[name]).norm() <= CHANGE_TOLERANCE * change.norm()


def test_the_cosine_schedule_is_the_usual_one():
    adam = torch.optim.Adam([torch.zeros(1)], lr=1.0)
    usual = get_cosine_schedule_with_warmup(adam, 4, 40)
    rate = rates("cosine", 40)
    expected = []
    for _ in range(40):
        expected.append(usual.get_last_lr()[0])
        adam.step()
        usual.step()
    assert [rate(step) for step in range(4, 40)] == pytest.approx(expected[4:])
    # The usual one begins with a step of 0, which trains nothing.
    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_a_pad_token_that_is_also_eos_changes_nothing():
    requests, results = toy_requests(10), []
    for pad_is_eos in (False, True):
        tokenizer = toy_tokenizer(pad_is_eos=pad_is_eos)
        assert (tokenizer.pad_token_id == tokenizer.eos_token_id) == pad_is_eos
        result = compare(
            toy_model("llama"), tokenizer, requests, hparams_for(DOWN_PROJECTION["llama"])
        )
        results.append(result)
    # A mask made by `ids != pad_token_id` trains without EOS, or on nothing else.
    assert results[0].step_losses == results[1].step_losses


def test_a_beginning_of_sequence_token_stays():
    compare(
        toy_model("llama"),
        toy_tokenizer(bos=True, pad_is_eos=True),
        toy_requests(10),
        hparams_for(DOWN_PROJECTION["llama"]),
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_the_seed_decides_the_order(seed):
    runs = [
        edit_model(
            toy_model("llama"),
            toy_tokenizer(),
            toy_requests(12),
            hparams_for(DOWN_PROJECTION["llama"], seed=s),
            progress=False,
        ).step_losses
        for s in (seed, seed, seed + 10)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_part_of_a_session_is_a_run_of_its_own():
    requests, h = toy_requests(8), hparams_for(DOWN_PROJECTION["llama"])
    model = toy_model("llama")
    with EditSession(model, toy_tokenizer(), requests, h, progress=False) as session:
        for i in (0, 5):
            part = session.train_([i], progress=False)
            part.restore_(model)
            alone = edit_model(
                toy_model("llama"), toy_tokenizer(), [requests[i]], h, progress=False
            )
            assert part.step_losses == pytest.approx(alone.step_losses, abs=LOSS_TOLERANCE)


def test_the_real_model_agrees_with_the_reference(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from locft_easyedit.cli.demo import FACTS

    records = json.loads(FACTS.read_text(encoding="utf-8"))[:8]
    requests = make_requests([r["prompt"] for r in records], [r["target_new"] for r in records])
    h = hparams_for(DOWN_PROJECTION["llama"], layers=[26], lr=2e-3, num_steps=2, row_tokens=64)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # as EasyEdit sets it for every model
    result = compare(model, tokenizer, requests, h, REAL_LOSS_TOLERANCE, REAL_CHANGE_TOLERANCE)
    assert result.packed
    assert result.frozen_prefix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_float32_masters(dtype):
    """Steps far smaller than the spacing of the half precision still add up."""
    template, requests = DOWN_PROJECTION["llama"], toy_requests(6)
    h = hparams_for(template, lr=1e-6, num_steps=40, batch_size=6)
    exact = edit_model(toy_model("llama"), toy_tokenizer(), requests, h, progress=False)
    half = edit_model(toy_model("llama").to(dtype), toy_tokenizer(), requests, h, progress=False)
    assert half.losses[-1] < half.losses[0]
    [name] = exact.new
    moved_half = (half.new[name].float() - half.original[name].float()).norm()
    moved = (exact.new[name] - exact.original[name]).norm()
    # Without masters a step of 1e-6 rounds away on nearly all of the weights, which are about 0.2.
    assert moved_half > 0.3 * moved
    assert half.new[name].dtype == dtype
