"""An edit as a whole: what it leaves unchanged, what it gives back, and how it fails."""

import logging
import sys

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from torch import nn

from locft_easyedit.api import edit_model
from locft_easyedit.errors import (
    LocFTError,
    ModelError,
    NonFiniteLossError,
    PlaceError,
    RequestError,
)
from locft_easyedit.prefix.frozen_prefix import FrozenPrefix
from locft_easyedit.training.session import EditSession


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_untouched(model, before, modules):
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restoring_and_applying_are_exact(dtype):
    model = toy_model("llama").to(dtype)
    before, modules = weights(model), list(model.named_modules())
    result = edit_model(model, toy_tokenizer(), toy_requests(6), toy_hparams(), progress=False)
    [name] = result.new
    edited = weights(model)
    assert torch.equal(edited[name], result.new[name])
    assert not torch.equal(edited[name], before[name])
    # Nothing but the place changes.
    assert all(torch.equal(edited[n], before[n]) for n in before if n != name)
    result.restore_(model)
    assert_untouched(model, before, modules)
    result.apply_(model)
    assert all(torch.equal(value, edited[n]) for n, value in weights(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_model_answers_with_and_without_the_edit(dtype):
    model, tokenizer = toy_model("llama").to(dtype), toy_tokenizer()
    before = weights(model)
    result = edit_model(model, tokenizer, toy_requests(4), toy_hparams(), progress=False)
    edited = weights(model)
    with result.switched_off(model):
        assert_same(weights(model), before)
        with result.switched_on(model):
            assert_same(weights(model), edited)
        assert_same(weights(model), before)
    assert_same(weights(model), edited)
    with pytest.raises(RuntimeError, match="mine"), result.switched_off(model):
        raise RuntimeError("mine")
    assert_same(weights(model), edited)
    other = toy_model("gpt2")
    untouched = weights(other)
    with (
        pytest.raises(ModelError, match=r"has no parameters .*down_proj"),
        result.switched_on(other),
    ):
        pass
    assert_same(weights(other), untouched)


def assert_same(one, other):
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_edited_weights_survive_saving_and_loading(tmp_path):
    from transformers import AutoModelForCausalLM

    model = toy_model("llama")
    edit_model(model, toy_tokenizer(), toy_requests(6), toy_hparams(), progress=False)
    model.save_pretrained(tmp_path)
    loaded = weights(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(loaded[name], value) for name, value in weights(model).items())


def test_flags_mode_and_vocabulary_stay():
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    model.train()
    model.model.layers[1].eval()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    vocabulary, rows = len(tokenizer), model.get_input_embeddings().weight.shape
    edit_model(model, tokenizer, toy_requests(4), toy_hparams(), progress=False)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert len(tokenizer) == vocabulary
    assert model.get_input_embeddings().weight.shape == rows
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_while_editing():
    runs = []
    for dropout in (0.0, 0.5):
        model = toy_model("gpt2", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        model.train()
        h = toy_hparams(rewrite_module_tmp=DOWN_PROJECTION["gpt2"])
        runs.append(edit_model(model, toy_tokenizer(), toy_requests(4), h, progress=False))
    assert runs[0].step_losses == runs[1].step_losses


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 5])
def test_an_interruption_leaves_the_model_as_it_was(error, after, monkeypatch):
    model = toy_model("llama")
    before, modules = weights(model), list(model.named_modules())
    calls = 0
    original = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(error):
        edit_model(model, toy_tokenizer(), toy_requests(8), toy_hparams(), progress=False)
    assert calls == after + 1
    assert_untouched(model, before, modules)


@pytest.mark.parametrize("method", ["keeping", "feed"])
def test_an_interruption_of_the_prefix_leaves_the_model_as_it_was(method, monkeypatch):
    model = toy_model("llama")
    before, modules = weights(model), list(model.named_modules())

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FrozenPrefix, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit_model(model, toy_tokenizer(), toy_requests(8), toy_hparams(), progress=False)
    assert_untouched(model, before, modules)


def test_a_loss_that_is_no_number_stops_and_names_the_batch():
    model, requests = toy_model("llama"), toy_requests(4)
    before, modules = weights(model), list(model.named_modules())
    with pytest.raises(NonFiniteLossError, match=r"epoch \d+, mini-batch 1 \(request \d+: '.*lr"):
        edit_model(
            model, toy_tokenizer(), requests, toy_hparams(lr=1e39, num_steps=9), progress=False
        )
    assert_untouched(model, before, modules)


def test_a_weight_that_overflows_in_the_last_step_stops_as_well():
    model = toy_model("llama").to(torch.float16)
    before, modules = weights(model), list(model.named_modules())
    with pytest.raises(NonFiniteLossError, match="The last update made a weight NaN or infinite"):
        edit_model(
            model,
            toy_tokenizer(),
            toy_requests(4),
            toy_hparams(lr=1e6, num_steps=1),
            progress=False,
        )
    assert_untouched(model, before, modules)


@pytest.mark.parametrize(
    ("changes", "requests", "error", "message"),
    [
        ({"layers": [4]}, 3, PlaceError, r"`layers=\[4\]` is out of range.*4 layers"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp.down"}, 3, PlaceError, "matches nothing"),
        ({}, 0, RequestError, "empty"),
    ],
)
def test_bad_input_changes_nothing(changes, requests, error, message):
    model = toy_model("llama")
    before, modules = weights(model), list(model.named_modules())
    with pytest.raises(error, match=message):
        edit_model(
            model,
            toy_tokenizer(),
            toy_requests(requests) if requests else [],
            toy_hparams(**changes),
        )
    assert_untouched(model, before, modules)


def test_a_prompt_beyond_the_context_is_refused():
    model, requests = toy_model("llama"), toy_requests(2)
    requests[1]["prompt"] = "The river " * 300
    with pytest.raises(RequestError, match=r"request 1 .* tokens; the model's context is 256"):
        edit_model(model, toy_tokenizer(), requests, toy_hparams())


# What cannot be split or packed still works


def losses_of(model, **changes):
    return edit_model(
        model, toy_tokenizer(), toy_requests(8), toy_hparams(**changes), progress=False
    )


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


class Sum(nn.Module):
    """A layer that also looks at what the first layer gave: no cut above it can be exact."""

    def __init__(self, layer, memory):
        super().__init__()
        self.layer, self.memory = layer, memory

    def forward(self, hidden_states, **kwargs):
        if self.layer.self_attn.layer_idx == 0:
            self.memory["first"] = hidden_states.detach()
        return self.layer(hidden_states + 0.5 * self.memory["first"], **kwargs)


def test_a_model_that_cannot_be_split_runs_in_full_with_one_warning(caplog):
    def make():
        model, memory = toy_model("llama"), {}
        for i in range(4):
            layer = model.model.layers[i]
            model.model.layers[i] = Sum(layer, memory)
        return model

    template = "model.layers.{}.layer.mlp.down_proj.weight"
    result = losses_of(make(), rewrite_module_tmp=template)
    assert not result.frozen_prefix
    [warning] = warnings_of(caplog)
    assert "No frozen prefix for LlamaForCausalLM" in warning
    assert "cannot be split" in warning or "changes the logits" in warning
    full = losses_of(make(), rewrite_module_tmp=template, frozen_prefix=False, packing=False)
    assert result.step_losses == pytest.approx(full.step_losses, abs=1e-5)


def test_a_parameter_outside_the_layers_is_trained_without_a_prefix(caplog):
    model = toy_model("llama")
    model.adapters = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Linear(32, 32, bias=False)])
    model.lm_head.register_forward_pre_hook(lambda head, args: (model.adapters[2](args[0]),))
    result = losses_of(model, rewrite_module_tmp="adapters.{}.weight")
    assert not result.frozen_prefix
    assert "a trained parameter lies outside its layers" in warnings_of(caplog)[0]


def test_a_model_that_ignores_positions_is_padded(caplog):
    """Without position ids transformers cannot know where a packed sequence begins.

    Nor can it with a mask that it is not given: the model takes those of padded rows alone.
    """
    model = toy_model("llama")
    forward = model.model.forward

    def without_positions(*args, position_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() != 2:
            attention_mask = None
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = without_positions
    result = losses_of(model)
    assert not result.packed
    assert result.frozen_prefix
    assert "Packed rows change the logits" in warnings_of(caplog)[0]
    assert result.step_losses == pytest.approx(losses_of(toy_model("llama")).step_losses, abs=1e-5)


def test_a_model_that_ignores_positions_is_packed_with_masks_that_it_is_given():
    """Rotary positions are relative: with the masks of its texts a row is right without them."""
    model = toy_model("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **given: forward(*args, **given)
    result = losses_of(model)
    assert result.packed
    assert result.step_losses == pytest.approx(losses_of(toy_model("llama")).step_losses, abs=1e-5)


# Memory


def test_running_out_of_memory_halves_the_micro_batch_and_keeps_the_mathematics(
    caplog, monkeypatch
):
    whole = losses_of(toy_model("llama"), batch_size=8)
    from locft_easyedit.prefix.runner import TextRunner

    original = TextRunner.edit_losses

    def at_most_two(self, batch):
        if batch.n_texts > 2:
            raise torch.cuda.OutOfMemoryError("no memory")
        return original(self, batch)

    monkeypatch.setattr(TextRunner, "edit_losses", at_most_two)
    split = losses_of(toy_model("llama"), batch_size=8)
    assert split.step_losses == pytest.approx(whole.step_losses, abs=1e-5)
    assert len(warnings_of(caplog)) == 2  # 8 -> 4 -> 2, then it stays

    def never(self, batch):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(TextRunner, "edit_losses", never)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        losses_of(toy_model("llama"))


def test_progress_is_shown_on_a_terminal_and_can_be_turned_off(capsys, monkeypatch):
    edit_model(toy_model("llama"), toy_tokenizer(), toy_requests(4), toy_hparams(), progress=True)
    assert "breadth-first" not in capsys.readouterr().err  # a log file gets no bars
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    edit_model(toy_model("llama"), toy_tokenizer(), toy_requests(4), toy_hparams(), progress=True)
    shown = capsys.readouterr().err
    assert "frozen prefix" in shown
    assert "breadth-first" in shown
    edit_model(toy_model("llama"), toy_tokenizer(), toy_requests(4), toy_hparams(), progress=False)
    assert capsys.readouterr().err == ""


def test_the_result_says_what_happened():
    requests = [*toy_requests(5), toy_requests(1)[0]]
    result = edit_model(
        toy_model("llama"), toy_tokenizer(), requests, toy_hparams(), progress=False
    )
    summary = result.summary()
    assert summary["requests"] == 6
    assert summary["trained_edits"] == 5
    assert summary["merged_duplicates"] == 1
    assert summary["epochs"] == len(result.losses) == 3
    assert set(result.timings) == {"prepare", "prefix", "train"}
    assert all(seconds >= 0 for seconds in result.timings.values())
    assert summary["trained_parameters"] == {"model.layers.2.mlp.down_proj.weight": [32, 64]}


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cpu, gpu = losses_of(toy_model("llama")), losses_of(toy_model("llama").cuda())
    assert gpu.step_losses == pytest.approx(cpu.step_losses, abs=1e-3)
    assert gpu.packed
    assert gpu.frozen_prefix


def test_errors_are_value_errors():
    assert issubclass(LocFTError, ValueError)
    with (
        pytest.raises(ValueError, match="empty"),
        EditSession(toy_model("llama"), toy_tokenizer(), [], toy_hparams()),
    ):
        pass
