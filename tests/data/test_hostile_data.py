"""Data files of any content: requests that can be edited and measured, or one typed error."""

import json
import os

import pytest
from helpers.hostile import TEXTS, Deep, attempt, real, values
from helpers.toys import toy_requests
from hypothesis import example, given, settings
from hypothesis import strategies as st

from locft_easyedit.cli.evaluate import EvaluateConfig, _stored
from locft_easyedit.compare.job import JobFolder
from locft_easyedit.data.readers import read_requests
from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.errors import DataError, RequestError
from locft_easyedit.evaluation.prompts import Questions
from locft_easyedit.prefix.state_file import StateFile

NAMES = (
    "prompt target_new src alt ans answers pred rephrase subject loc loc_ans portability locality "
    "requested_rewrite update text labels concept ground_truth neighborhood_prompts aliases "
    "neighborhood_answers target_true str paraphrase_prompts"
)
KEYS = st.sampled_from(NAMES.split())
RECORDS = st.lists(st.dictionaries(KEYS, values(KEYS), max_size=8) | values(KEYS), max_size=4)


def text_of(value):
    try:
        return json.dumps(real(value))
    except RecursionError:
        return "[" * 5000 + "]" * 5000


@settings(max_examples=100, deadline=None)
@given(RECORDS | values(KEYS))
@example([{"prompt": "a", "target_new": Deep(5000, "b")}])
@example([{"prompt": "a", "target_new": Deep(400, "b")}])
@example([{"src": "a", "alt": 5, "loc": ["x"], "loc_ans": "y"}])
@example([{"prompt": "a", "target_new": "b", "locality": {"n": 5}}])
@example([{"prompt": "a", "target_new": "b", "portability": {"n": {"prompt": "x"}}}])
@example([{"a" * 9999: 1}])
def test_any_json_is_requests_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "data.json"
    path.write_text(text_of(value))
    requests, refused = attempt(DataError, read_requests, path)
    if not refused:
        attempt(RequestError, distinct_edits, requests)
        attempt(RequestError, Questions, requests)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | TEXTS.map(lambda t: t.encode("utf-8", "replace")))
@example(b"")
@example(b"\xff\xfe[\x00]\x00")
@example(b"[" * 99_999)
@example(b"[" + b"9" * 5000 + b"]")
@example(b'[{"prompt": NaN, "target_new": Infinity}]')
@example(b'["\\ud800"]')
@example(b'[{"prompt": "\\ud800", "target_new": "b"}]')
def test_any_bytes_are_requests_or_refused(tmp_path_factory, content):
    for suffix in (".json", ".jsonl"):
        path = tmp_path_factory.getbasetemp() / f"data{suffix}"
        path.write_bytes(content)
        attempt(DataError, read_requests, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 9999, r"from line 1: it is nested too deeply\. Correct the JSON"),
        (b"[" + b"9" * 5000 + b"]", r"from line 1: Exceeds the limit"),
        (b"[" + b'"x' * 1 + b"y" * 10**6 + b'"]', r"record 0 \(a str\) is of no known form"),
        ("[]".encode("utf-16"), r"is not UTF-8 \(byte 0\)"),
    ],
    ids=["deep", "long number", "one long line", "UTF-16"],
)
def test_files_are_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_requests(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    requests = [{"prompt": "a", "target_new": "b"}]
    (tmp_path / "a.json").write_text(json.dumps(requests), encoding="utf-8-sig")
    assert read_requests(tmp_path / "a.json")[0]["target_new"] == "b"


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800", ".", "pipe"])
def test_what_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(DataError, match="is not a file"):
        read_requests(name)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[]")

    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refused)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied\. Give a file"):
        read_requests(path)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
       st.text(st.characters(exclude_categories=["Cs"]), min_size=1))  # fmt: skip
def test_what_is_written_is_read_again(tmp_path_factory, target, prompt):
    requests = toy_requests(2)
    requests[0] |= {"prompt": prompt, "target_new": target}
    path = tmp_path_factory.getbasetemp() / "again.json"
    path.write_text(json.dumps(requests))
    first = read_requests(path)
    assert (first[0]["prompt"], first[0]["target_new"]) == (prompt, target)
    path.write_text(json.dumps(first))
    assert read_requests(path) == first


# Files of earlier runs


@pytest.mark.parametrize(
    "content", ["", "5", "[]", "[" * 9999, '{"result": 5}', "\0", '{"phase": 1}'], ids=repr
)
def test_a_damaged_file_of_a_job_counts_as_none(tmp_path, content):
    folder = JobFolder(tmp_path)
    folder.result.write_text(content)
    found = folder.read(folder.result, "result", "more")
    assert found is None


@settings(max_examples=100, deadline=None)
@given(values(st.sampled_from(["format", "fingerprint", "crc32"])))
@example({"format": 1, "fingerprint": "f", "crc32": [1e999]})
@example({"format": 1, "fingerprint": "f", "crc32": Deep(9)})
@example(Deep(5000))
def test_any_seal_is_refused(tmp_path_factory, value):
    import torch

    path = tmp_path_factory.getbasetemp() / "x.states"
    path.write_bytes(b"states")
    path.with_name("x.states.json").write_text(text_of(value))
    file, reason = StateFile.open_whole(path, "f", 3, 4, torch.float32)
    assert file is None
    assert reason


@settings(max_examples=150, deadline=None)
@given(values(st.sampled_from(["records", "requested_rewrite", "post", "pre", "locality"])))
@example({"records": [{"requested_rewrite": {}, "post": 5, "pre": {}}]})
@example({"records": [{"requested_rewrite": {}, "post": Deep(700), "pre": {}}]})
@example({"records": {}})
def test_any_stored_metrics_are_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "metrics.json"
    path.write_text(text_of(value))
    config = EvaluateConfig(model="m", data="d", original=str(path), output="o")
    assert attempt(DataError, _stored, config, toy_requests(1)) == (None, True)
