"""An edit's file from somebody else: whatever it holds, it is used as it was made, or refused."""

import json
import math
import os
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from helpers.toys import made_delta, toy_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from locft_easyedit.delta.delta import Delta
from locft_easyedit.delta.file import METADATA_KEY
from locft_easyedit.delta.metadata import sealed
from locft_easyedit.errors import DeltaError, OutputError
from locft_easyedit.utils.hashing import json_sha256, tensor_sha256

PLACE = "model.layers.2.mlp.down_proj.weight"
FRESH = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("good") / "edit.safetensors"
    made_delta().save(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "edit.safetensors"
    path.write_bytes(content)
    return path


def head_of(content):
    [length] = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_head(head, data):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed_head(path, change):
    head, data = head_of(path.read_bytes())
    path.write_bytes(with_head(change(head) or head, data))


def changed_about(path, change, *, seal=True):
    """Changes what the file says; its own checksums are made to agree, as a forger would do."""

    def within(head):
        about = json.loads(head["__metadata__"][METADATA_KEY])
        about = change(about) or about
        if seal:
            about = sealed(about)
        head["__metadata__"][METADATA_KEY] = json.dumps(about)

    changed_head(path, within)


# What is in a file


def test_it_is_an_ordinary_safetensors_file(path):
    tensors, delta = load_file(path), Delta.load(path)
    assert set(tensors) == {PLACE, f"original.{PLACE}"}
    assert torch.equal(tensors[PLACE], delta.new[PLACE])
    assert torch.equal(tensors[f"original.{PLACE}"], delta.original[PLACE])
    assert delta.metadata == made_delta().metadata | {
        key: delta.metadata[key] for key in ("created", "checksum")
    }


def test_low_rank_factors_are_kept(tmp_path):
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    delta = made_delta()
    about = dict(delta.metadata) | {"lora": {"rank": 4, "alpha": 8.0}}
    about["matrices"] = {
        PLACE: about["matrices"][PLACE] | {"lora_A": tensor_sha256(a), "lora_B": tensor_sha256(b)}
    }
    delta = Delta(delta.new, delta.original, sealed(about), {PLACE: (a, b)})
    delta.save(tmp_path / "edit")
    loaded = Delta.load(tmp_path / "edit")
    assert all(torch.equal(x, y) for x, y in zip(loaded.lora[PLACE], (a, b), strict=True))
    assert loaded.metadata["lora"] == {"rank": 4, "alpha": 8.0}
    assert loaded.id != made_delta().id
    with pytest.raises(DeltaError, match=r"lora_A.* is no factor of rank 4"):
        Delta(delta.new, {}, delta.metadata, {PLACE: (a.t(), b)}).save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_values_and_what_they_replaced_may_share_their_memory(tmp_path):
    delta = made_delta()
    one = Delta(delta.new, delta.new, delta.metadata)
    with pytest.raises(DeltaError, match="its numbers are not the ones described"):
        one.save(tmp_path / "edit")
    about = dict(delta.metadata)
    about["matrices"] = {
        PLACE: about["matrices"][PLACE] | {"original": about["matrices"][PLACE]["new"]}
    }
    Delta(delta.new, delta.new, sealed(about)).save(tmp_path / "edit")
    assert torch.equal(Delta.load(tmp_path / "edit").original[PLACE], delta.new[PLACE])


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        made_delta().save(tmp_path / "none" / "edit")


def test_texts_that_a_terminal_would_obey_are_not_written(tmp_path):
    import dataclasses

    from helpers.toys import toy_hparams

    model = toy_model()
    delta = made_delta(model=model)
    hparams = toy_hparams(model_name="bad\x1b[2Jname")
    result = dataclasses.make_dataclass("Result", ["new", "original", "losses", "lora"])(
        delta.new, delta.original, [1.0], None
    )
    again = Delta.from_result(
        result,
        model,
        hparams,
        [{"prompt": "a", "target_new": "b"}],
        metrics={"post": {"x\n": math.nan, "y": np.float32(0.5), "z": torch.int8}},
    )
    again.save(tmp_path / "edit")
    about = Delta.load(tmp_path / "edit").metadata
    assert about["base_model"] == "bad?[2Jname"
    assert about["metrics"] == {"post": {"x?": None, "y": 0.5, "z": "torch.int8"}}


# Files that are no edits

ENTRY = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWICE = b"{" + ENTRY + b"," + ENTRY + b"}"  # `safe_open` takes the last one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header too small"),
        (b"short", "header too small"),
        (b"\x80\x04\x95not a pickle to be opened", "no safetensors file"),
        (b"\xff" * 100, "no safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "header too large"),
        (struct.pack("<Q", 10**7) + b"{}", "invalid header length"),
        (with_head(b"[]", b""), "invalid type: sequence"),
        (with_head(b"{" * 3000, b""), "invalid JSON in header"),
        (with_head(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""), "recursion limit"),
        (with_head(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", b""), "invalid type: sequence"),
        (with_head(TWICE, bytes(4)), "the key 'a' is given twice"),
        (with_head(b"\xff\xfe", b""), "invalid UTF-8"),
        (with_head(b'{"__metadata__":{"locft_delta":3}}', b""), "expected a string"),
        (with_head(b'{"__metadata__":{"locft_delta":"[]"}}', b""), "is no mapping"),
        (with_head(b'{"__metadata__":{"locft_delta":"NaN"}}', b""), "is no mapping"),
        (with_head(b'{"__metadata__":{"locft_delta":"{"}}', b""), "is no JSON"),
        (with_head(b'{"__metadata__":{"locft_delta":"' + b"9" * 10_000 + b'"}}', b""), "is no JS"),
        (with_head(b'{"__metadata__":{"locft_delta":"' + b"[" * 9999 + b'"}}', b""), "is no JSON"),
    ],
    ids=range(18),
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / "edit"
    path.write_bytes(content)
    with pytest.raises(DeltaError, match=message):
        Delta.load(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it for reading would wait for ever
    for name, message in (
        ("pipe", "is no regular file"),
        (".", "is no regular file|Is a directory"),
        ("none", "cannot be read: No such file"),
        ("null\0byte", "cannot be read"),
    ):
        with pytest.raises(DeltaError, match=message):
            Delta.load(tmp_path / name if "\0" not in name else name)


def test_a_plain_safetensors_file(tmp_path):
    save_file({PLACE: torch.ones(3)}, tmp_path / "edit")
    with pytest.raises(DeltaError, match="is a safetensors file, but no edit"):
        Delta.load(tmp_path / "edit")


# Damage


@FRESH
@given(st.data())
def test_a_flipped_byte_is_found(path, content, data):
    place = data.draw(
        st.one_of(st.integers(0, 3000), st.integers(0, len(content) - 1)), label="place"
    )
    flipped = bytearray(content)
    flipped[place] ^= data.draw(st.integers(1, 255), label="bits")
    path.write_bytes(flipped)
    try:
        delta = Delta.load(path)
    except DeltaError:
        return
    # JSON's white space and the padding of the head say nothing; nor do other names beside ours.
    assert delta.metadata == load_good(path, content).metadata
    assert torch.equal(delta.new[PLACE], load_good(path, content).new[PLACE])


def load_good(path, content):
    path.write_bytes(content)
    return Delta.load(path)


@FRESH
@given(st.integers(0, 10**6))
def test_a_file_that_is_cut_short_is_refused(path, content, length):
    path.write_bytes(content[: length % len(content)])
    with pytest.raises(DeltaError, match="edit"):
        Delta.load(path)


@FRESH
@given(st.binary(max_size=300), st.booleans())
def test_bytes_of_any_kind(path, content, noise, as_head):
    path.write_bytes(with_head(noise, content[-100:]) if as_head else noise)
    with pytest.raises(DeltaError, match="edit"):
        Delta.load(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths_in(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in items:
        if isinstance(entry, (dict, list)):
            yield from paths_in(entry, (*prefix, key))
        else:
            yield (*prefix, key)


@FRESH
@given(st.data())
def test_no_other_error_whatever_the_head_says(path, content, data):
    path.write_bytes(content)
    head, tensors = head_of(content)
    about = json.loads(head["__metadata__"][METADATA_KEY])
    in_about = data.draw(st.booleans(), label="in the edit's own words")
    tree = about if in_about else head
    places = [p for p in paths_in(tree) if p]
    place = data.draw(st.sampled_from(places), label="place")
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]), label="action")
    if action == "remove":
        del parent[place[-1]]
    elif action == "add" and isinstance(parent, dict):
        parent[data.draw(st.text(max_size=8))] = data.draw(JSON)
    else:
        parent[place[-1]] = data.draw(JSON, label="value")
    if in_about:
        with suppress(KeyError, TypeError, ValueError):
            about = sealed(about)  # a forger makes the checksums agree
        head["__metadata__"][METADATA_KEY] = json.dumps(about)
    path.write_bytes(with_head(head, tensors))
    with suppress(DeltaError):
        Delta.load(path)


# Forgeries


def put(key, value):
    def change(about):
        about[key] = value

    return change


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", 2), "it is of format 2; this version reads format 1. Update"),
        (put("format", True), "it is of format True"),
        (put("surprise", 1), "unknown key 'surprise'"),
        (lambda about: about.pop("hparams") and None, "lacks `hparams`"),
        (put("base_model", "x\x1b[2J"), "`base_model` must hold finite numbers and print"),
        (put("base_model", "x" * 5000), "`base_model` must hold finite numbers and print"),
        (put("base_model", "\ud800"), "`base_model` must hold finite numbers and print"),
        (put("matrices", {}), "`matrices` names no matrix"),
        (put("matrices", []), r"`matrices` is \[\], not a mapping"),
        (put("losses", [1.0, "x"]), r"`losses` is \[1.0, 'x'\], not a list of numbers"),
        (put("losses", [True]), "`losses` is .*, not a list of numbers"),
        (put("losses", [math.nan]), "`losses` must hold finite numbers and print"),
        (put("created", "yesterday"), "`created` is 'yesterday', not a time"),
        (put("lora", {"rank": 0, "alpha": 1}), "`rank` of `lora` is 0, not a whole number, 1 or"),
        (put("lora", {"rank": 1, "alpha": 1}), "lacks `lora_A`"),
        (put("requests", {"sha256": "0" * 64, "count": -1}), "`count` of `requests` is -1, not a"),
        (put("requests", {"sha256": "z" * 64, "count": 1}), "`sha256` of .* not a hash of 64"),
        (put("frozen", {"a\nb": "0" * 16}), "`frozen` must hold finite numbers and print"),
        (put("frozen", {"a b": "0" * 16}), "holds 'a b', which is no name"),
        (put("frozen", {PLACE: "0" * 16}), "is both changed and unchanged"),
        (put("frozen", {"a": "0" * 15}), "`a` of `frozen` is '0+', not a hash of 16"),
        (put("hparams", {"x": {"y": "\n"}}), "`hparams` must hold finite numbers and print"),
        (put("hparams", nested(900)), "`hparams` must hold finite numbers and print"),
        (put("metrics", {"x": 10**30}), "`metrics` must hold finite numbers and print"),
        (put("hparams", [1]), r"`hparams` is \[1\], not a mapping"),
        (put("versions", {"torch": 2}), "`versions` is .*, not a mapping of texts"),
    ],
    ids=range(26),
)
def test_words_that_are_not_as_they_should_be(path, change, message):
    changed_about(path, change, seal=False)
    with pytest.raises(DeltaError, match=message):
        Delta.load(path)


def describe(**changes):
    def change(about):
        about["matrices"][PLACE] |= changes

    return change


def rename(name):
    def change(about):
        about["matrices"] = {name: about["matrices"][PLACE]}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (describe(shape=[32, 65]), r"float32 \[32, 64\], described as float32 \[32, 65\]"),
        (describe(shape=[0, 64]), "`shape` of .*, not a list of 1 to 8"),
        (describe(shape=[2**60, 2**60]), "`shape` of .*, not a list of 1 to 8"),
        (describe(shape=[True, 64]), "`shape` of .*, not a list of 1 to 8"),
        (describe(dtype="float64"), "`dtype` of .*, not one of float32, bfloat16, float16"),
        (describe(dtype="float16"), r"is float32 .* described as float16"),
        (describe(new="0" * 64), r"`model[^ ]*`: its numbers are not the ones described"),
        (describe(original="0" * 64), r"`original[^ ]*`: its numbers are not the ones described"),
        (describe(extra=1), "has the unknown key 'extra'"),
        (rename("model.layers.4.mlp.down_proj.weight"), "belongs to nothing"),
        (rename("original.weight"), "is no name that a parameter can have"),
        (rename("a b"), "is no name that a parameter can have"),
        (rename("a\x1b[2J"), "`matrices` must hold finite numbers and print"),
        (rename("x" * 600), "is no name that a parameter can have"),
    ],
    ids=range(14),
)
def test_matrices_that_are_not_as_described(path, change, message):
    changed_about(path, change)
    with pytest.raises(DeltaError, match=message):
        Delta.load(path)


def test_all_problems_at_once(path):
    def change(about):
        about["losses"], about["created"], about["base_model"] = "x", "y", 3

    changed_about(path, change)
    with pytest.raises(DeltaError, match=r"(?s)`base_model`.*`losses`.*`created`"):
        Delta.load(path)


def test_words_that_were_changed_afterwards(path, content):
    changed_about(path, put("base_model", "another"), seal=False)
    with pytest.raises(DeltaError, match="the checksum differs"):
        Delta.load(path)
    path.write_bytes(content)

    def renamed(about):
        about = {key: value for key, value in about.items() if key != "checksum"}
        about["id"] = "0" * 64
        return about | {"checksum": json_sha256(about)}

    changed_about(path, renamed, seal=False)
    with pytest.raises(DeltaError, match="`id` does not belong to its hashes"):
        Delta.load(path)


def test_values_that_are_no_numbers(tmp_path):
    delta = made_delta()
    for value in (math.nan, math.inf):
        new = delta.new[PLACE].clone()
        new[3, 3] = value
        about = dict(delta.metadata)
        about["matrices"] = {PLACE: about["matrices"][PLACE] | {"new": tensor_sha256(new)}}
        path = tmp_path / "edit"
        text = json.dumps(sealed(about))
        tensors = {PLACE: new, f"original.{PLACE}": delta.original[PLACE]}
        save_file(tensors, path, metadata={METADATA_KEY: text})
        with pytest.raises(DeltaError, match="holds NaN or infinite values"):
            Delta.load(path)


def test_tensors_that_overlap(path):
    def change(head):
        head[PLACE]["data_offsets"] = head[f"original.{PLACE}"]["data_offsets"]

    changed_head(path, change)
    with pytest.raises(DeltaError, match="invalid offset for tensor"):
        Delta.load(path)


def test_a_hidden_tensor(path):
    def change(head):
        head["hidden"] = {"dtype": "F32", "shape": [1], "data_offsets": [16384, 16388]}

    changed_head(path, change)
    path.write_bytes(path.read_bytes() + bytes(4))
    with pytest.raises(DeltaError, match="the tensor 'hidden' belongs to nothing"):
        Delta.load(path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DeltaError, match="has 4 bytes behind its last tensor"):
        Delta.load(path)


def test_appended_bytes_are_not_called_cut_short(tmp_path):
    path = tmp_path / "edit.safetensors"
    made_delta().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"12345")
    with pytest.raises(DeltaError, match="has 5 bytes behind its last tensor"):
        Delta.load(path)
    path.write_bytes(whole[:-5])
    with pytest.raises(DeltaError, match="cut short"):
        Delta.load(path)
