"""The places of a model: which there are, and that each selects what its name says."""

import pytest
import torch
from helpers.toys import N_LAYERS, TOY_KINDS, toy_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from locft_easyedit.errors import ModelError
from locft_easyedit.modeling.locations import (
    EXPERT,
    MODULES,
    Location,
    find_locations,
    select_locations,
)
from locft_easyedit.modeling.places import select_place

SEPARATE = ["q", "k", "v", "o", "gate", "up", "down", "mlp", "layer"]
MODULES_OF = {
    "llama": SEPARATE,
    "mistral": SEPARATE,
    "qwen2": SEPARATE,
    "qwen3": SEPARATE,
    "gemma2": SEPARATE,
    "gemma3": SEPARATE,
    "gpt2": ["qkv", "o", "up", "down", "mlp", "layer"],
    "gptj": ["q", "k", "v", "o", "up", "down", "mlp", "layer"],
    "phi3": ["qkv", "o", "gate_up", "down", "mlp", "layer"],
    "gpt_neox": ["qkv", "o", "up", "down", "mlp", "layer"],
    "mixtral": ["q", "k", "v", "o", "gate_up", "down", "mlp", "layer"],
    "qwen2_moe": [
        *("q", "k", "v", "o", "gate_up", "down"),
        *("shared_gate", "shared_up", "shared_down", "mlp", "layer"),
    ],
}
KINDS = (*TOY_KINDS, "qwen2_moe")
# The last parts of a name that each module may have; written out apart from the code's own table.
LAST_NAMES = {
    "q": {"q_proj"},
    "k": {"k_proj"},
    "v": {"v_proj"},
    "qkv": {"c_attn", "query_key_value", "qkv_proj"},
    "o": {"o_proj", "c_proj", "out_proj", "dense"},
    "gate": {"gate_proj"},
    "up": {"up_proj", "c_fc", "fc_in", "fc1", "dense_h_to_4h"},
    "gate_up": {"gate_up_proj"},
    "down": {"down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h"},
    "shared_gate": {"gate_proj"},
    "shared_up": {"up_proj"},
    "shared_down": {"down_proj"},
}


def names_at(model, location):
    return list(select_place(model, [location.layer], location.templates).parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_its_modules_in_every_layer(kind):
    found = find_locations(toy_model(kind))
    assert [(p.layer, p.module) for p in found] == [
        (layer, module) for layer in range(N_LAYERS) for module in MODULES_OF[kind]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_templates_select_what_the_name_says(kind):
    model = toy_model(kind)
    parameters = dict(model.named_parameters())
    in_layer = {}
    for location in find_locations(model):
        names = names_at(model, location)
        assert names
        assert all(f".{location.layer}." in name for name in names)
        if location.module in LAST_NAMES:
            assert len(names) == 1
            assert (
                set(names[0].removesuffix(".weight").split(".")[-1:]) <= LAST_NAMES[location.module]
            )
            assert parameters[names[0]].ndim > 1
            attention = any("attn" in part or "attention" in part for part in names[0].split("."))
            assert attention == (location.module in ("q", "k", "v", "qkv", "o"))
            assert ("shared" in names[0]) == location.module.startswith("shared_")
        in_layer.setdefault(location.layer, {})[location.module] = set(names)
    for layer, modules in in_layer.items():
        own = {name for name in parameters if f".{layer}." in name}
        assert modules["layer"] == own
        parts = {m: names for m, names in modules.items() if m not in ("mlp", "layer")}
        # No matrix is two modules, and the MLP's are within the MLP.
        assert sum(map(len, parts.values())) == len(set().union(*parts.values()))
        for module in parts.keys() - {"q", "k", "v", "qkv", "o"}:
            assert parts[module] <= modules["mlp"] < modules["layer"]


def test_a_model_without_weights_has_the_same_places():
    with torch.device("meta"):
        empty = toy_model("llama")
    assert find_locations(empty) == find_locations(toy_model("llama"))


def test_matrices_that_are_the_layers_own_children_make_no_mlp():
    config = OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    found = find_locations(OPTForCausalLM(config))
    modules = ["q", "k", "v", "o", "up", "down", "layer"]
    assert [p.module for p in found if p.layer == 1] == modules


def test_a_model_without_layers_is_refused():
    class Bare(nn.Module):
        config = None

    with pytest.raises(ModelError, match=r"Bare has no list of layers.*by hand"):
        find_locations(Bare())


def test_one_template_is_a_text_in_a_yaml_and_several_are_a_list():
    assert Location(1, "q", ("a.{}",)).rewrite_module_tmp == "a.{}"
    assert Location(1, "q", ("a.{}", "b.{}")).rewrite_module_tmp == ["a.{}", "b.{}"]


def test_places_are_selected_by_layer_and_by_module():
    every = find_locations(toy_model("llama"))
    assert select_locations(every) == every
    assert len(select_locations(every, layers=[1])) == len(SEPARATE)
    downs = select_locations(every, modules=["down"])
    assert [p.layer for p in downs] == list(range(N_LAYERS))
    [one] = select_locations(every, layers=[2], modules=["down"])
    assert (str(one), one.rewrite_module_tmp) == (
        "layer 2 down",
        "model.layers.{}.mlp.down_proj.weight",
    )


def test_every_module_has_a_name_of_its_own():
    assert len(set(MODULES)) == len(MODULES)
    # None of the toys joins the gate and the up projection of a shared expert, and single experts
    # are for a backward pass to find.
    elsewhere = {"shared_gate_up", *EXPERT.values()}
    assert set().union(*MODULES_OF.values()) == set(MODULES) - elsewhere
