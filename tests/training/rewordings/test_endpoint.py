"""An endpoint as a writer: what it is sent, and what becomes of its failures."""

import json

import pytest
from helpers.chat_endpoint import fake_endpoint
from training.rewordings.conftest import three_of

from locft_easyedit.errors import RewordingsError
from locft_easyedit.training.rewordings import endpoint
from locft_easyedit.training.rewordings.endpoint import Endpoint
from locft_easyedit.training.rewordings.instruction import Prompt, instruction

PROMPTS = [Prompt(f"Who wrote book {i}?", f"book {i}") for i in range(12)]


def answers(n=1):
    return list(Endpoint("writer").answers(PROMPTS[:n]))


def test_what_is_sent(served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/")
    assert answers() == [(three_of(PROMPTS[0].text), True)]
    [(body, headers)] = served.asked
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    example, message = instruction(PROMPTS[0])
    assert body == {
        "model": "writer",
        "messages": [
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": example.answer},
            {"role": "user", "content": message},
        ],
    }


def test_no_key_is_sent_where_there_is_none(served):
    answers()
    assert "Authorization" not in served.asked[0][1]


def test_answers_come_in_the_order_of_the_prompts(served):
    assert [text for text, _ in answers(12)] == [three_of(prompt.text) for prompt in PROMPTS]


def test_an_answer_that_was_cut_off_says_so(served):
    choice = {"message": {"content": "one\ntw"}, "finish_reason": "length"}
    served.reply = lambda *_: (200, json.dumps({"choices": [choice]}), {})
    assert answers() == [("one\ntw", False)]


@pytest.mark.parametrize(
    "failure",
    [
        (500, "oops", {}),
        (429, "slow down", {"Retry-After": "0"}),
        (200, "<html>", {}),
        (200, "[]", {}),
        (200, '{"choices": []}', {}),
        (200, '{"choices": [{"message": {"content": null}}]}', {}),
    ],
)
def test_another_try_may_succeed(served, failure):
    served.reply = lambda message, number: failure if number < 2 else three_of(message)
    assert answers() == [(three_of(PROMPTS[0].text), True)]
    assert len(served.asked) == 3
    served.reply = lambda *_: failure
    with pytest.raises(RewordingsError, match=r"/v1/chat/completions failed 3 times in a row: "):
        answers()


def test_what_a_refusal_says(served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    served.reply = lambda *_: (401, "wrong key: secret", {})
    told = r"refuses 'writer': HTTP 401 Unauthorized: wrong key: \.\.\.\. Check OPENAI_BASE_URL"
    with pytest.raises(RewordingsError, match=told):
        answers()
    assert len(served.asked) == 1


def test_the_key_is_not_taken_elsewhere(served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with fake_endpoint(three_of) as elsewhere:
        served.reply = lambda *_: (302, "", {"Location": f"{elsewhere.url}/chat/completions"})
        with pytest.raises(RewordingsError, match="HTTP 302"):
            answers()
        assert not elsewhere.asked


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", (0.0,))
    with fake_endpoint(three_of) as gone:
        monkeypatch.setenv("OPENAI_BASE_URL", gone.url)
    with pytest.raises(RewordingsError, match=r"failed 2 times in a row: .*refused"):
        answers()


def test_no_answer_in_time(served, monkeypatch):
    monkeypatch.setattr(endpoint, "SECONDS", 0.05)
    monkeypatch.setattr(endpoint, "WAITS", ())
    import time

    served.reply = lambda *_: time.sleep(0.3) or ""
    with pytest.raises(RewordingsError, match="timed out"):
        answers()


def test_pauses_are_the_endpoints_own_within_bounds(served, monkeypatch):
    paused = []
    monkeypatch.setattr(endpoint, "WAITS", (1.0, 4.0, 16.0))
    monkeypatch.setattr(endpoint.time, "sleep", paused.append)
    headers = [{"Retry-After": "7"}, {"Retry-After": "9999"}, {"Retry-After": "soon"}]
    served.reply = lambda message, i: (429, "", headers[i]) if i < 3 else three_of(message)
    answers()
    assert paused == [7.0, 60.0, 16.0]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_the_environment_must_name_it(monkeypatch, value):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("OPENAI_BASE_URL", value)
    told = r"`augment_model=endpoint:writer` needs the environment variable OPENAI_BASE_URL"
    with pytest.raises(RewordingsError, match=told):
        Endpoint("writer")


@pytest.mark.parametrize("value", ["file:///etc", "localhost:8000"])
def test_other_addresses_are_refused(monkeypatch, value):
    monkeypatch.setenv("OPENAI_BASE_URL", value)
    with pytest.raises(RewordingsError, match="begins with http"):
        Endpoint("writer")
