"""Hyper-parameters: read as EasyEdit reads them, but strictly, and with all problems at once."""

import dataclasses
import json

import pytest
import torch
import yaml

from locft_easyedit.errors import HyperParamsError
from locft_easyedit.hparams import OTHER_METHODS_KEYS, LocFTBFHyperParams, hparams_folder
from locft_easyedit.hparams_rules import PLUS_NAME

TEMPLATE = "model.layers.{}.mlp.down_proj.weight"
VALID = {
    "alg_name": "LocFT-BF",
    "model_name": "./models/some-model",
    "layers": [2],
    "rewrite_module_tmp": TEMPLATE,
    "lr": 5e-4,
}
SHIPPED = sorted(hparams_folder().glob("*.yaml"))


def made(**values):
    return LocFTBFHyperParams(**VALID | values)


@pytest.fixture
def written(tmp_path):
    """Writes values, or a file's whole text, and returns the path."""

    def write(content, name="hparams.yaml"):
        path = tmp_path / name
        if not isinstance(content, str):
            content = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
        path.write_text(content, encoding="utf-8")
        return path

    return write


def problems_of(path):
    """Returns the lines of the one error that the file gives."""
    with pytest.raises(HyperParamsError, match="  - `") as caught:
        LocFTBFHyperParams.from_hparams(path)
    title, *lines = str(caught.value).split("\n")
    assert title == f"{path}:"
    assert all(line.startswith("  - `") for line in lines)
    return lines


@pytest.mark.parametrize("name", ["hparams.yaml", "hparams.yml", "hparams.json"])
def test_yaml_and_json_give_the_same_values(written, name):
    h = LocFTBFHyperParams.from_hparams(written(VALID, name))
    assert h == made()
    assert (h.layers, h.rewrite_module_tmp, h.lr) == ([2], TEMPLATE, 5e-4)


@pytest.mark.parametrize("name", ["small", "Llama-3.1-8B", "a.b.c"])
def test_yaml_suffix_may_be_left_out(written, name):
    path = written(VALID, name + ".yaml")
    assert LocFTBFHyperParams.from_hparams(path.with_name(name)) == made()
    assert LocFTBFHyperParams.from_hparams(str(path.with_name(name))) == made()


def test_from_json_is_another_name(written):
    assert LocFTBFHyperParams.from_json(written(VALID, "hparams.json")) == made()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_loads(path):
    h = LocFTBFHyperParams.from_hparams(path)
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert getattr(h, key) == (float(value) if key == "lr" else value)


def test_some_files_are_shipped():
    assert SHIPPED


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "1e-4", 1e-4),  # YAML 1.1 takes it for a string
        ("lr", "'0.5'", 0.5),
        ("lr", "1", 1.0),
        ("weight_decay", "1E-2", 0.01),
        ("num_steps", "'7'", 7),
        ("layers", "['3', 4]", [3, 4]),
        ("fp16", "yes", True),
        ("packing", "'off'", False),
        ("device", "1", 1),
        ("device", "cuda:1", "cuda:1"),
        ("device", "null", None),
        ("dtype", "null", None),
        ("micro_batch_size", "null", None),
        ("num_steps", "null", 25),
        ("num_steps", "???", 25),
        ("rewrite_module_tmp", "['a.{}', 'b.{}.c']", ["a.{}", "b.{}.c"]),
    ],
)
def test_values_become_their_type(written, key, text, value):
    lines = [f"{k}: {json.dumps(v)}" for k, v in VALID.items() if k != key]
    h = LocFTBFHyperParams.from_hparams(written("\n".join([*lines, f"{key}: {text}"])))
    assert getattr(h, key) == value
    assert type(getattr(h, key)) is type(value)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"fp16": True}, torch.float16),
        ({"fp16": True, "dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_the_precision_that_is_asked_for(values, dtype, device):
    assert made(**values).dtype_on(device) is dtype


def test_the_precision_that_nobody_asks_for():
    assert made().dtype_on("cpu") is torch.float32
    assert made().dtype_on(torch.device("cuda")) is torch.bfloat16


BAD_VALUES = [
    ("num_steps", 2.5, "whole number"),
    ("num_steps", "many", "whole number"),
    ("num_steps", True, "whole number"),
    ("num_steps", 0, "must be 1 or more"),
    ("lr", "abc", "a number"),
    ("lr", [1e-4], "a number"),
    ("lr", 0, "must be above 0"),
    ("lr", -1e-4, "must be above 0"),
    ("lr", "nan", "must be above 0 and finite"),
    ("lr", "inf", "must be above 0 and finite"),
    ("layers", 5, "a list of whole numbers"),
    ("layers", "5", "a list of whole numbers"),
    ("layers", ["a"], "a list of whole numbers"),
    ("layers", [1.5], "a list of whole numbers"),
    ("layers", [None], "a list of whole numbers"),
    ("layers", ["???"], "a list of whole numbers"),
    ("layers", [[1]], "a list of whole numbers"),
    ("layers", {"first": 1}, "a list of whole numbers"),
    ("layers", [], "is empty"),
    ("layers", [-1], "has a negative layer"),
    ("layers", [3, 3], "names a layer twice"),
    ("fp16", "maybe", "true or false"),
    ("device", 1.5, "cuda:N"),
    ("dtype", "half", "must be one of float32, bfloat16, float16"),
    ("weight_decay", -0.1, "must be 0 or more"),
    ("preserve_strength", 0, "must be above 0 and at most 1e"),
    ("preserve_strength", 1e250, "must be above 0 and at most 1e"),
    ("preserve_strength", "nan", "must be above 0 and at most 1e"),
    ("augment_model", " ", "must be edited, the folder of a model, endpoint:NAME, or null"),
    ("augment_model", "endpoint: ", "must be edited, the folder of a model"),
    ("augment_cache", " ", "must be a file"),
    ("augment_cache", "~no-such-user/x", "must be a file"),
    ("preserve_dir", " ", "must be a folder"),
    ("preserve_dir", "~no-such-user/x", "must be a folder"),
    ("pipeline", "widest_first", "must be one of breadth_first, depth_first"),
    ("loss_average", "word", "must be edit or token"),
    ("lr_schedule", "linear", "must be constant or cosine"),
    ("batch_size", 0, "must be 1 or more"),
    ("eval_batch_size", 0, "must be 1 or more"),
    ("max_length", 0, "must be 1 or more"),
    ("row_tokens", 0, "must be 1 or more"),
    ("micro_batch_size", 0, "must be 1 or more, or null"),
    ("min_batches", 0, "must be 1 or more, or null"),
    ("min_batches", 2**31, "must be below 2**31"),
    ("forms_per_epoch", 0, "must be above 0"),
    ("forms_per_epoch", "nan", "must be above 0"),
    ("forms_per_epoch", "inf", "must be below 2**31"),
    ("seed", -1, "must be 0 or more"),
    ("seed", 2**64, "seed"),  # torch's generators take 64 bits
    ("batch_loss_threshold", -1, "must be 0 or more"),
    ("epoch_loss_threshold", "nan", "must be 0 or more"),
    ("on_conflict", "first", "must be one of train, error, last"),
    ("evaluation_type", "chat", "LLM-judge, generate-text"),
    ("model_name", 5, "model_name"),
    ("model_name", {"path": "x"}, "model_name"),
    ("rewrite_module_tmp", "lm_head.weight", "must hold {} once"),
    ("rewrite_module_tmp", "layers.{}.mlp.{}", "must hold {} once"),
    ("rewrite_module_tmp", ["layers.{}", "norm"], "must hold {} once"),
    ("rewrite_module_tmp", ["layers.{}", 5], "must hold {} once"),
    ("rewrite_module_tmp", "layers.{}.{0}", "must hold {} once"),
    ("rewrite_module_tmp", "layers.{}.{name}", "must hold {} once"),
    ("rewrite_module_tmp", "layers.{}.{", "must hold {} once"),
    ("rewrite_module_tmp", [], "a text or a list of texts"),
    ("rewrite_module_tmp", 5, "a text or a list of texts"),
]


@pytest.mark.parametrize(("key", "value", "rule"), BAD_VALUES, ids=lambda x: str(x)[:30])
def test_bad_value_is_one_line(written, key, value, rule):
    (line,) = problems_of(written(VALID | {key: value}))
    assert f"`{key}=" in line
    assert rule in line


def test_fp16_contradicts_bfloat16(written):
    (line,) = problems_of(written(VALID | {"fp16": True, "dtype": "bfloat16"}))
    assert "`fp16=True` contradicts `dtype='bfloat16'`" in line


def test_a_falling_rate_needs_epochs(written):
    (line,) = problems_of(written(VALID | {"pipeline": "depth_first", "lr_schedule": "cosine"}))
    assert "`lr_schedule='cosine'` does not go with `pipeline=depth_first`" in line


def test_an_epochs_mini_batches_need_epochs(written):
    (line,) = problems_of(written(VALID | {"pipeline": "depth_first", "min_batches": 10}))
    assert "`min_batches=10` does not go with `pipeline=depth_first`" in line


@pytest.mark.parametrize(
    ("values", "n", "size"),
    [
        ({}, 7, 100),  # as published, whatever there is
        ({"min_batches": 4}, 7, 1),
        ({"min_batches": 4}, 8, 2),
        ({"min_batches": 4}, 5000, 100),
        ({"min_batches": 4, "batch_size": 3}, 5000, 3),
        ({"alg_name": PLUS_NAME}, 7, 1),
        ({"alg_name": PLUS_NAME}, 119, 11),
        ({"alg_name": PLUS_NAME}, 3000, 100),
        ({"alg_name": PLUS_NAME, "min_batches": 1}, 119, 100),
        ({"alg_name": PLUS_NAME, "pipeline": "depth_first"}, 119, 100),
    ],
)
def test_few_edits_have_smaller_mini_batches(values, n, size):
    given = made(**values)
    assert given.of_edits(n) == dataclasses.replace(given, batch_size=size)


def test_unknown_key_gets_the_nearest(written):
    line, other = problems_of(written(VALID | {"num_step": 5, "qqqq": 1}))
    assert "`num_step` is not a key of LocFT-BF. Did you mean `num_steps`?" in line
    assert "Known keys: alg_name, model_name" in other


@pytest.mark.parametrize("key", sorted(OTHER_METHODS_KEYS))
def test_key_of_another_method(written, key):
    (line,) = problems_of(written(VALID | {key: 1}))
    assert f"`{key}` belongs to other methods of EasyEdit" in line


@pytest.mark.parametrize("value", ["absent", None, "???"])
@pytest.mark.parametrize("key", list(VALID)[1:])
def test_missing_key(written, key, value):
    values = VALID | {key: value}
    if value == "absent":
        del values[key]
    assert problems_of(written(values)) == [f"  - `{key}` is missing. Add it."]


@pytest.mark.parametrize("value", [{}, {"alg_name": None}], ids=str)
def test_missing_method(written, value):
    values = {k: v for k, v in VALID.items() if k != "alg_name"} | value
    assert problems_of(written(values)) == ["  - `alg_name` is missing. Add it."]


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"alg_name": "LocFT-BF"}, ["model_name", "layers", "rewrite_module_tmp", "lr"]),
        (
            VALID | {"lr": "abc", "fp16": "maybe", "kl_factor": 1, "layers": 5},
            ["lr", "fp16", "kl_factor", "layers"],
        ),
        (VALID | {"lr": -1, "seed": -1, "layers": []}, ["lr", "seed", "layers"]),
        # Of different kinds:
        (VALID | {"kl_factor": 1, "lr": -1}, ["kl_factor", "lr"]),
        (VALID | {"fp16": "maybe", "num_steps": 0}, ["fp16", "num_steps"]),
        ({"alg_name": "LocFT-BF", "model_name": "m", "num_steps": 0, "lr": 1, "layers": [1]},
         ["rewrite_module_tmp", "num_steps"]),
    ],
    ids=["missing", "ill-typed", "out of range", "unknown+range", "typed+range", "missing+range"],
)  # fmt: skip
def test_all_problems_in_one_error(written, content, keys):
    lines = problems_of(written(content))
    assert len(lines) == len(keys)
    for key in keys:
        assert sum(f"`{key}" in line for line in lines) == 1


@pytest.mark.parametrize("name", ["FT", "ROME", "LocFT", 5])
def test_another_method(written, name):
    path = written(VALID | {"alg_name": name, "lr": "abc"})
    with pytest.raises(HyperParamsError, match=r"is another method.*alg_name: LocFT-BF"):
        LocFTBFHyperParams.from_hparams(path)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "a.yaml", "holds NoneType, not keys with values"),
        ("# nothing\n", "a.yaml", "holds NoneType, not keys with values"),
        ("- 1\n- 2\n", "a.yaml", "holds list, not keys with values"),
        ("text", "a.yaml", "holds str, not keys with values"),
        ("[1]", "a.json", "holds list, not keys with values"),
        ("lr: [1\nlayers: 5", "a.yaml", "does not parse: (?s:.*)line 2"),
        ("lr: !!python/object:os.system x", "a.yaml", "does not parse"),
        ('{"lr": 1,}', "a.json", "does not parse: .*line 1"),
        ("", "a.json", "does not parse"),
    ],
)
def test_file_without_a_mapping(written, content, name, message):
    with pytest.raises(HyperParamsError, match=message):
        LocFTBFHyperParams.from_hparams(written(content, name))


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes("model_name: Caf\u00e9".encode("latin-1"))
    with pytest.raises(HyperParamsError, match="does not parse"):
        LocFTBFHyperParams.from_hparams(path)


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml", "nothing.json", ""])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(HyperParamsError, match=r"is not a file\. Give the path"):
        LocFTBFHyperParams.from_hparams(tmp_path / name)


@pytest.mark.parametrize(("key", "value", "rule"), BAD_VALUES, ids=lambda x: str(x)[:30])
def test_changed_value_is_checked_again(key, value, rule):
    h = made()
    setattr(h, key, value)
    with pytest.raises(HyperParamsError, match=f"`{key}=") as caught:
        h.check()
    assert rule in str(caught.value)
    with pytest.raises(HyperParamsError, match=f"`{key}="):
        made(**{key: value})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("lr", "1e-4", 1e-4), ("num_steps", "3", 3), ("fp16", "no", False), ("layers", ["3"], [3])],
)
def test_texts_become_numbers_or_an_error_in_objects_too(key, text, value):
    """Either is fine; a text that stays is not: `fp16="no"` would count as true."""
    try:
        h = made(**{key: text})
    except HyperParamsError as error:
        assert f"`{key}=" in str(error)  # noqa: PT017
    else:
        assert getattr(h, key) == value
        assert type(getattr(h, key)) is type(value)


def test_check_passes_after_a_valid_change():
    h = made()
    h.num_steps, h.layers, h.device = 3, [0, 1], None
    h.check()
    assert (h.num_steps, h.layers, h.device) == (3, [0, 1], None)


def test_loaded_pair_as_model_name():
    pair = (torch.nn.Linear(2, 2), object())
    h = made(model_name=pair)
    h.check()
    assert h.model_name is pair
    assert h.to_dict()["model_name"] == "Linear"


@pytest.mark.parametrize(
    ("tmp", "templates"),
    [(TEMPLATE, [TEMPLATE]), (["a.{}", "b.{}"], ["a.{}", "b.{}"]), (("a.{}",), ["a.{}"])],
)
def test_templates(tmp, templates):
    assert made(rewrite_module_tmp=tmp).templates == templates


@pytest.mark.parametrize(
    "values",
    [{}, {"model_name": (torch.nn.Linear(1, 1), None)}, {"rewrite_module_tmp": ["a.{}", "b.{}"]}],
)
def test_to_dict_is_json(values):
    h = made(**values)
    as_dict = h.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert list(as_dict) == [field.name for field in dataclasses.fields(h)]


def test_to_dict_reads_back(written):
    h = made(lr=1e-3, device=0, micro_batch_size=4, dtype="bfloat16")
    assert LocFTBFHyperParams.from_hparams(written(h.to_dict(), "a.json")) == h
