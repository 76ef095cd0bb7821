"""The frozen prefix of models whose layers are given, return or share more than hidden states."""

import numpy as np
import pytest
from helpers.scripts import script_module
from helpers.toys import REPOSITORY, toy_hparams

from locft_easyedit.data.tokenization import TokenizedTexts
from locft_easyedit.modeling import forward
from locft_easyedit.modeling.forward import give_masks
from locft_easyedit.prefix.frozen_prefix import Layout
from locft_easyedit.prefix.probes import Probes
from locft_easyedit.prefix.shortcuts import can_pack
from locft_easyedit.training.session import EditSession

model_types = script_module(REPOSITORY / "benchmarks" / "checks" / "model_types.py")

# float32 rounding, relative to the whole change; Adam scales up what is small.
TOLERANCE = 2e-3

KINDS = {
    "ctrl": ("layer", 2),  # writes into the embeddings that it is given
    "rwkv": ("layer", 2),  # a layer returns its state as well
    "xlstm": ("layer", 2),
    "bamba": ("matrix", 2),
    "gemma4_text": ("layer", 1),  # layers have inputs of their own; some take keys of others
    "gemma3n_text": ("layer", 1),  # the same, and streams come before rows
    "deepseek_v4": ("layer", 2),  # several streams, and experts chosen by token
    "hy_v4": ("layer", 1),  # streams, and layers that attend to what one below has chosen
    "zamba": ("mlp", 2),  # embeddings enter layers above
}


def session_of(model_type, **changes):
    model = model_types.tiny_model(model_type)
    place = model_types.place_of(model)
    hparams = toy_hparams(
        layers=[place.layer], rewrite_module_tmp=place.rewrite_module_tmp, num_steps=2, **changes
    )
    tokenizer = model_types.word_tokenizer(model_types.WORDS)
    requests = model_types.random_requests(4, model_types.WORDS)
    return EditSession(model, tokenizer, requests, hparams, progress=False)


@pytest.mark.parametrize("model_type", KINDS)
def test_training_is_as_without_the_prefix(model_type):
    with session_of(model_type, health_check=False) as session:
        first = session.shortcuts.cuts[0]
        assert (first.kind, first.first_layer) == KINDS[model_type]
        with_prefix = session.train_()
    with session_of(model_type, health_check=False, frozen_prefix=False) as session:
        without = session.train_()
    assert with_prefix.step_losses == pytest.approx(without.step_losses, rel=1e-4)
    for name, new in without.new.items():
        change = new - without.original[name]
        assert float((with_prefix.new[name] - new).norm() / change.norm()) < TOLERANCE


def test_a_model_that_takes_a_row_for_one_text_is_given_masks():
    """GPT-OSS makes its masks without positions; texts here are longer than its window."""
    trained = {}
    for packing in (True, False):
        with session_of("gpt_oss", health_check=False, packing=packing) as session:
            texts = session.training_texts.texts
            assert session.model.config.sliding_window < texts.lengths.max()
            assert session.shortcuts.packed is packing
            rows = Layout(texts, 64, packing).rows(session.model, np.arange(len(texts)))
            assert isinstance(rows.attention_mask, dict) is packing  # by type of layer
            trained[packing] = session.train_()
    assert trained[True].step_losses == pytest.approx(trained[False].step_losses, rel=1e-4)
    for name, new in trained[False].new.items():
        change = new - trained[False].original[name]
        assert float((trained[True].new[name] - new).norm() / change.norm()) < TOLERANCE


def test_masks_are_given_only_where_they_make_packed_rows_right():
    model = model_types.tiny_model("gpt_oss")
    tokenizer = model_types.word_tokenizer(model_types.WORDS)
    prompts = [request["prompt"] for request in model_types.random_requests(4, model_types.WORDS)]
    texts = TokenizedTexts.from_lists([tokenizer(p)["input_ids"] for p in prompts], [1] * 4)
    assert can_pack(model, texts)
    give_masks(model, False)
    assert Probes(model, texts)._error(Probes(model, texts).runner(packed=True)) > 1e-3
    recurrent = model_types.tiny_model("mamba")
    assert not can_pack(recurrent, texts)
    assert recurrent not in forward._given_masks


def test_layers_on_a_disk_are_not_asked_for_more_than_states():
    """Neither their embedding nor a layer below the first trained one is there in training."""
    with session_of("gemma4_text", health_check=False) as session:
        probes = Probes(session.model, session.training_texts.texts)
        assert probes.cuts(session.place, packed=False)[0]
        cuts, why_not = probes.cuts(session.place, packed=False, on_disk=True)
    assert not cuts
    assert why_not
