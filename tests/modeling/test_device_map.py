"""`model_parallel: true`: where a model is loaded to, and what stays on disk."""

import json
import logging

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer
from helpers.two_devices import two_devices

from locft_easyedit.distributed.world import share_of_gpus
from locft_easyedit.errors import HyperParamsError, ModelError
from locft_easyedit.evaluation.evaluation import Evaluation, PairedMetrics
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.modeling import loading as models
from locft_easyedit.modeling.device_map import devices_of, full_map, left_on_disk, spread_map
from locft_easyedit.modeling.loading import load_causal_lm, load_model
from locft_easyedit.training.session import EditSession

pytestmark = pytest.mark.usefixtures("short_answers")
LAYER = 4 * sum(p.numel() for p in toy_model().model.layers[0].parameters())
ENDS = 4 * toy_model().lm_head.weight.numel()  # the embedding, and the head


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a saved toy."""

    def make(kind="llama", **config):
        where = tmp_path_factory.getbasetemp() / "-".join(map(str, [kind, *config.values()]))
        if not where.exists():
            toy_model(kind, **config).save_pretrained(where, max_shard_size="50KB")
            toy_tokenizer().save_pretrained(where)
        return str(where)

    return make


@pytest.fixture
def gpus():
    """Two GPUs for a test."""
    with two_devices() as pretended:
        yield pretended


def hparams(name, kind="llama", **changes):
    values = {"rewrite_module_tmp": DOWN_PROJECTION[kind], "dtype": "float32", "batch_size": 3}
    return toy_hparams(
        **({"model_name": name, "model_parallel": True, "num_steps": 2} | values | changes)
    )


def loaded(name, kind="llama", gpus=None, **changes):
    h = hparams(name, kind, **changes)
    return (*load_model(h, gpus=gpus), h)


def places_of(model):
    """Returns where the layers' parameters are, and the embedding, norm and head."""
    names = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm")
    found = []
    for name in (*names, "lm_head"):
        [device] = {p.device for p in model.get_submodule(name).parameters()}
        found.append(device.type if device.index is None else device.index)
    return found


def edited(model, tokenizer, h, metrics=("accuracy",)):
    # A model that is not whole on one GPU runs each product for itself.
    with EditSession(model, tokenizer, toy_requests(4), h, progress=False, fused=False) as session:
        how = EvalConfig.from_session(session, progress=False)
        evaluation = Evaluation(model, tokenizer, toy_requests(4), how, metrics=metrics)
        before = evaluation.measure("before")
        result = session.train_()
        metrics = list(PairedMetrics(toy_requests(4), before, evaluation.measure("after")))
        assert session.stream is None or len(metrics) > 1 or session.stream.n_passes == 1
    return json.dumps(metrics), result


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].step_losses == expected[1].step_losses
    for name, value in expected[1].new.items():
        assert torch.equal(found[1].new[name].cpu(), value.cpu())
    assert found[1].frozen_prefix


# Whose GPUs


@pytest.mark.parametrize(
    ("n_gpus", "local_size", "shares"),
    [
        (8, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, 8, [[i] for i in range(8)]),
        (8, 3, [[0, 1], [2, 3, 4], [5, 6, 7]]),
        (3, 2, [[0], [1, 2]]),
        (0, 2, [[], []]),
    ],
)
def test_every_process_has_its_own_share(n_gpus, local_size, shares):
    assert [share_of_gpus(n_gpus, rank, local_size) for rank in range(local_size)] == shares


def test_more_processes_than_gpus():
    with pytest.raises(HyperParamsError, match=r"4 processes on a machine with 2 GPUs.*Launch 2"):
        share_of_gpus(2, 0, 4)


# What is asked for


def test_a_model_is_spread(folder, gpus, caplog):
    with caplog.at_level(logging.INFO, logger="locft_easyedit"):
        model, _, _ = loaded(folder(), device=0)
    assert not caplog.records
    assert not left_on_disk(model)
    places = places_of(model)
    assert set(places) == {0, 1}
    assert places == sorted(places)
    # Every layer reads what it gives: as long as its input is not moved to it, nothing is.
    assert model.hf_device_map["model.rotary_emb"] == 0
    ids = torch.tensor([[5, 9, 44, 101]])
    expected = toy_model()(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids.to("cuda:0")).logits.cpu(), expected)


def test_another_first_gpu_says_nothing(folder, gpus, caplog):
    with caplog.at_level(logging.WARNING, logger="locft_easyedit"):
        model, _, _ = loaded(folder(), device=1)
    assert caplog.text.count("`device=1` says nothing beside `model_parallel=true`") == 1
    assert "over the GPUs 0, 1. CUDA_VISIBLE_DEVICES chooses" in caplog.text
    assert places_of(model)[0] == 0


@pytest.mark.parametrize("n_gpus", [0, 2])
def test_gpus_and_no_gpus_at_once(n_gpus, folder):
    with two_devices(n_gpus):
        for load in (
            lambda: loaded(folder(), device="cpu"),
            lambda: load_causal_lm(folder(), device="cpu", model_parallel=True),
        ):
            with pytest.raises(HyperParamsError, match=r"`device='cpu'` asks for none\. Leave one"):
                load()


@pytest.mark.parametrize(("n_gpus", "where"), [(0, "cpu"), (1, "cuda:0")])
def test_fewer_than_two_gpus(n_gpus, where, folder, caplog):
    with two_devices(n_gpus), caplog.at_level(logging.INFO, logger="locft_easyedit"):
        model, _, _ = loaded(folder())
        assert {str(p.device) for p in model.parameters()} == {where}
    assert f"finds no two GPUs: the whole model is on {where}" in caplog.text
    assert not any(record.levelno > logging.INFO for record in caplog.records)


@pytest.mark.parametrize(("share", "found"), [([2, 3], {2, 3}), ([1], {1})])
def test_a_process_keeps_to_its_share(share, found, folder):
    with two_devices(4):
        for model in (
            loaded(folder(), gpus=share, device=0)[0],
            load_causal_lm(folder(), device=0, model_parallel=True, gpus=share)[0],
        ):
            assert {p.device.index for p in model.parameters()} == found


def test_quantized_weights_are_spread_by_transformers(folder, gpus, monkeypatch):
    """It alone knows how large they are."""
    given = {}

    class Loaded(Exception):
        pass

    def loading(*args, **kwargs):
        given.update(kwargs)
        raise Loaded

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", loading)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(folder(), quantize_frozen="8bit")
    assert given["device_map"] == "auto"
    assert set(given["max_memory"]) == {0, 1, "cpu"}
    assert "quantization_config" in given


# What does not fit


def fill(pretended, *layers):
    """Leaves room for so many layers, the embedding and the head on each GPU."""
    pretended.free = [int((n * LAYER + 2.1 * ENDS) / 0.9) for n in layers]


def test_the_memory_of_all_gpus_counts(folder, gpus):
    fill(gpus, 3.2, 3.2)
    one, _, _ = loaded(folder(), model_parallel=False, device=0)
    assert left_on_disk(one)
    two, _, _ = loaded(folder())
    assert not left_on_disk(two)
    assert set(places_of(two)) == {0, 1}


def test_what_both_have_no_room_for_stays_on_disk(folder, gpus, caplog):
    fill(gpus, 2.5, 1.2)
    with caplog.at_level(logging.WARNING, logger="locft_easyedit"):
        model, tokenizer, h = loaded(folder(), layers=[2])
    assert "does not fit the free memory of GPUs 0, 1: its 2 frozen layers are left" in caplog.text
    assert places_of(model) == ["meta", "meta", "meta", 0, 1, 1, 1]
    found = edited(model, tokenizer, h)
    resident, tokenizer, h = loaded(folder(), layers=[2], model_parallel=False, device=0)
    assert_same(found, edited(resident, tokenizer, h))


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"stream_frozen": False}, "leave `stream_frozen` out"),
        ({"layers": [1]}, "choose a later layer"),
    ],
)
def test_what_cannot_fit_is_said_before_loading(changes, way, folder, gpus, monkeypatch):
    fill(gpus, -0.5, -1.5)

    def loading(*args, **kwargs):
        raise AssertionError("the weights are being loaded")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", loading)
    message = rf"weights of .* GiB do not fit the GPUs 0, 1, .*{way}, or set `quantize_frozen`"
    with pytest.raises(ModelError, match=message):
        loaded(folder(), **changes)


def test_a_place_that_is_to_be_chosen_needs_the_whole_model(folder, gpus):
    fill(gpus, 1.2, 1.2)
    with pytest.raises(ModelError, match="it does not fit the free memory of GPUs 0, 1"):
        loaded(folder(), layers="auto")


# Frozen layers on disk, the others over both GPUs


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"prefix_cut": "layer"}),
        ("llama", {"layers": [2, 3], "tuning": "lora"}),
        ("gpt2", {}),
        ("gemma3", {}),
    ],
)
def test_streamed_and_spread(kind, changes, folder, gpus):
    resident, tokenizer, h = loaded(folder(kind), kind, **changes, model_parallel=False, device=0)
    metrics = ("accuracy",) if changes else ("accuracy", "generated")
    expected = edited(resident, tokenizer, h, metrics)
    model, tokenizer, h = loaded(folder(kind), kind, **changes, stream_frozen=True)
    assert {p.device.type for p in model.parameters()} == {"meta", "cuda"}
    assert {p.device.index for p in model.parameters()} == {None, 0, 1}
    logits = model(input_ids=torch.tensor([[5, 9, 44]])).logits
    assert_same(edited(model, tokenizer, h, metrics), expected)
    edited_logits = resident(input_ids=torch.tensor([[5, 9, 44]], device="cuda:0")).logits
    # Its own hooks read what is on disk again.
    assert torch.equal(model(input_ids=torch.tensor([[5, 9, 44]])).logits, edited_logits.cpu())
    assert not torch.equal(logits, edited_logits.cpu())


@pytest.mark.parametrize("model_parallel", [False, True])
def test_streamed_with_tied_embeddings(model_parallel, folder, gpus):
    name = folder(tie_word_embeddings=True)
    resident, tokenizer, h = loaded(name, model_parallel=False, device=0)
    expected = edited(resident, tokenizer, h)
    model, tokenizer, h = loaded(name, stream_frozen=True, model_parallel=model_parallel)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not model.get_input_embeddings().weight.is_meta
    assert_same(edited(model, tokenizer, h), expected)


def test_a_stream_of_somebody_elses_map(folder, gpus):
    """Some frozen layers are resident on the other GPU, one is on disk, and so is the embedding."""
    resident, tokenizer, h = loaded(folder(), layers=[3], model_parallel=False, device=0)
    expected = edited(resident, tokenizer, h)
    places = {"model.embed_tokens": "disk", "model.layers.0": 1, "model.layers.1": "disk"}
    places |= {"model.layers.2": 1, "model.layers.3": 0, "model.norm": 1, "lm_head": 0}
    places["model.rotary_emb"] = 1
    given, tokenizer = load_causal_lm(folder(), device_map=places)
    h = hparams((given, tokenizer), layers=[3])
    model, tokenizer = load_model(h)
    assert model is given
    hooks = {n: m._hf_hook for n, m in model.named_modules() if hasattr(m, "_hf_hook")}
    assert_same(edited(model, tokenizer, h), expected)
    after = {n: m._hf_hook for n, m in model.named_modules() if hasattr(m, "_hf_hook")}
    assert after.keys() == hooks.keys()
    assert all(isinstance(hook, AlignDevicesHook) for hook in after.values())
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


# The map itself


def test_layers_stay_whole():
    with two_devices():
        skeleton = toy_model().to("meta")
        places = spread_map(skeleton, torch.float32, {0: 6 * LAYER, 1: 6 * LAYER})
    assert {name for name in places if "layers" in name} == {f"model.layers.{i}" for i in range(4)}
    assert set(places.values()) == {0, 1}


def test_a_map_names_every_parameter_once():
    model = toy_model()
    on_disk = ["model.embed_tokens", "model.layers.0"]
    places = full_map(model, {"model": 1, **dict.fromkeys(on_disk, "disk")}, 0)
    for name, _ in model.named_parameters():
        [path] = [p for p in places if name == p or name.startswith(f"{p}.")]
        expected = "disk" if path in on_disk else 0 if path == "lm_head" else 1
        assert places[path] == expected
    assert places["model.rotary_emb"] == 0


def test_the_skeleton_is_as_before():
    skeleton = toy_model()
    before = [(name, id(module)) for name, module in skeleton.named_modules()]
    spread_map(skeleton, torch.float32, {0: 2**30, 1: 2**30}, ["model.layers.1"])
    assert [(name, id(module)) for name, module in skeleton.named_modules()] == before


def test_without_the_key_nothing_is_looked_for():
    assert devices_of(False, "cpu", torch.device("cpu")) == (torch.device("cpu"), [])
