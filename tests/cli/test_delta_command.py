"""`locft delta`, as a user runs it, on a toy model in a folder."""

import json
import re

import pytest
import torch
from helpers.toys import made_delta, toy_model, toy_tokenizer
from transformers import AutoModelForCausalLM

from locft_easyedit.__main__ import main
from locft_easyedit.delta.delta import Delta


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A toy model's folder, two edits one on top of the other, and one that lacks originals."""
    monkeypatch.chdir(tmp_path)
    model = toy_model()
    model.save_pretrained("base")
    toy_tokenizer(pad_is_eos=True).save_pretrained("base")
    for i, layer in enumerate((2, 1)):
        delta = made_delta(model=model, layer=layer)
        delta.save(f"{i}.safetensors")
        delta.save(f"{i}-lean.safetensors", originals=False)
    model.save_pretrained("edited")
    return tmp_path


def values_in(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def test_show(files, capsys):
    assert main(["delta", "show", "0.safetensors", "json=said.json"]) == 0
    printed = capsys.readouterr().out
    delta = Delta.load("0.safetensors")
    for text in (delta.short_id, "32 x 64", "float32", "rewrite_acc", "1.000", "with this file"):
        assert text in printed
    said = json.loads((files / "said.json").read_text())
    assert {key: said[key] for key in delta.metadata} == json.loads(json.dumps(delta.metadata))
    assert said["relative_change"] == {next(iter(delta.new)): pytest.approx(2.5, abs=0.01)}
    assert said["bytes"] == 2 * 32 * 64 * 4
    assert main(["delta", "show", "0-lean.safetensors"]) == 0
    assert "with the base model's folder" in capsys.readouterr().out


def test_show_breaks_no_name(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["delta", "show", "0.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("model.layers.2.mlp.down_proj.weight") == 2


def test_show_takes_no_text_for_markup_and_no_text_for_a_number(files, capsys):
    from locft_easyedit.delta.metadata import sealed

    delta = Delta.load("0.safetensors")
    said = {"base_model": "[red]x[/nothing]", "metrics": {"post": {"a[/b]": "text", "c[/d]": 0.5}}}
    forged = type(delta)(delta.new, delta.original, sealed(delta.metadata | said))
    forged.save("forged.safetensors")
    assert main(["delta", "show", "forged.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "[red]x[/nothing]" in printed
    assert "c[/d]" in printed
    assert "text" not in printed


def test_there_and_back(files, capsys):
    assert (
        main(["delta", "apply", "0.safetensors", "1.safetensors", "model=base", "output=out"]) == 0
    )
    assert "only the files with edited matrices rewritten" in capsys.readouterr().out
    assert same(values_in("out"), values_in("edited"))
    back = ["delta", "revert", "1.safetensors", "0.safetensors", "model=out", "output=back"]
    assert main(back) == 0
    assert same(values_in("back"), values_in("base"))
    lean = ["delta", "revert", "1-lean.safetensors", "model=out"]
    assert main([*lean, "output=no"]) == 2
    assert "base=FOLDER" in capsys.readouterr().err
    assert main([*lean, "output=one", "base=base"]) == 0
    assert main(["delta", "apply", "0-lean.safetensors", "model=base", "output=first"]) == 0
    assert same(values_in("one"), values_in("first"))


def test_verify(files, capsys):
    assert main(["delta", "verify", "1.safetensors"]) == 0
    assert "is whole; all hashes are right" in capsys.readouterr().out
    for name, model, state, status in (
        ("0", "base", "base", 0),
        ("1", "base", "neither", 1),
        ("1", "edited", "applied", 0),
        ("0", "edited", "neither", 1),
    ):
        assert main(["delta", "verify", f"{name}.safetensors", f"model={model}"]) == status
        printed = capsys.readouterr().out
        assert f"{model}: {state}: " in printed
        assert ("1 of 38 other parameters" in printed) == bool(status)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eat", "x"], "`eat` is nothing that can be done with an edit"),
        (["show"], "needs one edit; 0 were given"),
        (["show", "0.safetensors", "1.safetensors"], "needs one edit; 2 were given"),
        (["apply", "model=base", "output=out"], "needs at least one edit"),
        (["apply", "0.safetensors", "model=base"], "`output` is missing"),
        (["apply", "0.safetensors", "modle=base", "output=out"], "Did you mean `model`"),
        (["apply", "0.safetensors", "model=nowhere", "output=out"], r"no folder with a config"),
        (["apply", "0.safetensors", "model=base", "output=base"], "is there already"),
        (["apply", "none.safetensors", "model=base", "output=out"], "cannot be read: No such"),
        (["apply", "base/config.json", "model=base", "output=out"], "no safetensors file"),
        (["apply", "1.safetensors", "model=base", "output=out"], "An edit is missing there"),
        (["revert", "0.safetensors", "model=base", "output=out"], "it is not in there"),
        (["revert", "0.safetensors", "--force"], "is no option here"),
    ],
    ids=str,
)
def test_bad_arguments(files, capsys, arguments, message):
    assert main(["delta", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err
    assert not (files / "out").exists()


def test_help(capsys):
    for arguments in (["delta"], ["delta", "--help"], ["delta", "apply", "-h"]):
        assert main(arguments) == 0
        assert "locft delta apply FILE [FILE ...]" in capsys.readouterr().out
