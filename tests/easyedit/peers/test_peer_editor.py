"""EasyEdit's methods on a loaded model: what is put around it, how many edits a call takes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers.toys import toy_model, toy_requests, toy_tokenizer

from locft_easyedit.compare.edits import ending
from locft_easyedit.easyedit.peers.peer_editor import PeerEditor
from locft_easyedit.evaluation.evaluation import Evaluation
from locft_easyedit.evaluation.predictions import EvalConfig


def editor_of(model, tokenizer, **hparams):
    """A `PeerEditor` that EasyEdit was not asked for."""
    made = object.__new__(PeerEditor)
    made.editor = SimpleNamespace(model=model, tok=tokenizer)
    made.hparams = SimpleNamespace(**hparams)
    made.wrapper, made._mode = None, nullcontext()
    return made


def test_a_model_is_measured_through_what_is_around_it():
    """As without it, but for one text at a time, each with the place where its prompt ends."""
    model, tokenizer = toy_model("llama"), toy_tokenizer()
    requests, metrics = toy_requests(6), ["accuracy", "generated"]
    plain = Evaluation(model, tokenizer, requests, EvalConfig(), metrics=metrics).measure()
    keyed = model.model.layers[1].mlp
    keyed.key_id = -1
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, options: seen.append((options["input_ids"].shape, keyed.key_id)),
        with_kwargs=True,
    )
    asked = EvalConfig(batch_size=8, wrapper=editor_of(model, tokenizer))
    through = Evaluation(model, tokenizer, requests, asked, metrics=metrics)
    seen.clear()
    assert through.measure() == plain
    assert {shape[0] for shape, _ in seen} == {1}
    ends = {len(tokenizer(request["prompt"])["input_ids"]) - 1 for request in requests}
    assert ends <= {key_id for _, key_id in seen}


@pytest.mark.parametrize(("n", "once"), [(3, 3), (20, 10), (7, 7), (11, 1), (12, 6)])
def test_ultraedit_takes_all_of_a_chunk(n, once):
    """It makes `batch_size // batch_size_once` passes, and would leave out the rest."""
    made = editor_of(None, None, batch_size=100, batch_size_once=10)
    made._take_all_of_(n)
    assert vars(made.hparams) == {"batch_size": n, "batch_size_once": once}


def test_targets_end_with_a_token_that_is_no_padding():
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert ending(tokenizer) == tokenizer.eos_token
    assert tokenizer.pad_token != tokenizer.eos_token
    alone = SimpleNamespace(eos_token="<e>", pad_token="<e>", all_special_tokens=["<e>"])
    assert ending(alone) == ""  # what is padding may not be trained
