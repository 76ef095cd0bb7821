"""Hyper-parameters of any shape, and files that hold them: a result, or one typed error."""

import json
import os
import time

import pytest
import yaml
from helpers.hostile import Deep, attempt, real, values
from helpers.toys import toy_hparams, toy_model, toy_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locft_easyedit.errors import HyperParamsError, ModelError
from locft_easyedit.hparams import LocFTBFHyperParams, read_mapping
from locft_easyedit.modeling.loading import load_model

GOOD = {
    "alg_name": "LocFT-BF",
    "model_name": "folder",
    "layers": [2],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight",
    "lr": 1e-3,
}
KEYS = st.sampled_from(sorted(toy_hparams().to_dict()))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, values(KEYS), max_size=4), st.booleans())
@example({"lr": 10**400}, True)
@example({"layers": [10**400]}, True)
@example({"layers": Deep(5000)}, True)
@example({"rewrite_module_tmp": Deep(900)}, True)
@example({"row_tokens": 2**31}, True)
@example({"model_name": [1, 2]}, True)
@example({"model_name": "${oc.env:HOME}"}, True)
@example({"prefix_dir": "a\0b"}, True)
@example({"device": "\ud800"}, True)
def test_any_mapping_is_hyper_parameters_or_refused(changes, whole):
    values = (GOOD if whole else {}) | real(changes)
    h, refused = attempt(HyperParamsError, LocFTBFHyperParams.from_mapping, values, source="it")
    if not refused:
        kept = {k: v for k, v in h.to_dict().items() if v is not None}
        again = LocFTBFHyperParams.from_mapping(kept, source="again")
        assert again.to_dict() == h.to_dict()  # and goes through JSON
        assert json.loads(json.dumps(kept)) == kept


@pytest.mark.parametrize(
    "value", [None, 5, "a", [], [("lr", 1)], {1: 2}, {(1, 2): 3}, {"a" * 9999: 1}]
)
def test_what_is_no_mapping_of_known_keys_is_refused(value):
    with pytest.raises(HyperParamsError, match=r"holds|is missing|is not a key") as raised:
        LocFTBFHyperParams.from_mapping(value, source="it")
    assert len(str(raised.value)) < 2000


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
@example(b"\xff\xfea\x00")
@example(b"a: !!timestamp x")
@example(b"a: !!bool x")
@example(b"a: !!int ''")
@example(b"a: 2001-99-99")
@example(b"a: !!python/object/apply:os.system [x]")
@example(b"? [a, b]\n: c")
@example(b"a: " + b"[" * 5000)
@example(b"a: " + b"9" * 5000)
@example(b'{"a": ' + b"9" * 5000 + b"}")
@example(b"{" * 5000)
@example(b"\0")
@example(b"<<: {lr: 1}")
@example(b"<<: 5")
@example(b"lr: 1\nlr: 2")
def test_any_bytes_are_a_mapping_or_refused(tmp_path_factory, content):
    for suffix in (".yaml", ".json"):
        path = tmp_path_factory.getbasetemp() / f"h{suffix}"
        path.write_bytes(content)
        found, refused = attempt(HyperParamsError, read_mapping, path)
        assert refused or isinstance(found[1], dict)
        attempt(HyperParamsError, LocFTBFHyperParams.from_hparams, path)


@settings(max_examples=12, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.floats(1e-9, 1.0),
            "num_steps": st.integers(1, 99),
            "layers": st.lists(st.integers(0, 99), min_size=1, unique=True),
            "on_conflict": st.sampled_from(["train", "error", "last"]),
            "prefix_dir": st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=9),
        },
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, changes):
    h = LocFTBFHyperParams.from_mapping(GOOD | changes, source="it")
    kept = {k: v for k, v in h.to_dict().items() if v is not None}
    for name, text in (("a.json", json.dumps(kept)), ("a.yaml", yaml.safe_dump(kept))):
        path = tmp_path_factory.getbasetemp() / name
        path.write_text("\ufeff" + text, encoding="utf-8")  # a byte-order mark is no mistake
        assert LocFTBFHyperParams.from_hparams(path).to_dict() == h.to_dict()


def written(path, content):
    path.write_text(content)
    return path


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (BOMB, "a.yaml", r"aliases \(\*a\) are not read: write the value out"),
        ("lr: 1\nlr: 2", "a.yaml", "the key 'lr' is given twice"),
        ('{"lr": 1, "lr": 2}', "a.json", "the key 'lr' is given twice"),
        ("[" * 9999, "a.json", "nested too deeply"),
        ("[" * 9999, "a.yaml", "nested too deeply"),
        ("a: !!bool x", "a.yaml", "a value is not what its tag says"),
        ("lr: 1 # " + "x" * 2**20, "a.yaml", "has more than 1048576 bytes"),
        ("- lr", "a.yaml", "holds list, not keys with values"),
    ],
)  # fmt: skip
def test_files_are_refused_with_the_reason(tmp_path, content, name, message):
    with pytest.raises(HyperParamsError, match=message):
        read_mapping(written(tmp_path / name, content))


@pytest.mark.parametrize("name", ["", ".", "/", "a\0b", "x" * 5000, "\ud800", None, 5, "no/where"])
def test_names_of_no_file(name):
    with pytest.raises(HyperParamsError, match="is not a file"):
        read_mapping(name)


def test_folders_and_pipes_are_no_files(tmp_path):
    (tmp_path / "a.yaml").mkdir()
    os.mkfifo(tmp_path / "b.yaml")  # opened, it would be waited for
    for name in ("a", "b"):
        with pytest.raises(HyperParamsError, match="is not a file"):
            read_mapping(tmp_path / name)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = written(tmp_path / "a.yaml", "lr: 1")

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(HyperParamsError, match=r"cannot be read: Permission denied\. Give a file"):
        read_mapping(path)


@pytest.mark.parametrize(
    "key", ["model_name", "prefix_dir", "api_key", "rewrite_module_tmp", "device"]
)
@pytest.mark.parametrize("text", ["${oc.env:SECRET}", "a${lr}", "${now:%Y}"])
def test_a_value_from_a_file_reads_no_environment_variable(tmp_path, monkeypatch, key, text):
    monkeypatch.setenv("SECRET", "hidden-1234")
    path = written(tmp_path / "a.yaml", yaml.safe_dump(GOOD | {key: text}))
    with pytest.raises(
        HyperParamsError, match=rf"`{key}=.*` holds `\$\{{`; nothing is put"
    ) as raised:
        LocFTBFHyperParams.from_hparams(path)
    assert "hidden" not in str(raised.value)
    with pytest.raises(HyperParamsError, match=r"holds `\$\{`"):
        LocFTBFHyperParams.from_mapping(GOOD | {"rewrite_module_tmp": [text]}, source="it")


@pytest.mark.parametrize("key", ["model_name", "prefix_dir", "rewrite_module_tmp"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("a\0{}", "holds a NUL character. Remove it"), ("\ud800{}", "holds a lone surrogate. Clean")],
    ids=["NUL", "surrogate"],
)
def test_a_name_that_no_file_can_have(key, text, message):
    for value in (text, [text]) if key == "rewrite_module_tmp" else (text,):
        with pytest.raises(HyperParamsError, match=f"`{key}=.*` {message}"):
            LocFTBFHyperParams.from_mapping(GOOD | {key: value}, source="it")


# Model folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    toy_model().save_pretrained(folder, max_shard_size="50KB")
    toy_tokenizer().save_pretrained(folder)
    return folder


def test_a_list_without_end_is_refused_at_once():
    begun = time.perf_counter()
    with pytest.raises(HyperParamsError, match="`layers` has 100000 entries; at most 1000"):
        toy_hparams(layers=list(range(100_000)))
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "cannot be loaded as a causal language model"),
        ("config.json", "5", "cannot be loaded as a causal language model"),
        ("config.json", "[" * 9999, "cannot be loaded as a causal language model"),
        ("config.json", '{"model_type": 5}', "cannot be loaded as a causal language model"),
        ("config.json", "\0", "cannot be loaded as a causal language model"),
        ("tokenizer.json", "[]", "cannot be loaded as a causal language model"),
        ("tokenizer_config.json", "[5]", "cannot be loaded as a causal language model"),
        ("adapter_config.json", "[5]", "cannot be loaded as a causal language model"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', "no file of"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/x.safetensors"}}', "no file of"),
        ("model.safetensors.index.json", '{"weight_map": {"a": ".."}}', "lacks 1 of its 1 parts"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "is damaged"),
        ("model.safetensors.index.json", '{"weight_map": [5]}', "is damaged"),
        ("model.safetensors.index.json", "[" * 9999, "is damaged"),
    ],
)
def test_damaged_model_folders(saved, tmp_path, file, content, message):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / file).write_text(content)
    if file == "adapter_config.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=message) as raised:
        load_model(toy_hparams(model_name=str(folder), device="cpu"))
    assert len(str(raised.value)) < 2000
