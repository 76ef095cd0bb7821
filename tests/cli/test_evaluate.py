"""`locft evaluate`: a model on disk, measured; locality against what it was before."""

import json

import pytest
import torch
from helpers.toys import made_delta, toy_model, toy_requests, toy_tokenizer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from locft_easyedit.__main__ import main
from locft_easyedit.evaluation.evaluation import Evaluation, finish_
from locft_easyedit.evaluation.summary import summarize

PLACE = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A toy model, the same one edited, the edit alone, and data."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = toy_model("llama"), toy_tokenizer(pad_is_eos=True)
    model.save_pretrained("base")
    made_delta(model=model).save("edit.safetensors")
    model.save_pretrained("edited")
    for name in ("base", "edited"):
        tokenizer.save_pretrained(name)
    (tmp_path / "edits.json").write_text(json.dumps(toy_requests(5)))
    return tmp_path


def written(output="outputs/evaluate"):
    with open(f"{output}/metrics.json", encoding="utf-8") as file:
        return json.load(file)


def test_a_model_alone(files, capsys):
    assert main(["evaluate", "base", "data=edits.json", "n=4"]) == 0
    records = toy_requests(4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), toy_tokenizer(pad_is_eos=True)
    measured = Evaluation(model, tokenizer, records).measure()
    expected = summarize([{"pre": {}, "post": entry} for entry in measured])
    assert written()["summary"] == json.loads(json.dumps(expected))
    assert len(written()["records"]) == 4
    printed = capsys.readouterr().out
    assert "rewrite_acc" in printed
    assert "before" not in printed
    assert "locality" not in printed  # it compares two models


def test_three_ways_to_say_what_was_before(files):
    main(["evaluate", "base", "data=edits.json", "output=one"])
    for output, more in {
        "two": ["edited", "original=base"],
        "three": ["edited", "original=one/metrics.json"],
        "four": ["base", "delta=edit.safetensors"],
    }.items():
        assert main(["evaluate", *more, "data=edits.json", f"output={output}"]) == 0
    two = written("two")
    assert two["summary"] == written("four")["summary"]
    summary = written("three")["summary"]
    # A file holds no distributions to compare with.
    summary["post"]["wrapped"]["locality_kl"] = two["summary"]["post"]["wrapped"]["locality_kl"]
    assert two["summary"]["post"]["wrapped"]["locality_kl"] > 0
    assert two["summary"] == summary
    base, edited = (AutoModelForCausalLM.from_pretrained(name) for name in ("base", "edited"))
    records, tokenizer = toy_requests(5), toy_tokenizer(pad_is_eos=True)
    pre = Evaluation(base, tokenizer, records).measure()
    post = Evaluation(edited, tokenizer, records).measure()
    for before, after in zip(pre, post, strict=True):
        finish_(before, after)
    assert (
        two["summary"]["post"]["locality"]
        == summarize([{"pre": {}, "post": entry} for entry in post])["post"]["locality"]
    )
    assert two["summary"]["pre"] == written("one")["summary"]["post"]


def test_all_metrics(files):
    pytest.importorskip("nltk", reason="fluency needs nltk: pip install locft_easyedit[easyedit]")
    metrics = "metrics=[accuracy,generated,ppl,fluency]"
    assert main(["evaluate", "base", "data=edits.json", metrics]) == 0
    post = written()["summary"]["post"]
    assert set(post) == {
        "rewrite_acc",
        "rephrase_acc",
        "rewrite_ppl",
        "portability",
        "fluency",
        "generated",
    }


def test_a_damaged_model_is_said_to_be_one(files, capsys):
    model = AutoModelForCausalLM.from_pretrained("base")
    with torch.no_grad():
        dict(model.named_parameters())[PLACE].fill_(float("nan"))
    model.save_pretrained("damaged")
    toy_tokenizer(pad_is_eos=True).save_pretrained("damaged")
    assert main(["evaluate", "damaged", "data=edits.json"]) == 1
    captured = capsys.readouterr()
    assert "rewrite_acc" in captured.err
    assert "are no finite numbers" in captured.err
    assert "NaN" in captured.out
    assert written()["summary"]["post"]["rewrite_acc"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "`data` is missing"),
        (["nowhere/model", "data=edits.json"], "there is no such folder here|cannot be loaded"),
        (["base", "data=edits.json", "metrics=[speed]"], "must be one or more of accuracy"),
        (["base", "data=edits.json", "batch_size=0"], "must be 1 or more"),
        (["base", "data=edits.json", "batchsize=8"], "Did you mean `batch_size`"),
        (["base", "data=edits.json", "original=edits.json"], "is no metrics.json"),
        (["base", "data=edits.json", "delta=edits.json"], "is no safetensors file"),
        (["base", "data=edits.json", "delta=a", "original=b"], "Leave `original` out"),
        (["edited", "data=edits.json", "delta=edit.safetensors"], "it is already applied"),
        (["base", "data=edits.json", "device=99"], "`device='99'` needs a CUDA GPU"),
        (["base", "data=edits.json", "dtype=int8"], "must be one of float32"),
    ],
    ids=str,
)
def test_bad_arguments(files, capsys, monkeypatch, arguments, message):
    import re

    # A name that nobody has is asked for again and again where there is no network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["evaluate", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_metrics_that_cannot_be_what_was_before(files, capsys):
    main(["evaluate", "base", "data=edits.json", "output=one"])
    main(["evaluate", "edited", "data=edits.json", "original=one/metrics.json", "output=two"])
    for arguments, message in (
        (["original=two/metrics.json"], "was measured on an edited model"),
        (["original=one/metrics.json", "output=one"], "is the file that this run would write"),
        (["original=one/metrics.json", "metrics=[ppl]"], ""),
    ):
        status = main(["evaluate", "edited", "data=edits.json", *arguments])
        assert status == (2 if message else 0)
        assert message in capsys.readouterr().err
    main(["evaluate", "base", "data=edits.json", "metrics=[generated]", "output=three"])
    arguments = ["edited", "data=edits.json", "original=three/metrics.json"]
    assert main(["evaluate", *arguments]) == 2
    assert "was measured without accuracy" in capsys.readouterr().err


def test_an_original_that_gave_nan(files, capsys):
    model = AutoModelForCausalLM.from_pretrained("base")
    with torch.no_grad():
        dict(model.named_parameters())[PLACE].fill_(float("nan"))
    model.save_pretrained("damaged")
    toy_tokenizer(pad_is_eos=True).save_pretrained("damaged")
    main(["evaluate", "damaged", "data=edits.json", "output=one"])
    arguments = ["data=edits.json", "original=one/metrics.json"]
    assert main(["evaluate", "base", *arguments]) == 1
    assert "locality" in capsys.readouterr().err


def test_a_peft_adapter_without_a_tokenizer(files):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained("base")
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = "base"
    adapter.save_pretrained("adapter")
    assert main(["evaluate", "adapter", "data=edits.json"]) == 0


def test_metrics_of_other_records_and_an_edit_of_another_model(files, capsys):
    main(["evaluate", "base", "data=edits.json", "output=one"])
    arguments = ["edited", "data=edits.json", "n=3", "original=one/metrics.json"]
    assert main(["evaluate", *arguments]) == 2
    assert "measured on other records" in capsys.readouterr().err
    made_delta(model=toy_model("llama", seed=1)).save("other.safetensors")
    assert main(["evaluate", "base", "data=edits.json", "delta=other.safetensors"]) == 2
    assert "The base is another model" in capsys.readouterr().err


def test_an_edit_of_another_model_is_refused_before_anything_is_measured(files, monkeypatch):
    def measured(*args):
        raise AssertionError

    monkeypatch.setattr(Evaluation, "measure", measured)
    assert main(["evaluate", "edited", "data=edits.json", "delta=edit.safetensors"]) == 2


def test_help(capsys):
    assert main(["evaluate", "--help"]) == 0
    assert "locft evaluate MODEL data=FILE" in capsys.readouterr().out
