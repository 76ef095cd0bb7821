"""`locft ledger`, as a user runs it, on a toy model in a folder."""

import json

import pytest
import torch
from helpers.ledgers import YAML, wide_model
from helpers.toys import toy_requests, toy_tokenizer
from transformers import AutoModelForCausalLM

from locft_easyedit.__main__ import main
from locft_easyedit.ledger.ledger import Ledger


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A toy model's folder, a YAML and two files of facts, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    wide_model().save_pretrained("base")
    toy_tokenizer(pad_is_eos=True).save_pretrained("base")
    (tmp_path / "toy.yaml").write_text(YAML)
    requests = toy_requests(4)
    (tmp_path / "monday.json").write_text(json.dumps(requests[:2]))
    tuesday = [requests[1] | {"target_new": "Vienna"}, requests[2]]
    (tmp_path / "tuesday.json").write_text(json.dumps(tuesday))
    return tmp_path


def ledger(*words, status=0):
    assert main(["ledger", *words]) == status


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_from_the_first_fact_to_an_export(folder, capsys):
    ledger("init", "facts", "--config-name", "toy.yaml", "seed=7")
    assert "facts: a ledger of ./base (layers [2]" in said(capsys)
    ledger("add", "facts", "data=monday.json", "source=monday")
    assert "event 1: 2 facts (1 to 2) added. 2 facts in." in said(capsys)
    ledger("add", "facts", "data=monday.json")
    assert "Nothing happened: all 2 facts are in already." in said(capsys)
    ledger("add", "facts", "data=tuesday.json", "source=tuesday")
    printed = said(capsys)
    assert "fact 2 is superseded by 3" in printed
    assert "'Vienna'" in printed
    ledger("retract", "facts", "1")
    assert "event 3: 1 fact taken out. 2 facts in." in said(capsys)
    ledger("show", "facts", "json=shown.json")
    assert "facts after event 3: 2 facts in." in said(capsys)
    shown = json.loads((folder / "shown.json").read_text())
    assert [fact["number"] for fact in shown] == [3, 4]
    ledger("show", "facts", "at=1", "all=true")
    assert "monday" in said(capsys)
    ledger("log", "facts", "json=log.json")
    assert "1 superseded" in said(capsys)
    assert [e["kind"] for e in json.loads((folder / "log.json").read_text())] == [
        "init", "add", "add", "retract"
    ]  # fmt: skip
    ledger("diff", "facts", "1", "2")
    assert "1 fact went between events 1 and 2" in said(capsys)
    ledger("verify", "facts")
    printed = said(capsys)
    assert "the chain of 4 events is whole" in printed
    assert "2 of 2 active facts hold" in printed
    ledger("export", "facts", "output=model", "as=model", "at=2")
    ledger("export", "facts", "output=adapter", "as=adapter")
    ledger("export", "facts", "output=edit", "as=edit")
    exported = AutoModelForCausalLM.from_pretrained("model").state_dict()
    for name, value in Ledger.open("facts").matrices(2).items():
        assert torch.equal(exported[name], value)
    assert main(["delta", "verify", "edit/edit.safetensors", "model=base"]) == 0


def test_verify_has_an_exit_status(folder, capsys):
    ledger("init", "facts", "--config-name", "toy.yaml")
    ledger("add", "facts", "data=monday.json")
    path = folder / "facts" / "state-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    ledger("verify", "facts", status=1)
    assert "state-000001.safetensors is damaged" in said(capsys)
    ledger("verify", "facts")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "facts"], "`merge` is nothing that can be done with a ledger"),
        (["show"], "takes LEDGER, a folder; 0 words"),
        (["show", "nowhere"], "`nowhere` is no ledger"),
        (["init", "facts"], "--config-name is missing"),
        (["retract", "facts", "seventeen"], "`seventeen` is no fact's number"),
        (["retract", "facts"], "Name facts by their numbers, or by"),
        (["retract", "facts", "9"], "fact 9 was never there; there are none yet"),
        (["export", "facts", "output=x", "as=lora"], "`as=lora` must be one of edit, model"),
        (["export", "facts", "output=x"], "`as` is missing"),
        (["show", "facts", "at=5"], "`at=5` is no event; the last one is 0"),
        (["diff", "facts"], "one or two events"),
    ],
)
def test_mistakes(folder, capsys, words, message):
    if "facts" in words and words[0] != "init":
        ledger("init", "facts", "--config-name", "toy.yaml")
    ledger(*words, status=2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_help(capsys):
    ledger("--help")
    assert "locft ledger retract LEDGER FACT" in said(capsys)
