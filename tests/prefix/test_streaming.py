"""A model whose frozen layers stay on disk against the same model, resident."""

import json
import logging
import time
import weakref

import pytest
import torch
from helpers.toys import (
    DOWN_PROJECTION,
    TOY_KINDS,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)

from locft_easyedit.api import edit_and_measure, edit_model
from locft_easyedit.errors import HyperParamsError, MemoryBudgetError, ModelError
from locft_easyedit.evaluation.evaluation import Evaluation, PairedMetrics
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.modeling import device_map as offload
from locft_easyedit.modeling.loading import load_model
from locft_easyedit.prefix.frozen_prefix import FrozenPrefix
from locft_easyedit.prefix.streaming import FrozenStream, stream_of
from locft_easyedit.training.session import EditSession
from locft_easyedit.utils import memory

pytestmark = pytest.mark.usefixtures("short_answers")
METRICS = ("accuracy", "generated", "ppl")


@pytest.fixture
def folder(tmp_path):
    """Returns the folder of a toy, saved in many parts."""

    def make(kind="llama", **config):
        where = tmp_path / kind
        if not where.exists():
            toy_model(kind, **config).save_pretrained(where, max_shard_size="50KB")
            toy_tokenizer().save_pretrained(where)
            assert len(list(where.glob("*.safetensors"))) > 3
        return str(where)

    return make


def loaded(name, stream=True, kind="llama", **changes):
    """Returns a model, its tokenizer and the hyper-parameters."""
    values = {"rewrite_module_tmp": DOWN_PROJECTION[kind], "device": "cpu"} | changes
    h = toy_hparams(model_name=name, stream_frozen=stream, **values)
    return (*load_model(h), h)


def records(n=6):
    """Returns requests, some of them with several prompts to one question."""
    found = toy_requests(n)
    for record in found[::2]:
        record["locality"]["many"] = {
            "prompt": ["The river is", f"Once more, the river near {record['subject']} is the"],
            "ground_truth": ["Rhine", "Loire and the Rhine"],
        }
        again = f"They say that {record['prompt']}"
        record["rephrase_prompt"] = [record["rephrase_prompt"], again]
    return found


def both(name, requests=None, **changes):
    """Returns the runs of the resident and of the streamed model, and the models."""
    runs, models = [], []
    for stream in (False, True):
        model, tokenizer, h = loaded(name, stream, **changes)
        assert offload.left_on_disk(model) == stream
        with EditSession(model, tokenizer, requests or records(), h, progress=False) as session:
            how = EvalConfig.from_session(session, progress=False)
            evaluation = Evaluation(model, tokenizer, requests or records(), how, metrics=METRICS)
            before = evaluation.measure("before")
            result = session.train_()
            after = evaluation.measure("after")
            paired = list(PairedMetrics(evaluation.records, before, after))
            runs.append((paired, result))
            assert (session.stream is not None) == stream
        models.append(model)
    return runs, models


def assert_same(runs):
    (metrics, result), (streamed_metrics, streamed) = runs
    assert streamed.frozen_prefix
    assert streamed.step_losses == result.step_losses
    assert streamed.new.keys() == result.new.keys()
    assert all(torch.equal(streamed.new[name], result.new[name]) for name in result.new)
    assert all(not torch.equal(result.new[n], result.original[n]) for n in result.new)
    assert json.dumps(streamed_metrics) == json.dumps(metrics)


@torch.no_grad()
def logits_of(model):
    ids = torch.tensor([[5, 9, 44, 101, 7, 23]])
    return model(input_ids=ids, use_cache=False).logits


# Every architecture of the toys can be streamed; equality is to the bit, because the layers run
# in rows of the same form whether they are read or resident.
@pytest.mark.parametrize("kind", TOY_KINDS)
def test_the_same_weights_losses_and_metrics(kind, folder):
    runs, (resident, streamed) = both(folder(kind), records(3), kind=kind)
    assert_same(runs)
    # The model runs by itself again, its hooks reading what is on disk.
    assert torch.equal(logits_of(streamed), logits_of(resident))


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix_cut": "matrix"},
        {"prefix_cut": "mlp"},
        {"prefix_cut": "layer"},
        {"layers": [1, 3]},
        {"layers": [3], "rewrite_module_tmp": "model.layers.{}."},
        {"packing": False},
        {"dtype": "bfloat16"},
        {"prefix_host_gib": 0.0},
        {"layers": [1], "num_steps": 1},
    ],
    ids=str,
)
def test_the_same_for_every_place_and_cut(changes, folder):
    runs, models = both(folder(), **changes)
    if changes.get("dtype"):  # rounding decides what follows from another layout of rows
        assert runs[1][1].step_losses == pytest.approx(runs[0][1].step_losses, abs=2e-2)
        return
    assert_same(runs)
    assert torch.equal(logits_of(models[1]), logits_of(models[0]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_tied_embeddings_stay_resident(kind, folder):
    name = folder(kind, tie_word_embeddings=True)
    runs, (_, streamed) = both(name, kind=kind)
    assert not streamed.get_input_embeddings().weight.is_meta
    assert_same(runs)


def test_the_whole_run(folder):
    runs = []
    for stream in (False, True):
        model, tokenizer, h = loaded(folder(), stream)
        run = edit_and_measure(model, tokenizer, records(), h, metrics=METRICS, progress=False)
        runs.append((list(run.metrics), run.result))
    assert_same(runs)


@pytest.mark.parametrize("stream", [None, True])
def test_nothing_streams_where_no_layer_is_frozen(stream, folder, monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 0.0)
    model, tokenizer, h = loaded(folder(), stream, layers=[0, 2])
    assert not offload.left_on_disk(model)
    assert edit_model(model, tokenizer, toy_requests(4), h, progress=False).n_updates


# What is read, and how often


def test_every_weight_is_read_once_a_pass(folder, monkeypatch):
    model, tokenizer, h = loaded(folder(), layers=[2])
    on_disk = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert {name.split(".")[2] for name in on_disk if "layers" in name} == {"0", "1"}
    assert "model.embed_tokens.weight" in on_disk
    reads = []
    with EditSession(model, tokenizer, records(), h, progress=False) as session:
        how = EvalConfig.from_session(session, progress=False)
        evaluation = Evaluation(model, tokenizer, records(), how, metrics=("accuracy", "ppl"))
        read = type(next(iter(session.stream._hooks.values())).weights_map.dataset).__getitem__
        loader = type(next(iter(session.stream._hooks.values())).weights_map.dataset)
        monkeypatch.setattr(
            loader, "__getitem__", lambda self, key: reads.append(key) or read(self, key)
        )
        assert session.stream.n_passes == 0
        evaluation.measure("before")
        assert sorted(reads) == sorted(on_disk)
        session.train_()  # its prefix was computed in the same pass
        evaluation.measure("after")
        evaluation.measure("again", only=[2])
        session.train_([1])
        assert session.stream.n_passes == 1
        assert len(reads) == len(on_disk)


def test_a_training_alone_needs_one_pass_as_well(folder):
    model, tokenizer, h = loaded(folder())
    with EditSession(model, tokenizer, toy_requests(5), h, progress=False) as session:
        session.train_([0])
        session.train_()
        assert session.stream.n_passes == 1


def test_at_most_two_layers_are_alive(folder, monkeypatch):
    alive, most = weakref.WeakSet(), []
    read, stage = FrozenStream._read, FrozenStream._stage

    def reading(self, module):
        most.append(len({id(owner) for owner in alive}) + 1)
        weights = read(self, module)
        tensor = next(iter(weights.values()))  # one stands for the layer
        alive.add(tensor)
        return weights

    def slow(self, *args):
        time.sleep(0.02)  # time enough for more than one to be read ahead
        stage(self, *args)

    model, tokenizer, h = loaded(folder(), layers=[3])
    with EditSession(model, tokenizer, toy_requests(5), h, progress=False) as session:
        monkeypatch.setattr(FrozenStream, "_read", reading)
        monkeypatch.setattr(FrozenStream, "_stage", slow)
        session.train_()
    assert len(most) == 4  # the embedding and three layers
    assert max(most) == 2
    assert len(alive) == 0


# What is left behind


def state_of(model):
    """Returns what a stream must leave as it was."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(n, p.device.type, p.requires_grad, tuple(p.shape)) for n, p in model.named_parameters()],
        {n: p.clone() for n, p in model.named_parameters() if not p.is_meta},
        [
            (n, id(getattr(m, "_hf_hook", None)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        ],
    )


def assert_unchanged(model, before):
    after = state_of(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[3] == before[3]
    assert all(torch.equal(after[2][name], value) for name, value in before[2].items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [
        (FrozenStream, "_look", 1),
        (FrozenStream, "record", 1),
        (FrozenStream, "_read", 1),
        (FrozenStream, "_read", 4),
        (FrozenStream, "_stage", 1),
        (FrozenStream, "_stage", 3),
        (FrozenStream, "_last_stage", 1),
        (FrozenPrefix, "feed", 9),
        (torch.optim.Adam, "step", 3),
    ],
)
def test_an_interruption_restores_everything(owner, method, call, error, folder, monkeypatch):
    model, tokenizer, h = loaded(folder())
    before, logits = state_of(model), logits_of(model)
    original, calls = getattr(owner, method), []

    def interrupted(*args, **kwargs):
        calls.append(method)
        if len(calls) == call:
            raise error("in the middle")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(error, match="in the middle"):
        edit_model(model, tokenizer, toy_requests(6), h, progress=False)
    assert_unchanged(model, before)
    assert torch.equal(logits_of(model), logits)


def test_flags_and_modes_stay(folder):
    model, tokenizer, h = loaded(folder())
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = state_of(model)
    edit_model(model, tokenizer, toy_requests(4), h, progress=False).restore_(model)
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())


def test_a_pass_that_failed_can_be_made_again(folder, monkeypatch):
    """The budget is raised, say, and the same session goes on."""
    model, tokenizer, h = loaded(folder(), prefix_host_gib=0.0, prefix_disk_gib=0.0)
    with EditSession(model, tokenizer, toy_requests(6), h, progress=False) as session:
        with monkeypatch.context() as patch:
            patch.setattr(FrozenStream, "_read", None)  # nothing is read in vain
            with pytest.raises(MemoryBudgetError, match="`prefix_host_gib` or `prefix_disk_gib`"):
                session.train_()
        assert session.budget.taken == [0, 0, 0]
        session.budget.host_gib = 1.0
        result = session.train_()
    resident, tokenizer, h = loaded(folder(), False)
    expected = edit_model(resident, tokenizer, toy_requests(6), h, progress=False)
    assert result.step_losses == expected.step_losses


@pytest.mark.parametrize("kind", ["matrix", "layer"])
def test_states_between_layers_take_no_budget_afterwards(kind, folder):
    model, tokenizer, h = loaded(folder(), prefix_cut=kind)
    with EditSession(model, tokenizer, toy_requests(6), h, progress=False) as session:
        session.train_()
        store = session._runner.prefix.store
        assert session.budget.taken == [0, store.width * 4 * session._runner.prefix.n_tokens, 0]


# Whether to stream


@pytest.mark.parametrize(("share", "streams"), [(0.5, True), (1.05, True), (1.2, False)])
def test_free_memory_decides(share, streams, folder, monkeypatch, caplog):
    size = sum(p.numel() for p in toy_model("llama").parameters()) * 4
    monkeypatch.setattr(memory, "free_host_memory", lambda: share * size)
    with caplog.at_level(logging.WARNING, logger="locft_easyedit"):
        model, _, _ = loaded(folder(), None)
    assert offload.left_on_disk(model) == streams
    assert ("does not fit the free memory of cpu: its 2 frozen layers" in caplog.text) == streams


def test_precision_counts_for_what_fits(folder, monkeypatch):
    size = sum(p.numel() for p in toy_model("llama").parameters()) * 4
    monkeypatch.setattr(memory, "free_host_memory", lambda: 0.7 * size)
    assert offload.left_on_disk(loaded(folder(), None)[0])
    assert not offload.left_on_disk(loaded(folder(), None, dtype="float16")[0])


def test_where_it_was_turned_off_nothing_is_asked(folder, monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 0.0)
    assert not offload.left_on_disk(loaded(folder(), False)[0])


def test_a_resident_model_has_no_stream(folder):
    assert stream_of(toy_model("llama"), 2) is None
    assert stream_of(loaded(folder())[0], 0) is None


# What cannot be streamed


def refusing_to_load(monkeypatch):
    from locft_easyedit.modeling import loading as models

    def loading(*args, **kwargs):
        raise AssertionError("the weights are being loaded")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", loading)


def test_a_place_inside_the_layers(folder, monkeypatch):
    refusing_to_load(monkeypatch)
    monkeypatch.setattr(offload, "first_layer_of", lambda *args: None)
    with pytest.raises(ModelError, match="`stream_frozen=true` needs a place inside"):
        loaded(folder())


def test_a_missing_part_shows_before_loading(folder, monkeypatch):
    from pathlib import Path

    name = folder()
    first, second, *_ = sorted(Path(name).glob("*.safetensors"))
    first.unlink()
    second.unlink()
    refusing_to_load(monkeypatch)
    with pytest.raises(ModelError, match=rf"lacks 2 of its \d+ parts: {first.name}, {second.name}"):
        loaded(name)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}'])
def test_a_damaged_index_shows_before_loading(text, folder, monkeypatch):
    from pathlib import Path

    name = folder()
    (Path(name) / "model.safetensors.index.json").write_text(text)
    refusing_to_load(monkeypatch)
    with pytest.raises(ModelError, match=r"index\.json` is damaged: .*Download the model again"):
        loaded(name)


def test_fluency_is_refused_before_the_edit(folder):
    pytest.importorskip("nltk")
    model, tokenizer, h = loaded(folder())
    before = state_of(model)
    with EditSession(model, tokenizer, toy_requests(3), h, progress=False) as session:
        how = EvalConfig.from_session(session, progress=False)
        with pytest.raises(HyperParamsError, match=r"fluency samples 100 .*`stream_frozen: f"):
            Evaluation(model, tokenizer, toy_requests(3), how, metrics=["accuracy", "fluency"])
        assert session.stream.n_passes == 0
    assert_unchanged(model, before)
