"""Edits in models' folders: shards rewritten in place of loading, and nothing half done."""

import json
import os
import shutil

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, made_delta, toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM

from locft_easyedit.delta import folder as module
from locft_easyedit.delta.delta import Delta
from locft_easyedit.delta.folder import write_changed_folder
from locft_easyedit.delta.weights_folder import INDEX
from locft_easyedit.errors import DeltaError, ModelError, OutputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def saved(path, model, shard="15KB"):
    model.save_pretrained(path, max_shard_size=shard)
    toy_tokenizer(pad_is_eos=True).save_pretrained(path)
    return path


def values_in(path, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def bytes_in(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def never_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_causal_lm", refuse)


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base", toy_model())


# There and back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard", ["15KB", "1GB"])
def test_shards_are_rewritten_without_loading(tmp_path, never_loaded, dtype, shard):
    model = toy_model().to(dtype)
    saved(tmp_path / "base", model, shard)
    deltas = [made_delta(model=model, layer=layer) for layer in (2, 1, 2)]
    assert not write_changed_folder(deltas, tmp_path / "base", tmp_path / "out")
    assert same(values_in(tmp_path / "out"), model.state_dict())
    assert (tmp_path / "base" / INDEX).exists() == (shard == "15KB")
    assert [deltas[2].verify_folder(tmp_path / name).state for name in ("base", "out")] == [
        "neither",
        "applied",
    ]
    assert not write_changed_folder(
        deltas[::-1], tmp_path / "out", tmp_path / "back", reverted=True
    )
    assert bytes_in(tmp_path / "back") == bytes_in(tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "base", "out"]


def test_only_the_shards_with_edited_matrices_are_new(tmp_path, base, never_loaded):
    made_delta().apply_to_folder(base, tmp_path / "out")
    shards = [path for path in base.iterdir() if path.suffix == ".safetensors"]
    new = [s.name for s in shards if not (tmp_path / "out" / s.name).samefile(s)]
    index = json.loads((base / INDEX).read_text())["weight_map"]
    assert new == [index[DOWN_PROJECTION["llama"].format(2)]]
    assert len(shards) > 3
    others = {path.name for path in base.iterdir()} - {s.name for s in shards}
    assert all(not (tmp_path / "out" / n).samefile(base / n) for n in others)


@pytest.mark.parametrize(
    ("kind", "stored", "used"),
    [
        ("mixtral", torch.float32, torch.float32),  # its experts have other names on disk
        ("llama", torch.float32, torch.bfloat16),
        ("llama", torch.bfloat16, torch.float32),
        ("gpt2", torch.float32, torch.float16),
    ],
)
def test_a_model_that_has_to_be_loaded(tmp_path, kind, stored, used):
    saved(tmp_path / "base", toy_model(kind).to(stored))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=used)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    delta = made_delta(kind, model=model)
    assert delta.verify_folder(tmp_path / "base").state == "base"
    assert delta.apply_to_folder(tmp_path / "base", tmp_path / "out")
    assert same(values_in(tmp_path / "out"), model.state_dict())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    delta.revert_in_folder(tmp_path / "out", tmp_path / "back")
    assert same(values_in(tmp_path / "back"), before)


def test_a_gpt2_and_tied_embeddings(tmp_path, never_loaded):
    for kind in ("gpt2", "llama"):
        model = toy_model(kind, tie_word_embeddings=True)
        saved(tmp_path / kind, model)
        delta = made_delta(kind, model=model)
        delta.apply_to_folder(tmp_path / kind, tmp_path / f"{kind}-out")
        assert same(values_in(tmp_path / f"{kind}-out"), model.state_dict())


def test_the_base_gives_what_a_file_leaves_out(tmp_path, base):
    delta = made_delta()
    delta.save(tmp_path / "edit", originals=False)
    lean = Delta.load(tmp_path / "edit")
    lean.apply_to_folder(base, tmp_path / "out")
    with pytest.raises(DeltaError, match=r"with `base=FOLDER`"):
        lean.revert_in_folder(tmp_path / "out", tmp_path / "back")
    with pytest.raises(DeltaError, match="is not there, or not what the edit replaced"):
        lean.with_originals(tmp_path / "out")
    lean.with_originals(base).revert_in_folder(tmp_path / "out", tmp_path / "back")
    assert bytes_in(tmp_path / "back") == bytes_in(base)


def test_the_hub_cache(tmp_path, never_loaded):
    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    snapshot = saved(cache / "snapshots" / "123", toy_model())
    for i, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, cache / "blobs" / str(i))
        path.symlink_to(f"../../blobs/{i}")
    made_delta().apply_to_folder(snapshot, tmp_path / "out")
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert made_delta().verify_folder(tmp_path / "out").state == "applied"
    assert made_delta().verify_folder(snapshot).state == "base"


def test_weights_of_another_kind_and_subfolders_are_left_out(tmp_path, base, caplog):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (base / name).write_bytes(b"old weights")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "notes.txt").write_text("kept")
    (base / "original").mkdir()
    made_delta().apply_to_folder(base, tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"notes.txt", "config.json", "tokenizer.json", INDEX} <= kept
    assert not kept & {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", "original"}
    assert not any("bin" in name for name in kept)
    assert "consolidated.safetensors is left out" in caplog.text


# Refusals


def test_another_model_or_edit(tmp_path, base, never_loaded):
    saved(tmp_path / "other", toy_model(seed=1))
    one, two = made_delta(layer=1), made_delta(layer=2)
    with pytest.raises(DeltaError, match="The base is another model"):
        one.apply_to_folder(tmp_path / "other", tmp_path / "out")
    with pytest.raises(DeltaError, match=r"layers.1.* An edit is missing there, or lies in betwe"):
        write_changed_folder([one, two], base, tmp_path / "out")
    with pytest.raises(DeltaError, match="it is not in there"):
        one.revert_in_folder(base, tmp_path / "out")
    with pytest.raises(DeltaError, match="No edit was given"):
        write_changed_folder([], base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


def test_a_folder_that_holds_something(tmp_path, base):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for output in (tmp_path / "out", base):
        with pytest.raises(OutputError, match="is there already"):
            made_delta().apply_to_folder(base, output)
    assert bytes_in(tmp_path / "out") == {"mine": b"mine"}


def test_an_edit_named_twice_and_an_output_within_the_model(tmp_path, base):
    delta = made_delta()
    with pytest.raises(DeltaError, match=f"Edit {delta.short_id} is given twice"):
        write_changed_folder([delta, delta], base, tmp_path / "out")
    for write in (delta.apply_to_folder, delta.export_adapter, delta.export_lora):
        options = {"rank": 2} if write == delta.export_lora else {}
        with pytest.raises(OutputError, match="is inside of `model="):
            write(base, base / "sub" / "out", **options)
    assert not (base / "sub").exists()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, base, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="out cannot be written: No space left"):
        made_delta().apply_to_folder(base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/secret.safetensors", "a/b.safetensors", "..", "x.bin", "\0", 3],
)
def test_an_index_that_leads_elsewhere(tmp_path, base, name):
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"no plain file name|is damaged"):
        made_delta().apply_to_folder(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_that_leads_elsewhere(tmp_path, base):
    (tmp_path / "secret").write_text("secret")
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"(?s)leads out of its folder.*tokenizer_config.json"):
        made_delta().apply_to_folder(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: (base / "config.json").unlink(), r"no folder with a config\.json"),
        (lambda base: (base / INDEX).write_text("{"), "is damaged"),
        (lambda base: (base / INDEX).write_text('{"weight_map": [1]}'), "is damaged"),
        (lambda base: next(base.glob("*.safetensors")).unlink(), "is missing"),
        (lambda base: cut(next(base.glob("*.safetensors"))), "file not fully covered"),
    ],
    ids=range(5),
)
def test_a_damaged_folder(tmp_path, base, damage, message):
    damage(base)
    delta = made_delta()
    for method in (delta.apply_to_folder, delta.revert_in_folder):
        with pytest.raises(ModelError, match=message):
            method(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_matrix_is_not_rewritten(tmp_path):
    untied, tied = toy_model(), toy_model(tie_word_embeddings=True)
    saved(tmp_path / "base", tied)
    name = "model.embed_tokens.weight"
    delta = made_delta()
    value = untied.state_dict()[name]
    result = type(
        "R",
        (),
        {"new": {name: value + 1}, "original": {name: value.clone()}, "losses": [], "lora": None},
    )
    from helpers.toys import toy_hparams, toy_requests

    delta = Delta.from_result(result, tied, toy_hparams(), toy_requests(1))
    with pytest.raises(DeltaError, match=r"it is tied to `lm_head.weight`"):
        delta.apply_to_folder(tmp_path / "base", tmp_path / "out")
