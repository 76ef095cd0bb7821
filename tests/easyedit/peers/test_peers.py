"""Hyper-parameters of EasyEdit's methods: the published values, adapted by rules to any model."""

import contextlib
import dataclasses
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from helpers.toys import (
    DOWN_PROJECTION,
    N_LAYERS,
    TOY_KINDS,
    toy_model,
    toy_requests,
    toy_tokenizer,
)
from torch import nn

from locft_easyedit.easyedit.cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from locft_easyedit.easyedit.importing import load_easyedit
from locft_easyedit.easyedit.peers.corpus import Corpus
from locft_easyedit.easyedit.peers.covariance import stats_name, write_key_covariances
from locft_easyedit.easyedit.peers.modules import easyedit_name
from locft_easyedit.easyedit.peers.peer_hparams import (
    PEERS,
    PeerError,
    name_for_easyedit_,
    padding_side,
    peer_hparams,
)
from locft_easyedit.easyedit.peers.published import (
    DEFAULTS,
    MODULE_KEYS,
    VALUES,
    number_if_it_is_one,
    scaled_layers,
)
from locft_easyedit.easyedit.peers.yamls import (
    MethodUnavailableError,
    check_method,
    known_method,
)
from locft_easyedit.errors import HyperParamsError, LocFTError

CHECKOUT = os.environ.get("EASYEDIT_HOME")
ONE_MATRIX = ("ROME", "MEMIT", "AlphaEdit")
DENSE = tuple(kind for kind in TOY_KINDS if kind != "mixtral")


def without_weights(kind="llama", **config):
    with torch.device("meta"):
        return toy_model(kind, **config)


def peer(method, model=None, **changes):
    values = {
        "device": "cpu",
        "n_edits": 7,
        "stats_dir": "the/stats",
        "corpus_name": "the-corpus",
        "n_samples": 12,
    }
    return peer_hparams(method, model or without_weights(), **(values | changes))


def refusal(method, model=None, title=None, **changes):
    """Returns the lines of the one error, without the indentation."""
    with pytest.raises(PeerError, match=title or f"{method} cannot be set up for") as caught:
        peer(method, model, **changes)
    return [line.removeprefix("  - ") for line in str(caught.value).split("\n")[1:]]


def hparams_class(method):
    package = importlib.import_module("easyeditor")
    return getattr(package, f"{method}HyperParams", None)


def fields(cls):
    return [field.name for field in dataclasses.fields(cls)]


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("nltk", reason="EasyEdit needs nltk: pip install locft_easyedit[easyedit]")
    return load_easyedit()


# The table


@pytest.mark.skipif(not CHECKOUT, reason="set EASYEDIT_HOME to a clone of EasyEdit")
@pytest.mark.parametrize("method", PEERS)
def test_published_values(method):
    source = "llama-7b.yaml" if method == "MEMIT" else "llama3-8b.yaml"
    text = (Path(CHECKOUT) / "hparams" / method / source).read_text(encoding="utf-8")
    published = {key: number_if_it_is_one(v) for key, v in yaml.safe_load(text).items()}
    assert {key: published[key] for key in VALUES[method]} == VALUES[method]
    assert all(type(published[k]) is bool for k, v in VALUES[method].items() if type(v) is bool)
    left = set(published) - set(VALUES[method])
    assert left <= {"alg_name", "model_name", "device", *MODULE_KEYS}


@pytest.mark.parametrize("method", PEERS)
def test_keys_are_those_of_the_class(loaded, method):
    if loaded.is_release:
        pytest.skip("these are the current source's; set EASYEDIT_HOME")
    hparams = peer(method)
    assert sorted(hparams.values) == sorted(fields(hparams_class(method)))
    assert hparams.values_for(fields(hparams_class(method))) == hparams.values
    assert hparams_class(method)(**hparams.values).alg_name == method


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("FT", {"objective_optimization": "prompt_last"}),
        ("LoRA", {"lora_type": "adalora"}),
        ("ROME", {}),
        ("MEMIT", {}),
    ],
)
@pytest.mark.parametrize("kind", DENSE)
def test_every_class_accepts_the_values(loaded, method, overrides, kind):
    hparams = peer(method, without_weights(kind), overrides=overrides)
    cls = hparams_class(method)
    made = cls(**hparams.values_for(fields(cls)))
    assert {name: getattr(made, name) for name in fields(cls)}.items() <= hparams.values.items()


def test_keys_that_a_class_lacks():
    hparams = peer("FT")
    known = set(hparams.values) - {"model_parallel", "objective_optimization", "lr"}
    with pytest.raises(PeerError, match="EASYEDIT_HOME") as caught:
        hparams.values_for(known)
    lines = str(caught.value).split("\n")[1:]
    assert lines == [
        "  - `lr=0.0005`: there is no such key. Remove it.",
        "  - `objective_optimization='target_new'`: it is always 'prompt_last'. Set it to that.",
    ]
    hparams = peer("FT", overrides={"objective_optimization": "prompt_last"})
    assert set(hparams.values_for(known | {"lr"})) == known | {"lr"}
    with pytest.raises(PeerError, match="`model_parallel=True`: it is always False"):
        peer("ROME", overrides={"model_parallel": True}).values_for(known)


# The rules


@pytest.mark.parametrize(
    ("n_layers", "ft", "rome", "memit"),
    [
        (1, [0], [0], [0]),
        (2, [1], [0], [0, 1]),
        (4, [3], [1], [0, 1]),
        (12, [8], [2], [1, 2, 3]),
        (24, [16], [4], [3, 4, 5, 6]),
        (28, [18], [4], [3, 4, 5, 6, 7]),
        (30, [20], [5], [4, 5, 6, 7, 8]),
        (32, [21], [5], [4, 5, 6, 7, 8]),
        (80, [53], [13], [16, 17, 18, 19, 20]),
    ],
)
def test_layers_by_depth(n_layers, ft, rome, memit):
    model = without_weights("llama", num_hidden_layers=n_layers)
    assert peer("FT", model).values["layers"] == ft
    assert peer("ROME", model).values["layers"] == rome
    for method in ("MEMIT", "AlphaEdit"):
        assert peer(method, model).values["layers"] == memit
        assert peer(method, model).values["v_loss_layer"] == n_layers - 1
    assert peer("LoRA", model).values["layers"] == []


@pytest.mark.parametrize("kind", DENSE)
def test_module_names(kind):
    model = without_weights(kind)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    assert peer("FT", model).values["rewrite_module_tmp"] == DOWN_PROJECTION[kind]
    for method in ONE_MATRIX:
        values = peer(method, model).values
        assert f"{values['rewrite_module_tmp']}.weight" == DOWN_PROJECTION[kind]
        for layer in range(4):
            assert f"{values['rewrite_module_tmp'].format(layer)}.weight" in parameters
            named = [modules[values[k].format(layer)] for k in MODULE_KEYS if k.endswith("_tmp")]
            matrix, whole, mlp, attention = named
            assert whole is model.base_model.get_submodule(f"{named_list(model)}.{layer}")
            assert matrix in set(mlp.modules()) <= set(whole.modules())
            assert "Attention" in type(attention).__name__
        assert "Norm" in type(modules[values["ln_f_module"]]).__name__
        assert "." in values["ln_f_module"]
        assert modules[values["lm_head_module"]] is model.get_output_embeddings()


def named_list(model):
    return "h" if hasattr(model, "transformer") else "layers"


@pytest.mark.parametrize(
    ("kind", "embedding"), [("llama", "model.embed_tokens"), ("gpt2", "transformer.wte")]
)
@pytest.mark.parametrize("tied", [True, False])
def test_output_embedding_goes_by_a_name_that_parameters_have(kind, embedding, tied):
    for make in (without_weights, toy_model):
        model = make(kind, tie_word_embeddings=tied)
        head = peer("MEMIT", model).values["lm_head_module"]
        assert head == (embedding if tied else "lm_head")
        assert f"{head}.weight" in dict(model.named_parameters())


TARGETS = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"], "gpt_neox": ["query_key_value"]}


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_lora_targets(kind):
    model = without_weights(kind)
    hparams = peer("LoRA", model)
    assert hparams.values["target_modules"] == TARGETS.get(kind, ["q_proj", "v_proj"])
    # AdaLoRA, the published type, cannot be made without a number of steps.
    assert hparams.values["lora_type"] == "lora"
    ends = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    assert all(ends.count(name) == 4 for name in hparams.values["target_modules"])


def test_mixture_of_experts():
    model = without_weights("mixtral")
    for method in ONE_MATRIX:
        (line,) = refusal(method, model)
        assert line.startswith("an output projection of the MLP in layer ")
        assert line.endswith("compare with FT or LoRA.")
        assert "mlp.experts.down_proj" in line
    assert peer("FT", model).values["rewrite_module_tmp"] == DOWN_PROJECTION["mixtral"]
    assert peer("LoRA", model).one_by_one


@pytest.mark.parametrize("n_edits", [1, 7, 100, 101, 5000])
def test_batches(n_edits):
    for method in ("MEMIT", "AlphaEdit"):
        hparams = peer(method, n_edits=n_edits)
        assert hparams.values["batch_size"] == min(n_edits, 100)
        assert not hparams.one_by_one
    for method in ("FT", "LoRA", "ROME"):
        hparams = peer(method, n_edits=n_edits)
        assert hparams.one_by_one
        assert hparams.values.get("batch_size", 1) == 1


def test_values_of_the_run():
    for method in ONE_MATRIX:
        values = peer(method).values
        files = {"stats_dir": "the/stats", "mom2_dataset": "the-corpus", "mom2_n_samples": 12}
        assert files.items() <= values.items()
        assert values["mom2_dtype"] == "float32"
    assert peer("AlphaEdit").values["P_loc"] == "null_space_project.pt"
    assert peer("ROME").values["fp16"] is False
    assert peer("FT").values["objective_optimization"] == "target_new"
    assert peer("ROME").covariance_modules == []
    assert peer("FT").covariance_modules == []
    down = "model.layers.{}.mlp.down_proj"
    assert peer("AlphaEdit").covariance_modules == [down.format(0), down.format(1)]
    adjusted = peer("ROME", overrides={"mom2_adjustment": True, "layers": [2]})
    assert adjusted.covariance_modules == [down.format(2)]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        ("cuda", 0),
        ("cuda:3", 3),
        (torch.device("cuda", 1), 1),
        (2, 2),
        ("2", 2),
    ],
)
def test_device(given, value):
    for method in PEERS:
        assert peer(method, device=given).values["device"] == value


@pytest.mark.parametrize("method", PEERS)
def test_a_note_for_each_value_that_a_rule_set(method):
    hparams = peer(method, without_weights("gpt2"))
    base = DEFAULTS | VALUES[method]
    silent = {"alg_name", "device"}
    ruled = {k for k, v in hparams.values.items() if k not in base or base[k] != v} - silent
    noted = [note.partition("=")[0] for note in hparams.notes]
    assert ruled <= set(noted)
    assert len(set(noted)) == len(noted)
    for note in hparams.notes:
        key, _, rest = note.partition("=")
        shown = repr(hparams.values[key])
        assert rest.startswith(f"{shown}: ")
        assert len(rest) > len(shown) + 8
    # What the user sets is nobody's rule.
    given = peer(method, overrides={"layers": [2], "model_name": "llama"})
    assert not {"layers", "model_name"} & {note.partition("=")[0] for note in given.notes}


def test_what_does_not_fit_the_model_is_said():
    softcapped = without_weights("gemma2", final_logit_softcapping=30.0)
    plain = without_weights("gemma2", final_logit_softcapping=None)
    for method, expected in (("FT", 0), ("LoRA", 0), ("ROME", 1), ("MEMIT", 2), ("AlphaEdit", 2)):
        said = [n for n in peer(method, softcapped).notes if n.startswith(f"{method} ")]
        assert len(said) == expected
        said = [n for n in peer(method, plain).notes if n.startswith(f"{method} ")]
        assert len(said) == min(expected, 1)
    assert not [n for n in peer("MEMIT").notes if n.startswith("MEMIT ")]


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_name_that_chooses_easyedits_path(kind):
    model = without_weights(kind)
    assert easyedit_name(model) == ("gpt2-xl" if kind == "gpt2" else "llama")
    if kind != "mixtral":
        # AlphaEdit: keys are as wide as shape[0] for gpt2-xl, as shape[1] for llama.
        weight = dict(model.named_parameters())[DOWN_PROJECTION[kind].format(1)]
        wide, narrow = max(weight.shape), min(weight.shape)
        assert weight.shape == ((wide, narrow) if kind == "gpt2" else (narrow, wide))


def test_names_on_the_model():
    model = toy_model("gpt2")
    name_for_easyedit_(model, "some-model")
    assert model.config._name_or_path == "some-model"
    assert "llama" in model.name_or_path


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "gptj"])
def test_context_templates_follow_from_their_text(loaded, kind):
    """Each token that EasyEdit samples is one of the five likeliest after all before it."""
    from easyeditor.util.generate import generate_fast

    model, tokenizer, rows = toy_model(kind), toy_tokenizer(pad_is_eos=True), []
    tokenizer.padding_side = padding_side("ROME")
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: rows.append(ids) or decode(ids, **options)
    name_for_easyedit_(model, "toy")
    starts = ["The", "Therefore", "I"]
    generate_fast(model, tokenizer, starts, max_out_len=14)
    for start, ids in zip(starts, rows, strict=True):
        with torch.no_grad():
            likeliest = model(torch.tensor([ids])).logits[0].topk(5).indices.tolist()
        n = len(tokenizer(start)["input_ids"])
        assert len(ids) == 14
        assert all(ids[i] in likeliest[i - 1] for i in range(n, 14))


def test_padding_side():
    sides = {
        method: padding_side(method) for method in (*PEERS, "R-ROME", "EMMET", "GRACE", "PMET")
    }
    left = {method for method, side in sides.items() if side == "left"}
    assert left == {"FT", "LoRA", "GRACE"}
    assert set(sides.values()) == {"left", "right"}


# What the user sets


def test_overrides_win():
    overrides = {
        "layers": ["1", 2.0],
        "v_lr": "1e-1",
        "mom2_update_weight": 100,
        "v_num_grad_steps": "3",
        "batch_size": 5,
        "mom2_adjustment": True,
        "mom2_dataset": "mine",
        "fact_token": "last",
    }
    kept = dict(overrides)
    values = peer("MEMIT", overrides=overrides).values
    expected = overrides | {"layers": [1, 2], "v_lr": 0.1, "v_num_grad_steps": 3}
    assert {key: values[key] for key in overrides} == expected
    assert type(values["mom2_update_weight"]) is float
    assert all(type(layer) is int for layer in values["layers"])
    assert overrides == kept
    assert peer("FT", overrides={"norm_constraint": "5e-4"}).values["norm_constraint"] == 5e-4
    assert peer("FT", overrides={"norm_constraint": False}).values["norm_constraint"] is False
    assert peer("ROME", overrides={"device": 1}).values["device"] == 1


@pytest.mark.parametrize(
    ("method", "key", "value", "rule"),
    [
        ("FT", "lr", "fast", "a number"),
        ("FT", "lr", True, "a number"),
        ("FT", "lr", [1.0], "a number"),
        ("FT", "lr", float("nan"), "a number"),
        ("FT", "num_steps", 2.5, "a whole number"),
        ("FT", "num_steps", float("inf"), "a whole number"),
        ("FT", "norm_constraint", True, "a number, or false"),
        ("FT", "norm_constraint", "no", "a number, or false"),
        ("FT", "layers", 3, "a list of whole numbers, for example [5]"),
        ("FT", "layers", ["x"], "a list of whole numbers, for example [5]"),
        ("FT", "model_parallel", "yes", "true or false"),
        ("FT", "rewrite_module_tmp", 3, "a text"),
        ("FT", "device", None, "cpu, or the number of a GPU"),
        ("LoRA", "target_modules", "q_proj", "a list of names, for example [q_proj, v_proj]"),
        ("LoRA", "target_modules", [1], "a list of names, for example [q_proj, v_proj]"),
        (
            "ROME",
            "context_template_length_params",
            [5, 10],
            "a list of pairs, for example [[5, 10], [10, 10]]",
        ),
    ],
)
def test_ill_typed(method, key, value, rule):
    lines = refusal(method, title=f"Values for {method}:", overrides={key: value})
    assert lines[0] == f"`{key}={value!r}` must be {rule}."
    assert len(lines) == 2


def test_all_problems_in_one_error():
    overrides = {"lr": "x", "learning_rate": 1, "layers": 2, "alg_name": "ROME", "num_steps": 3}
    lines = refusal("FT", title="Values for FT:", overrides=overrides)
    assert lines[:-1] == [
        "`lr='x'` must be a number.",
        "`learning_rate` is not a key of FT. Remove it.",
        "`layers=2` must be a list of whole numbers, for example [5].",
        "`alg_name='ROME'` is another method. Remove it.",
    ]
    keys = lines[-1].removeprefix("The keys are: ").removesuffix(".").split(", ")
    assert sorted(keys) == sorted(peer("FT").values)


def test_many_problems_are_all_told():
    overrides = {f"key_{i}": i for i in range(30)}
    assert len(refusal("FT", title="Values for FT:", overrides=overrides)) == 31


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            {"layers": [1, 4], "v_loss_layer": 9},
            "Layers [4, 9] are out of range; LlamaForCausalLM has 4 (0 to 3). "
            "Choose `layers` and `v_loss_layer` among them.",
        ),
        ({"layers": []}, "`layers=[]` must name at least one layer, and none twice."),
        ({"layers": [1, 1]}, "`layers=[1, 1]` must name at least one layer, and none twice."),
        (
            {"rewrite_module_tmp": "model.layers.{}.mlp.out", "layers": [2]},
            "`rewrite_module_tmp='model.layers.{}.mlp.out'`: there is no module "
            "`model.layers.2.mlp.out`. Correct it.",
        ),
        (
            {"ln_f_module": "model.ln"},
            "`ln_f_module='model.ln'`: there is no module `model.ln`. Correct it.",
        ),
        (
            {"mom2_dtype": "float64"},
            "`mom2_dtype` must be float32, as key covariances are written.",
        ),
    ],
)
def test_values_that_do_not_fit_the_model(overrides, line):
    assert refusal("MEMIT", overrides=overrides) == [line]


def test_ft_takes_every_parameter_with_the_name_in_its_name():
    model = without_weights("llama", num_hidden_layers=24)
    overrides = {"layers": [2], "rewrite_module_tmp": "model.layers.{}"}
    assert refusal("FT", model, overrides=overrides) == [
        "`rewrite_module_tmp='model.layers.{}'` for layer 2 is also in "
        "`model.layers.20.self_attn.q_proj.weight`. End it with a dot."
    ]
    overrides["rewrite_module_tmp"] = "model.layers.{}."
    assert peer("FT", model, overrides=overrides).values["layers"] == [2]
    overrides["rewrite_module_tmp"] = "model.layers.{}.nothing"
    (line,) = refusal("FT", model, overrides=overrides)
    assert line.endswith("no parameter has `model.layers.2.nothing` in its name. Correct it.")


def test_names_that_nobody_knows():
    model = without_weights()
    model.model.last_norm = model.model.norm
    del model.model.norm
    for layer in model.model.layers:
        layer.mlp.out = layer.mlp.down_proj
        del layer.mlp.down_proj
    first, second = refusal("ROME", model)
    assert first.startswith("an output projection of the MLP in layer 1: not found among self_")
    assert first.endswith("Name it as `rewrite_module_tmp`.")
    assert second == (
        "the final norm: not found among embed_tokens, layers, rotary_emb, last_norm. "
        "Name it as `ln_f_module`."
    )
    named = {
        "rewrite_module_tmp": "model.layers.{}.mlp.out",
        "mlp_module_tmp": "model.layers.{}.mlp",
        "ln_f_module": "model.last_norm",
    }
    assert named.items() <= peer("ROME", model, overrides=named).values.items()


def test_attention_that_nobody_knows():
    model = without_weights()
    for layer in model.model.layers:
        layer.self_attn.q = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    (line,) = refusal("LoRA", model)
    assert line.startswith("query and value projections: not found among self_attn, k_proj")
    assert line.endswith("Name them as `target_modules`.")
    assert peer("LoRA", model, overrides={"target_modules": ["q"]}).values["rank"] == 8


def test_model_without_layers():
    model = without_weights()
    model.model.layers = nn.ModuleList()
    with pytest.raises(PeerError, match="LlamaForCausalLM has no list of layers to edit"):
        peer("FT", model)


def test_results_do_not_share_the_table():
    hparams = peer("LoRA", overrides={"target_modules": ["k_proj"]})
    hparams.values["layers"].append(1)
    peer("ROME").values["context_template_length_params"].append([1, 1])
    assert VALUES["LoRA"]["layers"] == []
    assert VALUES["ROME"]["context_template_length_params"] == [[5, 10], [10, 10]]


# EasyEdit's own files


def write_yaml(folder, **values):
    path = folder / "peer.yaml"
    # As EasyEdit writes numbers: YAML takes them for texts.
    lines = [f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_start_from_a_file(tmp_path):
    file = write_yaml(
        tmp_path,
        alg_name="MEMIT",
        model_name="./hugging_cache/other",
        device=3,
        stats_dir="./data/stats",
        mom2_dataset="wikipedia",
        layers=[2, 3],
        v_lr="2e-1",
        v_num_grad_steps=9,
        batch_size=3,
        lm_head_module="model.embed_tokens",
    )
    hparams = peer("MEMIT", overrides={"hparams": str(file), "v_num_grad_steps": 4})
    expected = {
        "layers": [2, 3],
        "v_lr": 0.2,
        "v_num_grad_steps": 4,
        "batch_size": 3,
        "lm_head_module": "model.embed_tokens",
        # What the file leaves open is as without it:
        "v_loss_layer": 3,
        "clamp_norm_factor": 4.0,
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        # and this run's model and files go before the file's.
        "model_name": "llama",
        "device": "cpu",
        "stats_dir": "the/stats",
        "mom2_dataset": "the-corpus",
        "mom2_n_samples": 12,
    }
    assert expected.items() <= hparams.values.items()
    assert sorted(hparams.values) == sorted(peer("MEMIT").values)
    assert hparams.covariance_modules == [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]
    assert not any(note.startswith("layers=") for note in hparams.notes)


def test_file_with_problems(tmp_path):
    file = write_yaml(tmp_path, alg_name="FT", lr="abc", lrr=1)
    overrides = {"hparams": file, "lr": "x"}
    lines = refusal("FT", title="Values for FT:", overrides=overrides)
    assert lines[:3] == [
        "`lr='abc'` in the file must be a number.",
        "`lrr` in the file is not a key of FT. Remove it.",
        "`lr='x'` must be a number.",
    ]
    with pytest.raises(PeerError, match=r"`alg_name='FT'` in .*peer.yaml is another method"):
        peer("ROME", overrides={"hparams": file})
    with pytest.raises(HyperParamsError, match=r"nothing.yaml` is not a file"):
        peer("ROME", overrides={"hparams": tmp_path / "nothing"})


def test_another_method(tmp_path):
    file = write_yaml(
        tmp_path,
        alg_name="EMMET",
        model_name="./hugging_cache/llama",
        device=0,
        layers=[2, 3],
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        mom2_adjustment=True,
        mom2_dataset="wikipedia",
        batch_size=1,
        lr="1e-2",
    )
    hparams = peer("EMMET", overrides={"hparams": file, "own_key": [1]})
    assert hparams.values == {
        "alg_name": "EMMET",
        "model_name": "llama",
        "device": "cpu",
        "layers": [2, 3],
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "mom2_adjustment": True,
        "mom2_dataset": "the-corpus",
        "batch_size": 1,
        "lr": 0.01,
        "own_key": [1],
    }
    assert hparams.one_by_one
    assert hparams.covariance_modules == [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]
    batched = peer("EMMET", overrides={"hparams": file, "batch_size": 4, "mom2_dataset": "w"})
    assert not batched.one_by_one
    assert batched.values["mom2_dataset"] == "w"


GRACE_YAML = """
alg_name: GRACE
model_name: ./hugging_cache/llama
device: 1
inner_params: ["model.layers[27].mlp.down_proj.weight"]
edit_lr: 1.0
n_iter: 50
"""
EAMET_YAML = """
alg_name: EAMET
model_name: ./hugging_cache/qwen
device: 1
layers: [4, 5, 6, 7, 8]
v_loss_layer: 27
mom2_adjustment: true
mom2_update_weight: [1, 1, 1, 1, 1]
rewrite_module_tmp: model.layers.{}.mlp.down_proj
lm_head_module: lm_head
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What of a clone of EasyEdit its values are read from."""
    files = {
        "GRACE/llama-7b.yaml": GRACE_YAML,
        "EAMET/qwen2.5-7b.yaml": EAMET_YAML,
        "MELO/x.yaml": "",
    }
    for name, text in files.items():
        path = tmp_path / "clone" / "hparams" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "clone"))


def test_methods_without_a_table_begin_with_easyedits_yaml(clone):
    grace = peer("GRACE")
    assert grace.one_by_one
    assert grace.values["device"] == "cpu"
    n = N_LAYERS
    [place] = grace.values["inner_params"]
    assert place == f"model.layers[{scaled_layers([27], n)[0]}].mlp.down_proj.weight"
    assert grace.values["n_iter"] == 50
    eamet = peer("EAMET", n_edits=7)
    assert eamet.values["layers"] == scaled_layers([4, 5, 6, 7, 8], n, 28)
    assert eamet.values["v_loss_layer"] == n - 1
    assert len(eamet.values["mom2_update_weight"]) == len(eamet.values["layers"])
    assert eamet.values["batch_size"] == 7
    assert not eamet.one_by_one
    assert len(eamet.covariance_modules) == len(eamet.values["layers"])


def test_a_methods_name_in_any_case(clone):
    assert [known_method(name) for name in ("grace", "Eamet", "ft-m", "rect", "New")] == [
        *("GRACE", "EAMET", "FT", "RECT", "New")
    ]
    check_method("New")  # EasyEdit may have it
    with pytest.raises(LocFTError, match=r"no method `GRACES`. Did you mean `GRACE`\?"):
        check_method("GRACES")


def test_methods_that_cannot_be_run_tell_why(clone, monkeypatch):
    for name, why in (
        ("RECT", "RECT is not in EasyEdit"),
        ("IKE", "edits no model"),
        ("MELO", r"has no values for it.*peers\.MELO\.hparams=FILE"),
    ):
        with pytest.raises(MethodUnavailableError, match=why):
            peer(name)
    monkeypatch.delenv("EASYEDIT_HOME")
    with pytest.raises(MethodUnavailableError, match=r"GRACE: .*set EASYEDIT_HOME to the clone"):
        peer("GRACE")


# EasyEdit itself


@pytest.mark.parametrize(
    ("method", "kind"), [("FT", "llama"), ("ROME", "llama"), ("FT", "gpt2"), ("ROME", "gpt2")]
)
def test_easyedit_runs_with_them(loaded, tmp_path, monkeypatch, method, kind):
    monkeypatch.chdir(tmp_path)
    model, requests = toy_model(kind), toy_requests(2)
    tokenizer = toy_tokenizer(pad_is_eos=True)
    tokenizer.padding_side = padding_side(method)
    overrides = {"FT": {"num_steps": 2}, "ROME": {"mom2_adjustment": True, "v_num_grad_steps": 2}}
    if loaded.is_release and method == "FT":
        overrides["FT"]["objective_optimization"] = "prompt_last"
        tokenizer.unk_token = "<pad>"  # the release fails without one
    corpus = Corpus(f"prompts-{method}", "", [r["prompt"] for r in toy_requests(40)])
    hparams = peer_hparams(
        method,
        model,
        device=0 if loaded.is_release else "cpu",
        n_edits=2,
        stats_dir=tmp_path / "stats",
        corpus_name=stats_name(corpus, model),
        n_samples=40,
        overrides=overrides[method],
    )
    write_key_covariances(
        model,
        tokenizer,
        corpus,
        hparams.covariance_modules,
        stats_dir=tmp_path / "stats",
        model_id=f"toy-{kind}",
        progress=False,
    )
    assert len(hparams.covariance_modules) == (method == "ROME")
    name_for_easyedit_(model, f"toy-{kind}")
    cls = hparams_class(method)
    made = cls(**hparams.values_for(fields(cls)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with CudaAsCPU() if needs_cuda_as_cpu(loaded) else contextlib.nullcontext():
        for request in requests:
            edited, _ = loaded.ALG_DICT[method](
                model, tokenizer, [request], made, return_orig_weights=True
            )
    assert edited is model
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [DOWN_PROJECTION[kind].format(3 if method == "FT" else 1)]
    assert all(torch.isfinite(p).all() for p in model.parameters())
