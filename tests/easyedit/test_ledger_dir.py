"""`ledger_dir`: EasyEdit's lifelong calls keep what came before, from one program to the next."""

import pytest
import torch
from helpers.ledgers import NAME, answers, ledger_hparams, matrix, wide_model
from helpers.toys import toy_requests, toy_tokenizer

from locft_easyedit.errors import HyperParamsError
from locft_easyedit.ledger.ledger import Ledger

TOKENIZER = toy_tokenizer(pad_is_eos=True)
REQUESTS = toy_requests(6)


def editor_of(easyedit, folder, **changes):
    pair = (wide_model(), TOKENIZER)
    hparams = ledger_hparams(model_name=pair, device="cpu", ledger_dir=str(folder), **changes)
    return easyedit.BaseEditor.from_hparams(hparams)


def edit(editor, requests, **options):
    return editor.edit(
        prompts=[r["prompt"] for r in requests],
        target_new=[r["target_new"] for r in requests],
        subject=[r["subject"] for r in requests],
        verbose=False,
        **options,
    )


def test_successive_calls_are_events_of_one_ledger(easyedit, tmp_path):
    folder = tmp_path / "ledger"
    editor = editor_of(easyedit, folder)
    metrics, model, former = edit(editor, REQUESTS[:3], sequential_edit=True)
    assert [entry["post"]["rewrite_acc"] for entry in metrics] == [[1.0]] * 3
    assert torch.equal(former[NAME], matrix(wide_model()))
    # Another program goes on with it.
    again = editor_of(easyedit, folder)
    assert torch.equal(matrix(again.model), matrix(model))
    with again.unedited() as base:
        assert torch.equal(matrix(base), matrix(wide_model()))
    metrics, model, former = edit(again, REQUESTS[3:6], sequential_edit=True)
    assert all(answers(model, TOKENIZER, REQUESTS))
    assert torch.equal(former[NAME], matrix(editor.model))
    events = Ledger.open(folder).log.events
    assert [event.kind for event in events] == ["init", "add", "add"]
    # What is not sequential leaves the ledger alone, and is undone.
    edit(again, REQUESTS[:1])
    edit(again, REQUESTS[:3], sequential_edit=True)
    assert len(Ledger.open(folder).log.events) == 3
    assert all(answers(again.model, TOKENIZER, REQUESTS))


def test_other_settings_are_refused(easyedit, tmp_path):
    edit(editor_of(easyedit, tmp_path / "ledger"), REQUESTS[:2], sequential_edit=True)
    with pytest.raises(HyperParamsError, match=r"made with other settings.*\n.*`lr="):
        editor_of(easyedit, tmp_path / "ledger", lr=5e-3)
    # What a ledger repairs in any case, unless it is told another number.
    editor_of(easyedit, tmp_path / "ledger", repairs=10)
    with pytest.raises(HyperParamsError, match=r"`repairs=10` there; now 3"):
        editor_of(easyedit, tmp_path / "ledger", repairs=3)
