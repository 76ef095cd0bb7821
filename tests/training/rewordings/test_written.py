"""Edits with rewordings that a language model writes, from the session's side."""

import json

import pytest
import torch
from helpers.launching import launch
from helpers.toys import CONTEXT, toy_hparams, toy_model, toy_requests, toy_tokenizer
from training.rewordings.conftest import prompt_of, three_of

from locft_easyedit.api import edit_model, open_session
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.errors import ModelError, RequestError, RewordingsError
from locft_easyedit.locate.trial import Trials
from locft_easyedit.modeling.locations import Location
from locft_easyedit.training.choice import Cell
from locft_easyedit.training.rewordings import written

N = 5
TOKENIZER = toy_tokenizer()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(written, "_BATCH", 2)
    # A random model's next token differs from text to text.
    monkeypatch.setattr(written, "MOST_NATS", 1e6)


@pytest.fixture
def settings(served, tmp_path):
    """Hyper-parameters that have the fake endpoint write, and keep it in a file."""
    return {"augment_model": "endpoint:writer", "augment_cache": str(tmp_path / "kept.jsonl")}


def session(settings, requests=None, model=None, **changes):
    """Returns a session, checked."""
    requests = toy_requests(N) if requests is None else requests
    alone = changes.pop("alone", False)
    model = toy_model() if model is None else model
    hparams = toy_hparams(**settings | changes)
    one = open_session(model, TOKENIZER, requests, hparams, progress=False, alone=alone)
    one.check()
    return one


def lines_of(settings):
    with open(settings["augment_cache"], encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(settings, lines):
    with open(settings["augment_cache"], "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)


def figures(one):
    return one._written


def test_what_is_written_is_trained(served, settings):
    requests = toy_requests(N)
    requests[0]["rewordings"] = ["A rewording of the user's own"]
    one = session(settings, requests)
    for i, edit in enumerate(one.edits.edits):
        own = ("A rewording of the user's own",) if i == 0 else ()
        assert edit.rewordings == own + tuple(
            f"{word}, {edit.prompt}" for word in ("Well", "Now", "So")
        )
        assert one.training_texts.wordings[i] == [edit.prompt, *edit.rewordings]
    assert figures(one) == {
        "writer": "endpoint:writer", "asked": N, "from_cache": 0, "changed_by_hand": 0,
        "written": 3 * N, "kept": 3 * N, "edits_without": 0,
        "dropped": dict.fromkeys(("same", "subject", "target", "form", "long", "answer"), 0),
    }  # fmt: skip
    result = edit_model(toy_model(), TOKENIZER, requests, toy_hparams(**settings), progress=False)
    assert result.summary()["augmented"]["written"]["kept"] == 3 * N
    assert result.summary()["augmented"]["trained"] == 3 * N + 1
    assert set(result.timings) == {"prepare", "rewordings", "prefix", "train"}


def test_nobody_is_asked_without_the_key(served, settings):
    one = session({})
    assert not served.asked
    assert one._augmented() is None


def test_what_is_in_the_file_is_not_asked_again(served, settings):
    first = session(settings, toy_requests(3))
    again = session(settings)
    assert len(served.asked) == N
    assert figures(again)["asked"] == N - 3
    assert figures(again)["from_cache"] == 3
    assert again.edits.edits[:3] == first.edits.edits
    other = session(settings | {"augment_model": "endpoint:another"})
    assert figures(other)["asked"] == N


def test_edits_of_one_prompt_are_asked_for_once(served, settings):
    requests = [{"prompt": "It lies in", "target_new": name} for name in ("Peru", "Norway")]
    served.reply = lambda *_: "It is in\nPeru has it in\nNorway has it in\nit  lies in"
    one = session(settings, requests)
    assert len(served.asked) == 1
    assert [edit.rewordings for edit in one.edits.edits] == [("It is in",)] * 2
    reasons = [(d["text"], d["reason"]) for d in lines_of(settings)[0]["dropped"]]
    assert reasons == [
        ("Peru has it in", "target"), ("Norway has it in", "target"), ("it  lies in", "same"),
    ]  # fmt: skip
    assert figures(one)["dropped"]["target"] == 4  # of each edit, both


def test_the_file_says_what_became_of_each(served, settings, monkeypatch):
    monkeypatch.setattr(written, "MOST_NATS", -1.0)
    one = session(settings)
    assert figures(one)["dropped"]["answer"] == 3 * N
    assert figures(one)["edits_without"] == N
    line = lines_of(settings)[0]
    edit = one.edits.edits[0]
    assert (line["prompt"], line["subject"]) == (edit.prompt, toy_requests(N)[0]["subject"])
    assert line["writer"] == "endpoint:writer"
    assert line["rewordings"] == []
    assert [one["text"] for one in line["dropped"]] == [
        f"{word}, {edit.prompt}" for word in ("Well", "Now", "So")
    ]
    assert {one["reason"] for one in line["dropped"]} == {"answer"}
    assert all(float(one["nats"]) >= 0 for one in line["dropped"])


def test_the_filter_keeps_what_the_model_takes_for_the_same(served, settings, monkeypatch):
    monkeypatch.setattr(written, "MOST_NATS", 9.0)
    monkeypatch.setattr(
        written.AnswerFilter,
        "divergences",
        lambda self, groups: [[9.0, 9.1, float("nan")] for _ in groups],
    )
    one = session(settings)
    assert [edit.rewordings for edit in one.edits.edits] == [
        (f"Well, {edit.prompt}",) for edit in one.edits.edits
    ]


def test_a_line_that_a_user_has_changed_is_taken(served, settings):
    session(settings)
    lines = lines_of(settings)
    target = toy_requests(N)[0]["target_new"]
    prompt = lines[0]["prompt"]
    mine = ["In a few words of mine", f"{target} is it, and {prompt}", prompt.upper()]
    lines[0]["rewordings"] = mine
    write_lines(settings, lines)
    one = session(settings)
    assert one.edits.edits[0].rewordings == ("In a few words of mine",)
    assert len(one.edits.edits[1].rewordings) == 3
    assert figures(one)["changed_by_hand"] == 1
    assert figures(one)["dropped"]["target"] == 1
    assert figures(one)["dropped"]["same"] == 1
    assert len(served.asked) == N


def test_another_model_judges_anew_without_asking(served, settings, monkeypatch):
    monkeypatch.setattr(written, "MOST_NATS", -1.0)
    session(settings)
    lines = lines_of(settings)
    lines[0]["rewordings"] = ["In a few words of mine"]
    write_lines(settings, lines)
    monkeypatch.setattr(written, "MOST_NATS", 1e6)
    same = session(settings)
    assert figures(same)["kept"] == 1  # judged by this model already
    other = session(settings, model=toy_model(seed=1))
    assert figures(other)["kept"] == 1 + 3 * (N - 1)
    assert other.edits.edits[0].rewordings == ("In a few words of mine",)
    assert len(served.asked) == N


def test_an_endpoint_that_fails_half_way(served, settings):
    def reply(message, number):
        return three_of(message) if prompt_of(message) in known else (500, "out of order", {})

    prompts = [request["prompt"] for request in toy_requests(N)]
    known = prompts[:3]
    served.reply = reply
    model = toy_model()
    former = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = (
        r"failed 3 times in a row: HTTP 500 .*out of order\. 3 of 5 prompts are reworded and kept"
    )
    with pytest.raises(RewordingsError, match=told) as raised:
        session(settings, model=model)
    assert f"{settings['augment_cache']}: the same command goes on there." in str(raised.value)
    assert all(torch.equal(former[name], p) for name, p in model.named_parameters())
    assert [line["prompt"] for line in lines_of(settings)] == known

    served.asked.clear()
    served.reply = three_of
    one = session(settings)
    # They are asked for at the same time: which one arrives first is nobody's promise.
    assert sorted(map(prompt_of, served.messages)) == sorted(prompts[3:])
    assert figures(one)["kept"] == 3 * N


def test_requests_that_are_trained_one_at_a_time(served, settings):
    one = session(settings, alone=True)
    with one:
        result = one.train_(only=[1])
    assert result.n_trained == 1
    assert figures(one)["kept"] == 3 * N


def test_other_rewordings_are_another_training(served, settings, tmp_path):
    kept = {"checkpoint_dir": str(tmp_path / "checkpoints")}
    first, same = (session(settings, **kept).checkpoints.identity for _ in range(2))
    assert first.differences(same) == []  # where they are kept is of no matter
    lines = lines_of(settings)
    lines[0]["rewordings"][0] = "So, as is well known, " + lines[0]["prompt"]
    write_lines(settings, lines)
    [told] = first.differences(session(settings, **kept).checkpoints.identity)
    assert told == "the edits are others (other edits, rewordings, or order)."


def test_a_model_of_which_a_part_is_not_here(settings):
    model = toy_model()
    model.model.layers[0].mlp.down_proj.to("meta")
    with pytest.raises(ModelError, match=r"`augment_model` compares what the whole model answers"):
        session(settings, model=model)


def test_how_long_it_will_take_is_said_beforehand(settings, monkeypatch, caplog):
    monkeypatch.setattr(written, "_LONG", 0.0)
    hparams = toy_hparams(**settings)
    with open_session(toy_model(), TOKENIZER, toy_requests(N), hparams, progress=True):
        pass
    [told] = [one.message for one in caplog.records if "will take about" in one.message]
    assert told.startswith("Having 5 prompts reworded by endpoint:writer")
    assert settings["augment_cache"] in told


@pytest.mark.processes
def test_rank_0_asks_for_all(served, settings, tmp_path):
    case = settings | {"health_check": False}
    first, second = launch(2, "helpers.distributed_runs:edits", str(tmp_path), [case])
    assert first.value == second.value
    prompts = [prompt_of(message) for message in served.messages]
    assert len(prompts) == len(set(prompts)) == 14


def test_trial_edits_have_nothing_written(served, settings):
    place = Location(2, "down_proj", ("model.layers.{}.mlp.down_proj.weight",))
    edits = distinct_edits(toy_requests(N)).edits
    trials = Trials(toy_model(), TOKENIZER, edits, toy_hparams(**settings), 4)
    assert trials.run(Cell(place, 1e-3), 1).reliability > 0
    assert not served.asked


def test_a_plan_takes_the_key(toy_folder, monkeypatch, capsys):
    from locft_easyedit.__main__ import main

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    command = ["plan", "--config-name", "toy.yaml", "n=6", "augment_model=endpoint:x"]
    assert main(command) == 0, capsys.readouterr().err


def test_edits_that_cannot_be_trained_are_told_of_before_anybody_is_asked(served, settings):
    requests = [*toy_requests(2), {"prompt": "It lies in the " * CONTEXT, "target_new": "Peru"}]
    with pytest.raises(RequestError, match="Shorten it"):
        session(settings, requests)
    assert not served.asked


def test_a_subject_with_half_a_character_is_kept(served, settings):
    requests = [{"prompt": "It lies in", "target_new": "Peru", "subject": "\ud83d"}]
    session(settings, requests)
    assert figures(session(settings, requests))["from_cache"] == 1
    assert len(served.asked) == 1
