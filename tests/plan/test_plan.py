"""What a plan knows of a model: shapes from a configuration, and what autograd keeps."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, HIDDEN, N_LAYERS, TOY_KINDS, toy_hparams, toy_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from locft_easyedit.errors import ModelError, PlaceError
from locft_easyedit.hparams import LocFTBFHyperParams, hparams_folder
from locft_easyedit.plan import reader as plan_reader
from locft_easyedit.plan.plan import make_plan
from locft_easyedit.plan.reader import ModelReader, meta_model, shipped_models
from locft_easyedit.plan.units import GIB
from locft_easyedit.plan.workload import Machine, Workload

ROW = 64
SHIPPED = {facts["names"][0]: facts for facts in shipped_models().values()}


def reader(kind, layers=(1,), template=None, **config):
    with torch.device("meta"):
        model = toy_model(kind, **config)
    return ModelReader(model, kind, list(layers), [template or DOWN_PROJECTION[kind]])


# Facts


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_facts_give_the_published_number_of_parameters(name):
    model, _ = meta_model(f"./hugging_cache/{name}")
    assert sum(p.numel() for p in model.parameters()) == SHIPPED[name]["parameters"]


def test_published_numbers_of_parameters():
    # From the model cards; the facts above could be wrong twice.
    assert SHIPPED["Meta-Llama-3-8B-Instruct"]["parameters"] == 8_030_261_248
    assert SHIPPED["Meta-Llama-3-70B-Instruct"]["parameters"] == 70_553_706_496
    assert SHIPPED["Qwen2.5-7B-Instruct"]["parameters"] == 7_615_616_512
    assert SHIPPED["Qwen2.5-72B-Instruct"]["parameters"] == 72_706_203_648
    assert SHIPPED["Mistral-7B-v0.1"]["parameters"] == 7_241_732_096
    assert SHIPPED["gpt2-xl"]["parameters"] == 1_557_611_200


@pytest.mark.parametrize("yaml", sorted(p.name for p in hparams_folder().glob("*.yaml")))
def test_every_yaml_has_a_plan_without_any_folder(yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hparams = LocFTBFHyperParams.from_hparams(hparams_folder() / yaml)
    hparams.stream_frozen = None
    machine = Machine(gpu=320 * GIB, host=1000 * GIB, disk=1000 * GIB)
    plan = make_plan(hparams, Workload.from_hparams(hparams, 1000), machine)
    assert plan.chosen is not None
    assert plan.chosen.setting.dtype == plan.dtype == (hparams.dtype or "bfloat16")
    assert not plan.chosen.setting.streamed
    assert plan.shapes.first_layer == hparams.layers[0]


def test_names_of_a_model_are_told_apart_by_no_other_model():
    files = [json.loads(p.read_text()) for p in plan_reader._FOLDER.glob("*.json")]
    names = Counter(name.lower() for one in files for name in one["names"])
    assert names
    assert set(names.values()) == {1}


def test_a_folder_needs_only_its_config(tmp_path):
    folder = tmp_path / "gpt2-xl"  # the folder wins over the shipped model of that name
    toy_model("llama").config.save_pretrained(folder)
    model, source = meta_model(str(folder))
    assert source == str(folder / "config.json")
    assert model.config.hidden_size == HIDDEN
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["org/unknown-model", "./hugging_cache/Llama-3-8B-Chinese"])
def test_unknown_model_names_the_remedy(name):
    with pytest.raises(ModelError, match=r"Put the model's config\.json into that folder") as info:
        meta_model(name)
    assert f"`model_name={name!r}`" in str(info.value)
    assert "Qwen2.5-72B-Instruct" in str(info.value)


@pytest.mark.parametrize("name", [None, "", ("model", "tokenizer")])
def test_a_loaded_model_is_no_name(name):
    with pytest.raises(ModelError, match=r"must be a folder with a config\.json"):
        meta_model(name)


def test_spoilt_config(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        meta_model(str(tmp_path))


# Shapes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", TOY_KINDS)
def test_parts_add_up_to_the_model(kind, tied):
    found = reader(kind, tie_word_embeddings=tied).shapes()
    model = toy_model(kind, tie_word_embeddings=tied)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    layers = sum(layer.parameters for layer in found.layers)
    assert found.embedding + found.head + found.rest + layers == found.parameters
    assert found.tied == tied
    assert len(found.layers) == N_LAYERS
    embedding = model.get_input_embeddings().weight
    positions = 256 * HIDDEN if kind == "gpt2" else 0
    assert found.embedding == embedding.numel() + positions
    kept = found.embedding if tied else 0
    assert found.upper + found.streamed == found.parameters + kept


@pytest.mark.parametrize("kind", sorted(set(TOY_KINDS) - {"mixtral"}))
def test_matrices_of_a_layer(kind):
    found = reader(kind).shapes()
    layer = toy_model(kind).get_submodule(DOWN_PROJECTION[kind].split(".{}")[0])[0]
    matrices = {n: p.numel() for n, p in layer.named_parameters() if p.dim() > 1}
    outs = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "mlp")
    assert found.layers[0].matmul == sum(matrices.values())
    late = {n: size for n, size in matrices.items() if any(out in n for out in outs)}
    assert found.layers[0].late == sum(late.values())
    assert 0 < found.layers[0].late < found.layers[0].matmul


def test_a_token_takes_a_few_of_the_experts():
    found = reader("mixtral").shapes().layers[0]
    experts = [p for n, p in reader("mixtral").layers[0].named_parameters() if "experts" in n]
    unused = sum(p.numel() for p in experts) // 2  # two of four
    assert unused > 0
    everything = sum(p.numel() for p in reader("mixtral").layers[0].parameters() if p.dim() > 1)
    assert found.matmul == everything - unused


def test_one_expert_counts_as_what_it_is():
    template = f"{DOWN_PROJECTION['mixtral']}[3]"
    one, all_of_them = (reader("mixtral", template=t).shapes() for t in (template, None))
    assert one.trained == {template.format(1): HIDDEN * 64}
    assert one.n_trained * 4 == one.fused == all_of_them.n_trained
    assert all_of_them.fused == 0
    assert one.layers[1].trained_matmul * 4 == all_of_them.layers[1].trained_matmul > 0
    assert (one.first_layer, one.cuts) == (all_of_them.first_layer, all_of_them.cuts)
    several = reader("mixtral", template=template, layers=(1, 2)).shapes()
    assert several.fused == 2 * one.fused


def test_memory_of_one_expert_is_that_of_its_matrix(tmp_path):
    toy_model("mixtral").config.save_pretrained(tmp_path)
    found = []
    for end in ("", "[3]"):
        template = DOWN_PROJECTION["mixtral"] + end
        hparams = toy_hparams(model_name=str(tmp_path), rewrite_module_tmp=template)
        machine = Machine(gpu=320 * GIB, host=1000 * GIB, disk=1000 * GIB)
        plan = make_plan(hparams, Workload.from_hparams(hparams, 100), machine)
        found.append({part.name: part.bytes for part in plan.chosen.parts})
    for name in ("float32 masters", "Adam's moments", "gradients", "original values"):
        assert found[1][name] * 4 == found[0][name]
    assert found[1]["gradients of all experts"] == found[0]["gradients"]


PARALLEL = ("gptj", "gpt_neox")


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_cuts_by_place(kind):
    found = reader(kind).shapes()
    inner = {"gpt2": 128, "gptj": 128}.get(kind, 64)
    expected = {"matrix": HIDDEN + inner, "mlp": HIDDEN, "layer": HIDDEN}
    if kind == "mixtral":  # its projections are all experts' in one
        del expected["matrix"]
    if kind in PARALLEL:
        del expected["mlp"]
    assert found.cuts == expected
    assert list(found.above_cut) == list(found.cuts)
    assert sorted(found.above_cut.values()) == list(found.above_cut.values())
    assert found.above_cut["layer"] == found.layers[1].matmul


@pytest.mark.parametrize(
    ("templates", "cuts"),
    [
        (["model.layers.{}.mlp.up_proj.weight"], ["mlp", "layer"]),
        (["model.layers.{}.mlp"], ["mlp", "layer"]),
        (["model.layers.{}.self_attn.o_proj"], ["layer"]),
        (["model.layers.{}."], ["layer"]),
        ([DOWN_PROJECTION["llama"], "model.layers.{}.self_attn.q_proj"], ["layer"]),
    ],
)
def test_cuts_below_all_that_is_trained(templates, cuts):
    with torch.device("meta"):
        model = toy_model("llama")
    found = ModelReader(model, "toy", [2], templates).shapes()
    assert list(found.cuts) == cuts
    assert found.first_layer == 2


def test_the_lowest_layer_counts():
    found = reader("llama", [3, 1]).shapes()
    assert found.first_layer == 1
    assert list(found.cuts) == ["matrix", "mlp", "layer"]
    assert [layer.trained for layer in found.layers] == [0, 2048, 0, 2048]


@pytest.mark.parametrize(
    ("layers", "template", "message"),
    [
        ([7], DOWN_PROJECTION["llama"], r"`layers=\[7\]` is out of range"),
        ([1], "model.layers.{}.mlp.nothing", "matches nothing in layer 1"),
        ([1], "model.embed_tokens", "lies outside the layers"),
    ],
)
def test_wrong_place(layers, template, message):
    with pytest.raises(PlaceError, match=message):
        reader("llama", layers, template)


def test_model_without_layers():
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: None
    with pytest.raises(ModelError, match="has no list of layers"):
        ModelReader(model, "this", [0], ["a.{}"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_of_the_checkpoint(tmp_path, dtype):
    config = toy_model("llama").config
    config.dtype = dtype
    config.save_pretrained(tmp_path)
    model, _ = meta_model(str(tmp_path))
    found = ModelReader(model, "toy", [1], [DOWN_PROJECTION["llama"]]).shapes()
    assert found.stored_dtype == dtype


# What autograd keeps


def kept(kind, layer, dtype, device, **config):
    """Returns the bytes that autograd really keeps with `layer`'s matrix trained.

    A CPU's half precision takes the kernel that the runner takes; a GPU's fused one keeps what the
    CPU's does.
    """
    model = toy_model(kind, **config).to(dtype).requires_grad_(False)
    dict(model.named_parameters())[DOWN_PROJECTION[kind].format(layer)].requires_grad_(True)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = tensor
        return tensor

    ids = torch.randint(3, 300, (8, ROW), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).repeat(ROW // 16)[None].expand(8, -1)
    kernel = sdpa_kernel(SDPBackend.MATH) if (device, dtype) == CPU_HALF else nullcontext()
    with kernel, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(t.untyped_storage().nbytes() for t in seen.values())


# Tensors that are no token's: sliced tables, norms' weights plus one. The parallel residual's two
# norms keep one input; GPT-J's and Mixtral's own code keeps a little more.
CPU_HALF = ("cpu", torch.bfloat16)
CLOSE = {"gemma2": 0.01, "gemma3": 0.03, "gpt2": 0.01, "gptj": 0.06, "gpt_neox": 0.1}


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), ("cuda", torch.bfloat16), CPU_HALF],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("kind", TOY_KINDS)
def test_activations_are_what_autograd_keeps(kind, device, dtype):
    if kind == "mixtral" and dtype == torch.float32:
        pytest.skip("its experts keep float32 inputs of a CPU kernel")
    config = {"head_dim": 16} if kind in ("llama", "qwen3", "gemma2") else {}
    # One more layer above the trained matrix keeps one layer more.
    more, less = (kept(kind, layer, dtype, device, **config) for layer in (1, 2))
    measured = (more - less) / (8 * ROW)
    told = reader(kind, **config).activations(dtype, ROW, device)
    assert len(told) == N_LAYERS - 1
    assert told[1].total == pytest.approx(measured, rel=CLOSE.get(kind, 1e-3))


def test_terms_of_a_llama_layer():
    [told, *_] = reader("llama", head_dim=16).activations(torch.bfloat16, ROW, "cuda")
    heads, width = 4, 4 * 16
    assert told.norms == 2 * (4 * HIDDEN + 4)
    assert told.attention == 4 * width * 2 + 4 * heads + ROW * 2
    assert told.mlp == 3 * 64 * 2
    [on_cpu, *_] = reader("llama", head_dim=16).activations(torch.bfloat16, ROW, "cpu")
    assert on_cpu.attention == 3 * width * 4 + heads * ROW * 4
    assert (on_cpu.norms, on_cpu.mlp) == (told.norms, told.mlp)


def test_a_module_that_needs_numbers_is_estimated():
    from locft_easyedit.plan.activations import saved_by

    class Asks(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if bool(x.sum() > 0) else x

    module = Asks(8, 24, device="meta")
    assert saved_by(module, 8, torch.float32) == 3 * 24 * 4


def test_hparams_without_a_prefix_are_refused():
    machine = Machine(gpu=GIB, host=GIB, disk=GIB)
    for key, message in {"frozen_prefix": "Leave", "model_parallel": "spreads"}.items():
        hparams = toy_hparams(model_name="gpt2-xl", **{key: key == "model_parallel"})
        with pytest.raises(ValueError, match=message):
            make_plan(hparams, Workload.from_hparams(hparams, 5), machine)


def test_facts_are_in_the_package():
    assert Path(plan_reader.__file__).parent in plan_reader._FOLDER.parents
