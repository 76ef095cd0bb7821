"""Cuts and the end of the model: found where the architecture allows, and never felt."""

import logging

import numpy as np
import pytest
import torch
from helpers.reference import naive_edit_loss
from helpers.toys import (
    DOWN_PROJECTION,
    N_LAYERS,
    TOY_KINDS,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)
from torch import nn

from locft_easyedit.api import edit_model
from locft_easyedit.modeling.layer_trace import tracing
from locft_easyedit.training.session import EditSession

# As in test_loop_reference: float32 rounding.
TOLERANCE = 5e-6

ALL = ["matrix", "mlp", "layer"]
# GPT-J and GPT-NeoX run attention and MLP side by side: no residual enters the MLP's norm.
# Mixtral's experts are no single matrix.
CUTS = dict.fromkeys(TOY_KINDS, ALL) | {
    "gptj": ["matrix", "layer"],
    "gpt_neox": ["matrix", "layer"],
    "mixtral": ["mlp", "layer"],
}


def session(kind, layer=2, template=None, model=None, **changes):
    hparams = toy_hparams(
        layers=[layer], rewrite_module_tmp=template or DOWN_PROJECTION[kind], **changes
    )
    model = model or toy_model(kind)
    return EditSession(model, toy_tokenizer(), toy_requests(10), hparams, progress=False)


@torch.no_grad()
def takes_fewer_positions(model):
    """Whether the model goes on with what its last layer gives for the first position alone.

    GPT-2 does not, nor GPT-J before transformers 5.24: they give the final hidden states the shape
    of the input.
    """

    def first_alone(module, args, output):
        hidden, *others = output if isinstance(output, tuple) else (output,)
        return (hidden[:, :1], *others) if others else hidden[:, :1]

    base = getattr(model, model.base_model_prefix)
    layers = next(m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS)
    handle = layers[-1].register_forward_hook(first_alone)
    try:
        return model(torch.tensor([[1, 2, 3]]), use_cache=False).logits.shape[1] == 1
    except RuntimeError as error:
        if "shape '[-1, 3, " not in str(error):
            raise
        return False
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("kind", TOY_KINDS)
def test_each_architecture_has_its_cuts_and_each_gives_the_plain_losses(kind, layer):
    model = toy_model(kind)
    has_tail = takes_fewer_positions(model)
    assert has_tail or kind in ("gpt2", "gptj")
    with torch.no_grad():
        expected = [naive_edit_loss(model, toy_tokenizer(), r) for r in toy_requests(10)]
    for cut in CUTS[kind]:
        with session(kind, layer, model=model, prefix_cut=cut) as made:
            assert [found.kind for found in made.shortcuts.cuts] == CUTS[kind]
            assert (made.shortcuts.tail is not None) == has_tail
            assert made.shortcuts.head is not None
            runner = made._runner
            assert runner.prefix.cut.kind == cut
            with runner.running(), torch.no_grad():
                losses = runner.edit_losses(np.arange(10))
        assert losses.tolist() == pytest.approx([float(loss) for loss in expected], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("template", "cuts"),
    [
        ("model.layers.{}.mlp.up_proj", ["mlp", "layer"]),
        ("model.layers.{}.mlp", ["mlp", "layer"]),
        ("model.layers.{}.self_attn.o_proj", ["layer"]),
        ("model.layers.{}", ["layer"]),
    ],
)
def test_the_place_decides_what_can_be_left_out(template, cuts):
    with session("llama", template=template) as made:
        assert [cut.kind for cut in made.shortcuts.cuts] == cuts


@pytest.mark.parametrize("cut", ALL)
def test_what_is_frozen_does_not_run_again(cut):
    model = toy_model("llama")
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with session("llama", model=model, prefix_cut=cut) as made, made._runner.running():
        calls.clear()
        made._runner.edit_losses(np.arange(10))
    inside = {name.removeprefix("model.layers.2.") for name in calls if ".layers.2." in name}
    assert not any(".layers.0" in name or ".layers.1" in name for name in calls)
    assert "lm_head" not in calls
    expected = {
        "matrix": {"mlp.down_proj"},
        "mlp": {"post_attention_layernorm", "mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn",
                "mlp.down_proj"},
    }  # fmt: skip
    assert "self_attn.q_proj" in inside if cut == "layer" else inside == expected[cut]


def test_the_last_mlp_runs_at_scored_positions_alone():
    model, rows = toy_model("llama"), []
    model.model.layers[3].mlp.register_forward_hook(lambda m, args, o: rows.append(args[0].shape))
    with session("llama", model=model) as made, made._runner.running():
        rows.clear()
        made._runner.edit_losses(np.arange(10))
        scored = len(made._runner.prepare(np.arange(10)).rows.scored)
    assert rows == [(1, scored, 32)]


def test_gradients_and_updates_do_not_depend_on_the_cut():
    results = [
        edit_model(
            toy_model("llama"), toy_tokenizer(), toy_requests(10), toy_hparams(prefix_cut=cut),
            progress=False,
        )
        for cut in ALL
    ]  # fmt: skip
    [name] = results[0].new
    change = results[0].new[name] - results[0].original[name]
    for other in results[1:]:
        assert other.step_losses == pytest.approx(results[0].step_losses, abs=TOLERANCE)
        assert float((other.new[name] - results[0].new[name]).norm() / change.norm()) < 1e-5


def test_a_cut_that_the_place_does_not_have_is_said(caplog):
    template = "model.layers.{}.self_attn.o_proj"
    with session("llama", template=template, prefix_cut="matrix") as made:
        assert made._runner.prefix.cut.kind == "layer"
    assert "`prefix_cut=matrix` does not suit this model and place" in caplog.text


def test_a_layer_that_scales_its_residual_is_cut_where_it_is_right(caplog):
    """What the anatomy suggests is not taken for granted."""
    caplog.set_level(logging.WARNING)
    model = toy_model("llama")
    layer = model.model.layers[2]

    class Scaled(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return 0.5 * super().forward(hidden_states, **kwargs)

    layer.__class__ = Scaled
    with session("llama", model=model) as made:
        assert [cut.kind for cut in made.shortcuts.cuts] == ["layer"]


def test_stand_ins_pass_on_whatever_a_model_asks_of_a_layer():
    """Models choose what they give a layer by attributes with names of their own."""
    model = toy_model("llama")
    for i, layer in enumerate(model.model.layers):
        layer.kind_of_block = f"kind {i}"
    asked = []

    def ask(*_):
        layers = model.model.layers
        asked.append([(layer.kind_of_block, layer.mlp.down_proj.in_features) for layer in layers])

    model.model.register_forward_pre_hook(ask)
    with session("llama", layer=2, model=model) as made:
        assert [cut.kind for cut in made.shortcuts.cuts] == ALL
        with made._runner.running():
            asked.clear()
            made._runner.edit_losses(np.arange(10))
            names = [name for name, _ in model.named_parameters()]
            assert not any("layers.0." in name for name in names)
            with pytest.raises(AttributeError, match="no_such_thing"):
                _ = model.model.layers[0].no_such_thing
    assert asked == [[(f"kind {i}", 64) for i in range(N_LAYERS)]]


def test_tracing_writes_calls_down_in_order_and_leaves_nothing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.second = nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)

        def forward(self, hidden_states):
            return hidden_states + self.second(self.drop(self.first(hidden_states)))

    block = Block().eval()
    with tracing(block) as trace:
        block(torch.ones(1, 2, 4))
    assert [call.name for call in trace.calls] == ["first", "second"]
    first, second = trace.calls
    assert second.given[0] is first.result  # dropout is off
    assert trace.way_out(first) == [block.second]
    assert trace.way_out(second) == []
    assert trace.producer(second.given[0]) is first
    assert trace.n_returned == 0
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in block.modules()]
    assert not any(hooks)
