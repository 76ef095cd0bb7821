"""A ledger of a toy model: facts come, are replaced and go, and every bit follows from the log."""

import copy
import shutil
from itertools import pairwise

import pytest
import torch
from helpers.ledgers import (
    NAME,
    answers,
    filled_ledger,
    ledger_hparams,
    matrix,
    new_ledger,
    opened,
    superseding,
    wide_model,
)
from helpers.toys import toy_requests, toy_tokenizer

from locft_easyedit.api import edit_model
from locft_easyedit.delta.delta import Delta
from locft_easyedit.errors import LedgerError, OutputError, RequestError
from locft_easyedit.ledger import changes, trainer
from locft_easyedit.ledger.ledger import Ledger
from locft_easyedit.ledger.retraction import NEAR
from locft_easyedit.ledger.states import States
from locft_easyedit.ledger.trainer import Trainer
from locft_easyedit.prefix import shortcuts
from locft_easyedit.utils.files import locked

# Of a change, how far the order of sums in fused products moves it. Measured: 6e-7.
FUSED = 1e-4
TOKENIZER = toy_tokenizer()
REQUESTS = toy_requests(9)


def copied(ledger, folder):
    """Returns the folder of a ledger, copied: to be opened again."""
    shutil.copytree(ledger.path, folder)
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A ledger of six facts in two commits; not to be changed."""
    return filled_ledger(tmp_path_factory.mktemp("ledger") / "six")


@pytest.fixture
def ledger(filled, tmp_path):
    """The same ledger, to be changed."""
    return opened(copied(filled, tmp_path / "ledger"))


def base_greedy(model, request, n=32):
    """Returns the tokens of a plain greedy answer, up to what ends one."""
    ids = TOKENIZER(request["prompt"])["input_ids"]
    answer = []
    with torch.no_grad():
        while len(answer) < n:
            logits = model(input_ids=torch.tensor([ids + answer])).logits
            answer.append(int(logits[0, -1].argmax()))
            text = TOKENIZER.decode([answer[-1]])
            if answer[-1] == TOKENIZER.eos_token_id or "." in text or "\n" in text:
                break
    return answer


# Adding


def test_the_first_commit_is_the_edit(tmp_path):
    cut = {"prefix_cut": "matrix"}
    ledger = new_ledger(tmp_path, **cut)
    added = ledger.add(REQUESTS[:3])
    assert added.event.said["trained"]["repairs"] == 0
    model = wide_model()
    edit_model(model, TOKENIZER, REQUESTS[:3], ledger_hparams(**cut), progress=False)
    assert torch.equal(matrix(ledger.model), matrix(model))


def test_old_facts_hold_beside_new_ones(filled):
    assert answers(filled.model, TOKENIZER, REQUESTS[:6]) == [True] * 6


def test_what_a_check_finds_lost_is_trained_again(ledger, monkeypatch):
    fit, calls = Trainer._fit_, []

    def idle_at_first(*args):
        calls.append(args)
        return 0 if len(calls) == 1 else fit(*args)

    monkeypatch.setattr(Trainer, "_fit_", idle_at_first)
    added = ledger.add(REQUESTS[6:9])
    assert added.event.said["trained"]["repairs"] >= 1
    assert added.lost == []
    assert all(answers(ledger.model, TOKENIZER, REQUESTS))


def test_what_is_lost_in_one_form_is_trained_in_that_form(tmp_path, monkeypatch):
    fit, wrong, calls, checks = Trainer._fit_, Trainer.wrong, [], []

    def noted(self, runner, numbered, new, texts, *args):
        calls.append((numbered, new, texts))
        return fit(self, runner, numbered, new, texts, *args)

    def one_question(self, runner, texts, **how):
        checks.append(texts)
        if len(checks) == 1:
            return texts[[3]]
        return wrong(self, runner, texts, **how)

    monkeypatch.setattr(Trainer, "_fit_", noted)
    monkeypatch.setattr(Trainer, "wrong", one_question)
    assert new_ledger(tmp_path, forms=["question_answer"]).add(REQUESTS[:3]).lost == []
    (numbered, new, _), (_, again, texts) = calls[:2]
    assert (new.tolist(), again.tolist()) == ([0, 1, 2], [3])
    assert numbered.edits_of(again).tolist() == [1]
    assert texts.pool.tolist() == [0, 1, 2, 4, 5]
    [own, replayed] = texts.texts(again, epoch=0)
    assert own == 3
    assert replayed in texts.pool


def test_what_cannot_be_made_to_hold_is_said(ledger, monkeypatch):
    monkeypatch.setattr(Trainer, "_fit_", lambda *_: 0)
    assert ledger.add(REQUESTS[6:8]).lost == [7, 8]
    assert ledger.log.events[-1].said["trained"]["repairs"] == 10


def test_what_the_book_says(filled):
    facts = filled.book.active
    assert [fact.number for fact in facts] == [1, 2, 3, 4, 5, 6]
    assert [fact.source for fact in facts] == ["day 0"] * 3 + ["day 1"] * 3
    assert facts[0].prompt == REQUESTS[0]["prompt"]
    assert facts[0].subject == REQUESTS[0]["subject"]
    assert "locality" not in facts[0].request


def test_what_is_in_is_left_alone(ledger):
    before = [event.hash for event in ledger.log.events]
    added = ledger.add(REQUESTS[:6])
    assert (added.event, added.facts, added.already) == (None, [], 6)
    assert [event.hash for event in ledger.log.events] == before
    added = ledger.add([REQUESTS[0], REQUESTS[6]])
    assert ([fact.number for fact in added.facts], added.already) == ([7], 1)


def test_superseded(ledger):
    added = ledger.add(superseding(REQUESTS[1:3]), source="correction")
    assert added.superseded == [(2, 7), (3, 8)]
    assert added.lost == []
    assert all(answers(ledger.model, TOKENIZER, superseding(REQUESTS[1:3])))
    assert answers(ledger.model, TOKENIZER, REQUESTS[:6]) == [True, False, False, True, True, True]
    old = ledger.book.facts[2]
    assert (old.active, old.why, old.by) == (False, "superseded", 7)


def test_on_conflict_error_refuses_to_supersede(tmp_path):
    ledger = new_ledger(tmp_path, on_conflict="error")
    ledger.add(REQUESTS[:3])
    before = matrix(ledger.model)
    with pytest.raises(LedgerError, match=r"facts are in with other targets.*\n.*fact 2 says"):
        ledger.add(superseding(REQUESTS[1:2]))
    assert torch.equal(matrix(ledger.model), before)
    assert len(ledger.log.events) == 2


def test_contradictions_within_one_file(ledger):
    both = [REQUESTS[6], *superseding(REQUESTS[6:7])]
    with pytest.raises(LedgerError, match=r"contradict each other.*\n.*request 0.*request 1"):
        ledger.add(both)
    with pytest.raises(RequestError, match="no `target_new`"):
        ledger.add([{"prompt": "x"}])
    assert len(ledger.log.events) == 3


def test_the_last_of_a_file_counts_where_asked_for(tmp_path):
    ledger = new_ledger(tmp_path, on_conflict="last")
    added = ledger.add([REQUESTS[0], *superseding(REQUESTS[:1])])
    assert [fact.target for fact in added.facts] == ["Vienna"]


# Taking out


@pytest.mark.parametrize("closed_form", [True, False])
def test_retracted(ledger, monkeypatch, closed_form):
    if closed_form:  # and nothing else
        monkeypatch.setattr(Trainer, "_fit_", None)
    else:
        monkeypatch.setattr(changes, "moments", lambda *_: None)
    gone = ledger.retract([2])
    monkeypatch.undo()
    assert (gone.event.said["trained"]["texts"] == 0) == closed_form
    assert gone.not_out == []
    assert gone.lost == []
    # Where the base has no choice of its own, a random model may take another.
    base = wide_model()
    prompt, answer = TOKENIZER(REQUESTS[1]["prompt"])["input_ids"], base_greedy(base, REQUESTS[1])
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        now, then = (m(input_ids=ids).logits[0, len(prompt) - 1 :] for m in (ledger.model, base))
    choices = torch.stack([now.argmax(-1), torch.tensor(answer)], dim=1)
    given = then.log_softmax(-1).gather(1, choices)
    assert (given[:, 1] - given[:, 0]).max() <= NEAR
    assert (now.argmax(-1) == torch.tensor(answer)).float().mean() > 0.8
    others = [request for i, request in enumerate(REQUESTS[:6]) if i != 1]
    assert all(answers(ledger.model, TOKENIZER, others))
    with pytest.raises(LedgerError, match="fact 2 is not in any more: retracted in event 3"):
        ledger.retract([2])
    # It can come back, as a fact of its own.
    assert [fact.number for fact in ledger.add(REQUESTS[1:2]).facts] == [7]


def test_what_the_closed_form_does_not_take_out_is_trained_from_before(
    filled, tmp_path, monkeypatch
):
    found = []
    monkeypatch.setattr(changes, "MOST_LEFT", -1)
    for name in ("tried", "not tried"):
        one = opened(copied(filled, tmp_path / name))
        found.append(one.retract([2]).event.said)
        monkeypatch.setattr(changes, "remove_", lambda *_: None)
    assert found[0]["trained"]["texts"] > 0
    assert found[0]["trained"] == found[1]["trained"]
    assert found[0]["state"] == found[1]["state"]


def test_what_is_taken_out_is_trained_until_most_is_back(filled, tmp_path, monkeypatch):
    """Repairs train what is left then."""
    monkeypatch.setattr(changes, "moments", lambda *_: None)
    fit, epochs = Trainer._fit_, []

    def noted(*args):
        epochs.append(fit(*args))
        return epochs[-1]

    monkeypatch.setattr(Trainer, "_fit_", noted)
    first = []
    for left in (-1, 1.0):
        monkeypatch.setattr(trainer, "_NEARLY", left)
        gone = opened(copied(filled, tmp_path / str(left))).retract([2])
        assert gone.not_out == gone.lost == []
        first.append(epochs[0])
        assert gone.event.said["trained"]["epochs"] == sum(epochs)
        epochs.clear()
    assert first[0] > first[1] == 1


def test_retracted_exactly_is_as_if_it_had_never_been_in(ledger, tmp_path):
    ledger.retract([2, 6], exact=True)
    ledger.add(REQUESTS[6:9])
    never = new_ledger(tmp_path / "never")
    never.add([REQUESTS[0], REQUESTS[2]])
    never.add(REQUESTS[3:5])
    assert ledger.log.events[3].said["state"] == never.log.events[2].said["state"]
    never.add(REQUESTS[6:9])
    assert torch.equal(matrix(ledger.model), matrix(never.model))


@pytest.mark.parametrize("exact", [False, True])
def test_an_empty_ledger_is_the_base(ledger, exact):
    ledger.retract(since="2000-01-01", exact=exact)
    assert torch.equal(matrix(ledger.model), matrix(wide_model()))
    assert ledger.book.active == []
    assert not list(ledger.path.glob("prefix-*"))
    assert ledger.verify().problems == []
    ledger.add(REQUESTS[6:9])
    assert all(answers(ledger.model, TOKENIZER, REQUESTS[6:9]))


# Nothing is lost


def test_verify_makes_every_state_anew(ledger):
    ledger.retract([4])
    found = ledger.verify(replay=True)
    assert (found.n_events, found.n_facts, found.problems, found.lost) == (4, 5, [], [])


def test_verify_finds_facts_that_do_not_hold(ledger, monkeypatch):
    assert ledger.verify().lost == []
    parameter = dict(ledger.model.named_parameters())[NAME]
    with torch.no_grad():
        parameter.zero_()
    assert len(ledger.verify().lost) > 3


def test_opened_with_the_base_or_as_it_was_left(ledger):
    edited = matrix(ledger.model)
    again = opened(ledger.path)
    assert torch.equal(matrix(again.model), edited)
    as_left = opened(ledger.path, model=copy.deepcopy(ledger.model))
    assert torch.equal(matrix(as_left.model), edited)
    as_left.retract(since="2000-01-01")
    assert torch.equal(matrix(as_left.model), matrix(wide_model()))


def other_parameter(model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)


def other_matrix(model):
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.add_(1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (other_parameter, r"1 of \d+ parameters are others: `model.layers.0.mlp.down_proj.weight`"),
        (other_matrix, "matrices are neither the base's nor those of any event"),
        (lambda model: model.to(torch.bfloat16), "the precision is another: float32 there"),
    ],
)
def test_another_model_is_refused(ledger, change, match):
    model = wide_model()
    change(model)
    with pytest.raises(LedgerError, match=match):
        _ = opened(ledger.path, model=model).model


def test_another_tokenizer_is_refused(ledger):
    tokenizer = toy_tokenizer(across_words=True)
    with pytest.raises(LedgerError, match="the tokenizer is another"):
        _ = opened(ledger.path, tokenizer=tokenizer).model
    tokenizer = toy_tokenizer()
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)  # changes nothing of it
    assert opened(ledger.path, tokenizer=tokenizer).model is not None


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damaged_matrices_are_made_anew(ledger, damage, caplog):
    expected = matrix(ledger.model)
    path = States(ledger.path).path(2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    {"gone": path.unlink, "cut": lambda: path.write_bytes(content[:-9]),
     "flipped": lambda: path.write_bytes(content)}[damage]()  # fmt: skip
    again = opened(ledger.path)
    assert torch.equal(matrix(again.model), expected)
    assert path.is_file()
    assert ("is damaged and is made anew" in caplog.text) == (damage != "gone")
    assert again.verify().problems == []


def test_states_of_facts_that_are_gone_are_recorded_anew(ledger):
    expected = opened(copied(ledger, ledger.path.with_name("other")))
    expected.add(REQUESTS[6:9])
    for path in ledger.path.glob("prefix-*.safetensors"):
        path.unlink()
    ledger.add(REQUESTS[6:9])
    assert torch.equal(matrix(ledger.model), matrix(expected.model))
    assert len(list(ledger.path.glob("prefix-*.safetensors"))) == 3


def test_states_that_the_budget_does_not_hold_do_not_stay(filled, tmp_path):
    ledger = filled_ledger(tmp_path, prefix_disk_gib=0.0)
    assert not list(ledger.path.glob("prefix-*"))
    assert torch.equal(matrix(ledger.model), matrix(filled.model))


def test_states_that_lie_in_the_folder_count(tmp_path):
    folder = filled_ledger(tmp_path, 1).path
    (file,) = folder.glob("prefix-*.safetensors")
    limit = 1.5 * file.stat().st_size / 2**30
    ledger = filled_ledger(tmp_path / "small", 1, prefix_disk_gib=limit)
    assert len(list(ledger.path.glob("prefix-*.safetensors"))) == 1
    # The second command is another process: what the first has written is there, not in memory.
    opened(ledger.path).add(REQUESTS[3:6])
    assert len(list(ledger.path.glob("prefix-*.safetensors"))) == 1


def test_products_of_one_input_run_as_one(filled, tmp_path, monkeypatch):
    monkeypatch.setattr(shortcuts, "gains_by_fusing", lambda model: True)
    ledger = filled_ledger(tmp_path)
    assert [event.said["how"].get("fused") for event in ledger.log.events[1:]] == [True, True]
    # Between commands the model's memory is as it was.
    for parameter in ledger.model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    change = matrix(filled.model) - matrix(wide_model())
    assert (matrix(ledger.model) - matrix(filled.model)).norm() < FUSED * change.norm()
    ledger.retract([2])
    assert opened(ledger.path).verify(replay=True).problems == []


def test_few_copies_of_the_matrices_stay(tmp_path):
    states = States(tmp_path)
    for last in range(1, 65):
        states.path(last).touch()
        if last == 1:
            states.path(0).touch()
        states.thin(last)
        kept = states.kept()
        assert kept[0] == 0
        assert kept[-1] == last
        assert len(kept) <= 2 + last.bit_length()
        # To make any state anew takes at most two thirds of the log.
        assert max(b - a for a, b in pairwise(kept)) <= max(1, 2 * last / 3)


def test_earlier_states_come_back(ledger):
    ledger.add(REQUESTS[6:9])
    first = new_ledger(ledger.path.with_name("first"))
    first.add(REQUESTS[:3])
    assert not States(ledger.path).path(1).exists()
    assert torch.equal(ledger.matrices(1)[NAME], matrix(first.model))
    assert torch.equal(ledger.matrices(0)[NAME], matrix(wide_model()))
    assert torch.equal(ledger.matrices()[NAME], matrix(ledger.model))


@pytest.mark.parametrize("action", ["add", "retract"])
def test_what_is_interrupted_has_changed_nothing(ledger, action, monkeypatch):
    undisturbed = opened(copied(ledger, ledger.path.with_name("undisturbed")))

    def act(one):
        return one.add(REQUESTS[6:9]) if action == "add" else one.retract([2])

    act(undisturbed)
    before = matrix(ledger.model)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "wrong", lambda *_, **__: raise_(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            act(ledger)
    assert torch.equal(matrix(ledger.model), before)
    assert len(Ledger.open(ledger.path).log.events) == 3
    act(ledger)
    assert torch.equal(matrix(ledger.model), matrix(undisturbed.model))


def test_facts_that_failed_leave_nothing_to_those_that_take_their_numbers(ledger, monkeypatch):
    undisturbed = opened(copied(ledger, ledger.path.with_name("undisturbed")))
    undisturbed.add(REQUESTS[8:9])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "wrong", lambda *_, **__: raise_(ValueError("failed")))
        with pytest.raises(ValueError, match="failed"):
            ledger.add(REQUESTS[6:7])
    ledger.add(REQUESTS[8:9])
    assert torch.equal(matrix(ledger.model), matrix(undisturbed.model))


def raise_(error):
    raise error


def test_two_writers_are_refused(ledger):
    with locked(ledger.path):
        with pytest.raises(OutputError, match="is in use"):
            ledger.add(REQUESTS[6:7])
        assert len(Ledger.open(ledger.path).book.active) == 6  # looking is allowed


def test_a_writer_sees_what_another_has_written(ledger):
    other = opened(ledger.path)
    ledger.add(REQUESTS[6:7])
    assert other.add(REQUESTS[6:7]).already == 1
    assert [fact.number for fact in other.add(REQUESTS[7:8]).facts] == [8]
    assert torch.equal(matrix(ledger.model), matrix(other.model))


# Leaving the ledger


def test_exported_as_an_edit(ledger, tmp_path):
    path = ledger.export(tmp_path / "out", at=1)
    model = wide_model()
    delta = Delta.load(path)
    delta.apply_(model)
    assert torch.equal(matrix(model), ledger.matrices(1)[NAME])
    assert delta.metadata["requests"]["count"] == 3
    delta.revert_(model)
    assert torch.equal(matrix(model), matrix(wide_model()))


def test_exports_that_cannot_be_made(ledger, tmp_path):
    with pytest.raises(LedgerError, match="must be one of edit, model, adapter"):
        ledger.export(tmp_path / "out", "lora")
    with pytest.raises(LedgerError, match="is written from the base model's folder"):
        ledger.export(tmp_path / "out", "model")


def test_diff(ledger):
    ledger.retract([4])
    found = ledger.diff(1)
    assert [fact.number for fact in found.came] == [5, 6]
    assert found.went == []
    assert [fact.number for fact in ledger.diff(2, 3).went] == [4]
    assert 0 < found.change[NAME] < 10


# What a ledger cannot do


@pytest.mark.parametrize(
    ("key", "value"),
    [("shard_frozen", True), ("pipeline", "depth_first"), ("compile_layers", True), ("repairs", 0)],
)
def test_settings_that_are_refused(tmp_path, key, value):
    with pytest.raises(LedgerError, match=f"`{key}={value}`"):
        new_ledger(tmp_path, **{key: value})
    assert not (tmp_path / "log.jsonl").exists()


def test_layers_that_processes_share_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("locft_easyedit.ledger.binding.sharded_layers", lambda _: object())
    with pytest.raises(LedgerError, match="layers are shared out among processes: all processes"):
        new_ledger(tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_second_ledger_in_a_folder_is_refused(ledger):
    with pytest.raises(LedgerError, match="holds a ledger already"):
        new_ledger(ledger.path)


def test_a_place_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="out of range"):
        new_ledger(tmp_path, layers=[40])
    assert not (tmp_path / "log.jsonl").exists()


def test_settings_of_a_newer_version_are_refused(ledger):
    ledger.log.events[0].said["hparams"]["speed"] = 3
    with pytest.raises(LedgerError, match="made with `speed`, which this version does not know"):
        ledger.add(REQUESTS[6:7])


def test_a_null_of_another_version_is_the_default(ledger):
    ledger.log.events[0].said["hparams"]["forms_per_epoch"] = None
    assert ledger.hparams.forms_per_epoch == 1.0
