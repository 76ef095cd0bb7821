"""Models that cannot be edited, or not here: one message before anything is trained."""

import logging

import pytest
import torch
from helpers.toys import N_LAYERS, toy_hparams, toy_model, toy_requests, toy_tokenizer
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from locft_easyedit.api import edit_model
from locft_easyedit.errors import ModelError, PlaceError
from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.modeling.places import find_layers


def edit(model, **changes):
    hparams = toy_hparams(num_steps=1, **changes)
    return edit_model(model, toy_tokenizer(), toy_requests(4), hparams, progress=False)


def test_a_tokenizer_with_more_tokens_than_the_model():
    model = toy_model(vocab_size=200)
    for run in (edit, lambda m: Evaluation(m, toy_tokenizer(), toy_requests(4))):
        with pytest.raises(ModelError, match="beyond the model's embedding, which has 200 rows"):
            run(model)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = toy_model()
    with pytest.raises(ModelError, match=r"`model.embed_tokens.weight` was made in inference mode"):
        edit(model)


class WithTower(nn.Module):
    """A tower of as many layers as the language model has, which text does not run through."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(N_LAYERS))


def test_the_layers_of_another_tower():
    model = toy_model()
    model.vision = WithTower()
    assert find_layers(model).path == "model.layers"
    with pytest.raises(PlaceError, match=r"do not depend on `vision.layers.2.weight`"):
        edit(model, rewrite_module_tmp="vision.layers.{}.weight")
    edit(model)


@pytest.mark.parametrize(("is_decoder", "seed"), [(False, 0), (False, 6), (True, 0)])
def test_models_that_read_both_ways_are_refused(is_decoder, seed):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(toy_tokenizer()),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
        is_decoder=is_decoder,
    )
    model = BertLMHeadModel(config).eval()
    place = {"rewrite_module_tmp": "bert.encoder.layer.{}.output.dense.weight"}
    if is_decoder:
        edit(model, **place)
        return
    with pytest.raises(ModelError, match="BertLMHeadModel is no causal language model"):
        edit(model, **place)


@pytest.mark.parametrize(("ends", "told"), [([2, 7], False), (2, False), (7, True), (None, True)])
def test_generate_that_would_run_on(ends, told, caplog):
    caplog.set_level(logging.WARNING)
    model = toy_model()
    model.generation_config.eos_token_id = ends
    edit(model)
    assert ("its own `generate` will run on" in caplog.text) == told
