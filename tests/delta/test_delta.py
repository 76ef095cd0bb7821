"""An edit as a value: put in, taken out and recognised, bit for bit, in every precision."""

import copy
import hashlib

import pytest
import torch
from helpers.toys import (
    DOWN_PROJECTION,
    made_delta,
    toy_hparams,
    toy_model,
    toy_requests,
    toy_tokenizer,
)

from locft_easyedit.api import edit_model
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.delta.delta import Delta
from locft_easyedit.delta.metadata import requests_hash
from locft_easyedit.errors import DeltaError
from locft_easyedit.utils import hashing as hashes

PLACE = DOWN_PROJECTION["llama"].format(2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["llama", "gemma2", "gpt2", "phi3", "gpt_neox", "mixtral"]


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def trained():
    """A toy model, the same one after a real edit, and the edit."""
    model, hparams = toy_model(), toy_hparams()
    base = copy.deepcopy(model)
    requests = toy_requests(5)
    result = edit_model(model, toy_tokenizer(), requests, hparams, progress=False)
    return base, model, Delta.from_result(result, model, hparams, requests)


# Round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path, kind, dtype):
    model = toy_model(kind).to(dtype)
    before = values_of(model)
    made_delta(kind, model=model).save(tmp_path / "edit")
    after = values_of(model)
    assert not same(before, after)
    delta = Delta.load(tmp_path / "edit")
    delta.revert_(model)
    assert same(before, values_of(model))
    delta.apply_(model)
    assert same(after, values_of(model))
    with torch.no_grad():
        [parameter] = [dict(model.named_parameters())[name] for name in delta.new]
        parameter.copy_(delta.original[next(iter(delta.new))])
    with delta.applied(model):
        assert same(after, values_of(model))
    assert same(before, values_of(model))


def test_a_trained_edit(trained, tmp_path):
    base, model, delta = trained
    delta.save(tmp_path / "edit")
    delta = Delta.load(tmp_path / "edit")
    fresh = copy.deepcopy(base)
    delta.apply_(fresh)
    assert same(values_of(fresh), values_of(model))
    assert list(delta.new) == [PLACE]
    about = delta.metadata
    assert about["requests"] == requests_hash(distinct_edits(toy_requests(5)).edits)
    assert about["requests"]["count"] == 5
    assert about["hparams"] == toy_hparams().to_dict()
    assert len(about["losses"]) == 3
    assert set(about["frozen"]) | {PLACE} == {name for name, _ in model.named_parameters()}
    assert delta.dtype == torch.float32


def test_tied_embeddings_are_left_alone():
    model = toy_model("llama", tie_word_embeddings=True)
    before = values_of(model)
    delta = made_delta(model=model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    delta.revert_(model)
    assert same(before, values_of(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    with pytest.raises(DeltaError, match=r"embed_tokens.weight`: 1 of 37 other parameters"):
        delta.apply_(model)


def test_a_tied_matrix_is_not_written():
    untied, tied = toy_model("llama"), toy_model("llama", tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    result = made_delta(model=untied)
    parameter = dict(untied.named_parameters())[name]
    with torch.no_grad():
        untied.lm_head.weight.copy_(parameter)
    new = {name: parameter.detach() + 1}
    values = {"new": new, "original": {name: parameter.detach().clone()}}
    result = type("Result", (), values | {"losses": [], "lora": None, "edits": None})
    delta = Delta.from_result(result, untied, toy_hparams(), toy_requests(2))
    with pytest.raises(DeltaError, match=r"it is tied to `lm_head.weight`"):
        delta.apply_(tied)


# What a model is to an edit


def test_states(trained):
    base, model, delta = trained
    delta.check()
    for given, state in ((base, "base"), (model, "applied"), (toy_model(seed=3), "neither")):
        report = delta.verify(given)
        assert (report.state, report.id, report.unchecked) == (state, delta.id, 0)
        assert bool(report.differences) == (state == "neither")
    assert base.training == model.training


def test_an_edit_that_changes_nothing_goes_both_ways():
    model = toy_model()
    value = dict(model.named_parameters())[PLACE].detach().clone()
    names = {"new": {PLACE: value}, "original": {PLACE: value}, "losses": [], "lora": None}
    delta = Delta.from_result(type("Result", (), names), model, toy_hparams(), toy_requests(1))
    before = values_of(model)
    delta.apply_(model)
    delta.revert_(model)
    assert same(before, values_of(model))


def another_place(model):
    with torch.no_grad():
        dict(model.named_parameters())[PLACE][0, 0] += 1


def other_norm(model):
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] += 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made_delta_holder(), "it is already applied"),
        (lambda: toy_model(seed=1), r"\d+ of 38 other parameters .* The base is another model"),
        (lambda: toy_model(hidden_size=64), r"\[64, 64\] there and \[32, 64\] in the edit"),
        (lambda: toy_model("gpt2"), "it is not in the model"),
        (lambda: toy_model(num_hidden_layers=5), "not in the model that was edited"),
        (lambda: toy_model(num_hidden_layers=3), "layers.3.* and 6 more: not in the model. The"),
        (lambda: toy_model().bfloat16(), r"bfloat16; .* in float32. .* with dtype=float32"),
        (lambda: toy_model().to("meta"), "it is not loaded"),
        (lambda: changed(toy_model(), another_place), "neither the values before the edit nor"),
        (lambda: changed(toy_model(), other_norm), r"input_layernorm.weight`: 1 of 38 other"),
    ],
    ids=range(10),
)
def test_models_that_an_edit_does_not_fit(make, message):
    delta, model = made_delta(), make()
    before = values_of(model)
    with pytest.raises(DeltaError, match=message):
        delta.apply_(model)
    assert model.device.type == "meta" or same(before, values_of(model))
    if "already" not in message:
        with pytest.raises(DeltaError, match=message), delta.applied(model):
            raise AssertionError


def made_delta_holder():
    model = toy_model()
    made_delta(model=model)
    return model


def changed(model, change):
    change(model)
    return model


def test_reverting_what_is_not_there():
    with pytest.raises(DeltaError, match="it is not in there: the model is as before the edit"):
        made_delta().revert_(toy_model())


def test_half_an_edit():
    model, place = toy_model(), "model.layers.{}.mlp.{}_proj.weight"
    before = values_of(model)
    names = [place.format(2, "up"), place.format(2, "down")]
    original = {n: before[n] for n in names}
    new = {n: before[n] * 2 for n in names}
    result = type("Result", (), {"new": new, "original": original, "losses": [], "lora": None})
    delta = Delta.from_result(result, model, toy_hparams(), toy_requests(1))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(2)
    for method in (delta.apply_, delta.revert_):
        with pytest.raises(DeltaError, match=r"up_proj.weight`: the edited values; the edit's oth"):
            method(model)


def test_a_failure_while_writing_leaves_the_model_as_it_was(monkeypatch, trained):
    base, _, delta = trained
    model = copy.deepcopy(base)
    before = values_of(model)
    calls = []

    def failing(parameters, values):
        calls.append(1)
        for name, value in values.items():
            parameters[name].data.copy_(value)
            if len(calls) == 1:
                raise KeyboardInterrupt("stopped")

    monkeypatch.setattr("locft_easyedit.delta.apply.write_", failing)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        delta.apply_(model)
    assert len(calls) == 2
    assert same(before, values_of(model))


def test_what_is_not_here_is_not_compared(trained):
    base, _, delta = trained
    model = copy.deepcopy(base)
    model.model.layers[0] = model.model.layers[0].to("meta")
    report = delta.verify(model)
    assert (report.state, report.unchecked) == ("base", 9)
    sampled = made_delta(model=model).metadata["frozen"]
    assert [name for name, sample in sampled.items() if sample is None] == [
        name for name, _ in model.named_parameters() if ".0." in name
    ]


# Without what was replaced


def test_originals_from_elsewhere(tmp_path, trained):
    base, model, delta = trained
    model = copy.deepcopy(model)
    delta.save(tmp_path / "edit", originals=False)
    lean = Delta.load(tmp_path / "edit")
    assert lean.id == delta.id
    assert lean.original == {}
    with pytest.raises(DeltaError, match=r"without the values that it replaced.*`base=FOLDER`"):
        lean.revert_(model)
    with pytest.raises(DeltaError, match=r"`model.layers.2.mlp.down_proj.weight` is not there, or"):
        lean.with_originals(dict(model.named_parameters()))
    lean.with_originals(dict(base.named_parameters())).revert_(model)
    assert same(values_of(base), values_of(model))


# Hashes


def test_hashes_tell_bits_types_and_shapes_apart():
    tensor = torch.randn(6, 4)
    several = [
        tensor,
        tensor.view(4, 6),
        tensor.double(),
        tensor.t().contiguous(),
        tensor + 1e-7,
        tensor.half(),
        tensor.bfloat16(),
    ]
    assert len({hashes.tensor_sha256(t) for t in several}) == len(several)
    assert hashes.tensor_sha256(tensor) == hashes.tensor_sha256(tensor.clone().requires_grad_())
    # What lies elsewhere in memory holds the same numbers.
    wide = torch.stack([tensor, tensor], dim=1)[:, 0]
    assert not wide.is_contiguous()
    assert hashes.tensor_sha256(wide) == hashes.tensor_sha256(tensor)
    transposed = tensor.t()
    assert hashes.tensor_sha256(transposed) == hashes.tensor_sha256(transposed.contiguous())


def test_samples(monkeypatch):
    tensor = torch.arange(3000.0).view(30, 100)
    numbers = hashes.sample_numbers(tensor)
    assert len(numbers) == len(set(numbers.tolist())) == 1024
    assert numbers[0] == 0
    assert numbers[-1] >= 2990
    assert torch.equal(numbers, hashes.sample_numbers(tensor.t().contiguous().t()))
    small = torch.randn(7)
    assert torch.equal(hashes.sample_numbers(small), small)
    assert hashes.sample_digest(small) != hashes.sample_digest(small[:, None])


def test_a_hash_in_parts_is_the_same(monkeypatch):
    tensor = torch.randn(50, 3)
    whole = hashes.tensor_sha256(tensor)
    monkeypatch.setattr(hashes, "_CHUNK", 7)
    assert hashes.tensor_sha256(tensor) == whole


def test_hashes_in_files_keep_their_values():
    """Edits that users have on disk are verified by them."""
    value, text = {"b": 1, "a": ["\u00e9", None]}, '{"a":["\\u00e9",null],"b":1}'
    assert hashes.json_sha256(value) == hashlib.sha256(text.encode()).hexdigest()
    listed = hashlib.sha256(f"[{text},[1.5,true]]".encode()).hexdigest()
    assert hashes.json_sha256([value, [1.5, True]]) == listed
    tensor = torch.arange(4096.0).view(64, 64)
    head = b'["float32",[64,64]]'
    whole = hashlib.sha256(head + tensor.numpy().tobytes()).hexdigest()
    assert hashes.tensor_sha256(tensor) == whole
    sample = hashlib.sha256(head + tensor.flatten()[::4].numpy().tobytes()).hexdigest()
    assert hashes.sample_digest(tensor) == sample[:16]


def test_an_id_names_the_edit():
    one, again = made_delta(), made_delta()
    assert one.id == again.id
    assert len({one.id, made_delta(scale=2).id, made_delta(layer=1).id}) == 3


def test_what_cannot_be_kept():
    model = toy_model()
    with torch.no_grad():
        dict(model.named_parameters())[PLACE][0, 0] = float("inf")
    with pytest.raises(DeltaError, match="NaN or infinite values"):
        made_delta(model=model)
