"""A ledger with other settings: preservation, forms, a place to choose, LoRA."""

import pytest
import torch
from helpers.ledgers import (
    NAME,
    answers,
    ledger_hparams,
    matrix,
    new_ledger,
    opened,
    wide_model,
)
from helpers.toys import toy_requests, toy_tokenizer

from locft_easyedit.errors import DataError, RequestError
from locft_easyedit.modeling.locations import Location
from locft_easyedit.training.choice import Cell, Choice

TOKENIZER = toy_tokenizer()
REQUESTS = toy_requests(12)


@pytest.fixture
def preserving(tmp_path, monkeypatch):
    """Hyper-parameters that confine the change, and train another form."""
    monkeypatch.chdir(tmp_path)
    text = "The bridge was built in 1932. He works in the field of physics.\n" * 60
    (tmp_path / "text.txt").write_text(text)
    return {
        "preserve": ["text.txt", "neighbours"],
        "preserve_dir": str(tmp_path / "cache"),
        "forms": ["question_answer"],
        "num_steps": 20,
    }


def test_what_is_preserved_is_measured_once(tmp_path, preserving, monkeypatch):
    ledger = new_ledger(tmp_path / "ledger", **preserving)
    base = matrix(ledger.model)
    first = ledger.add(REQUESTS[:3])
    assert first.lost == []
    [filters] = (tmp_path / "ledger").glob("filters-*.safetensors")
    monkeypatch.setattr(
        "locft_easyedit.training.preserve.protection.filters_for",
        lambda *_, **__: pytest.fail("measured again"),
    )
    again = opened(tmp_path / "ledger")
    assert again.add(REQUESTS[3:6]).lost == []
    questions = [r | {"prompt": f"Question: {r['prompt']}\nAnswer:"} for r in REQUESTS[:6]]
    assert all(answers(again.model, TOKENIZER, REQUESTS[:6]))
    assert all(answers(again.model, TOKENIZER, questions))
    assert again.verify(replay=True).problems == []
    # The change is A S: what S scales down is changed less.
    s = again._ready().changes.trainer.filters.of[NAME]
    values, vectors = torch.linalg.eigh((s + s.T) / 2)
    along = ((matrix(again.model) - base) @ vectors).norm(dim=0)
    assert along[:20].mean() < 0.5 * along[-20:].mean()
    assert values[0] < 0.5 * values[-1]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    # A damaged file is told, and measured again with the same result.
    content = bytearray(filters.read_bytes())
    content[-5] ^= 1
    filters.write_bytes(content)
    assert opened(tmp_path / "ledger").verify(replay=True).problems == []


def test_retraction_takes_back_all_forms(tmp_path, preserving):
    ledger = new_ledger(tmp_path / "ledger", **preserving | {"preserve": []})
    ledger.add(REQUESTS[:4])
    gone = ledger.retract([2])
    assert gone.lost == []
    assert gone.not_out == []
    asked = f"Question: {REQUESTS[1]['prompt']}\nAnswer:"
    ids = torch.tensor([TOKENIZER(asked)["input_ids"]])
    with torch.no_grad():
        now, then = (m(input_ids=ids).logits[0, -1] for m in (ledger.model, wide_model()))
    # What the model would say is what the base would, or as likely to it.
    assert then.max() - then[now.argmax()] <= 0.05


def test_exact_measures_anew_what_is_preserved(tmp_path, preserving):
    ledger = new_ledger(tmp_path / "ledger", **preserving)
    ledger.add(REQUESTS[:4])
    ledger.retract([1], exact=True)
    never = new_ledger(tmp_path / "never", **preserving)
    never.add(REQUESTS[1:4])
    assert torch.equal(matrix(ledger.model), matrix(never.model))


def test_a_source_that_is_no_file_is_refused(tmp_path):
    ledger = new_ledger(tmp_path, preserve=["gone.txt"])
    with pytest.raises(DataError, match="is not a file"):
        ledger.add(REQUESTS[:3])
    assert len(ledger.log.events) == 1


def test_the_place_is_chosen_once(tmp_path, monkeypatch):
    location = Location(1, "down", ("model.layers.{}.mlp.down_proj.weight",))
    choice = Choice(Cell(location, 1e-2), (), 1, 8, 0.1)
    calls = []
    monkeypatch.setattr(
        "locft_easyedit.ledger.choosing.choose_once", lambda *a, **k: calls.append(1) or choice
    )
    auto = {"layers": "auto", "rewrite_module_tmp": "auto", "lr": "auto"}
    ledger = new_ledger(tmp_path, **auto)
    with pytest.raises(RequestError, match="needs 8"):
        ledger.add(REQUESTS[:3])
    assert ledger.hparams.chooses
    assert ledger.verify().n_facts == 0
    ledger.add(REQUESTS[:8])
    assert (ledger.hparams.layers, ledger.hparams.lr) == ([1], 1e-2)
    again = opened(tmp_path)
    again.add(REQUESTS[8:9])
    assert len(calls) == 1
    place = "model.layers.1.mlp.down_proj.weight"
    assert set(again.log.events[-1].said["state"]) == {place}
    assert torch.equal(again.matrices(0)[place], dict(wide_model().named_parameters())[place])
    again.retract(since="2000-01-01")
    assert again.hparams.layers == [1]


def test_lora(tmp_path):
    ledger = new_ledger(tmp_path, tuning="lora", lora_rank=8, lr=2e-2, num_steps=30)
    ledger.add(REQUESTS[:2])
    ledger.add(REQUESTS[2:4])
    assert all(answers(ledger.model, TOKENIZER, REQUESTS[:4]))
    assert ledger.verify(replay=True).problems == []


def test_a_model_without_a_frozen_prefix(tmp_path):
    ledger = new_ledger(tmp_path, frozen_prefix=False)
    ledger.add(REQUESTS[:2])
    assert ledger.retract([1]).not_out == []
    assert not list(tmp_path.glob("prefix-*"))
    assert answers(ledger.model, TOKENIZER, REQUESTS[:2]) == [False, True]


def test_several_matrices_and_half_precision(tmp_path):
    changes = {"layers": [1, 3], "dtype": "bfloat16", "num_steps": 20}
    model = wide_model().to(torch.bfloat16)
    ledger = new_ledger(tmp_path, model=model, **changes)
    assert ledger.add(REQUESTS[:3]).lost == []
    assert len(ledger.log.events[-1].said["state"]) == 2
    assert ledger.verify(replay=True).problems == []
    assert ledger_hparams(**changes).layers == [1, 3]
