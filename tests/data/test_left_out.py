"""What reading leaves out is counted and named; nothing that a file says is evaluated."""

import json
import logging
import re
from pathlib import Path

import pytest

import locft_easyedit
from locft_easyedit.data.readers import read_requests
from locft_easyedit.easyedit.peers.peer_hparams import _covariance_modules
from locft_easyedit.errors import DataError

FULL = {"prompt": "a is", "target_new": "b"}
EMPTY = {"prompt": "c is", "target_new": ""}


def read(tmp_path, records, n=None):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(records))
    return read_requests(path, n)


def test_records_with_an_empty_target_are_counted_and_named(tmp_path, caplog):
    records = [EMPTY, FULL, {**EMPTY, "target_new": None}, FULL, {**EMPTY, "target_new": []}]
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path, records)) == 2
    [told] = caplog.messages
    assert told.endswith("3 edits with an empty target are left out (records 0, 2, 4).")


def test_of_many_the_first_are_named(tmp_path, caplog):
    read(tmp_path, [EMPTY] * 30 + [FULL])
    assert "30 edits" in caplog.text
    assert "records 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more" in caplog.text


def test_prompts_without_an_answer_are_counted_and_named(tmp_path, caplog):
    entry = {"prompt": "d is", "ground_truth": " "}
    with_one = FULL | {"locality": {"x": [entry, {"prompt": "e is", "ground_truth": "f"}]}}
    [request, other] = read(tmp_path, [with_one, FULL | {"portability": {"y": [entry, entry]}}])
    assert request["locality"] == {"x": {"prompt": ["e is"], "ground_truth": ["f"]}}
    assert other["portability"] == {}
    assert "left out" not in {*request, *other}
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "1 locality prompts without an answer are left out (record 0).",
        "2 portability prompts without an answer are left out (record 1).",
    ]


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
    assert len(read(tmp_path, [FULL])) == 1
    assert caplog.messages == []


def test_if_all_are_empty_the_error_says_so(tmp_path):
    with pytest.raises(DataError, match="no edits: all 2 records have an empty target"):
        read(tmp_path, [EMPTY, EMPTY])
    with pytest.raises(DataError, match="holds 1 edits, besides 1 with an empty target"):
        read(tmp_path, [EMPTY, FULL], n=2)


HOSTILE = ["{:>2000000000} is", "{0.__class__.__mro__} is", "{x} {} is", "{{}} {!r}"]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_is_no_format_string(tmp_path, prompt):
    rewrite = {
        "prompt": prompt,
        "subject": "{0}",
        "target_new": {"str": "b"},
        "target_true": {"str": "c"},
    }
    [request] = read(tmp_path, [{"requested_rewrite": rewrite}])
    assert request["prompt"] == prompt.replace("{}", "{0}")


def test_a_template_is_no_format_string():
    values = {"mom2_adjustment": True, "layers": [3], "rewrite_module_tmp": "h.{}.{:>2000000000}"}
    assert _covariance_modules(values) == ["h.3.{:>2000000000}"]


def test_only_own_texts_are_formatted():
    # Receivers of `.format`: constants of this package.
    own = {"frame", "self.frame", "_TEMPORARY", "_KEEP", "kind"}
    package = Path(locft_easyedit.__file__).parent
    for file in package.rglob("*.py"):
        receivers = re.findall(r"([\w.\])\"']+)\.format\(", file.read_text(encoding="utf-8"))
        assert set(receivers) <= own, file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "holds null; it must be a list"),
        ('[{"prompt": "a", "target_new": NaN}]', "has no text as 'target_new': NaN"),
        (
            '[{"prompt": "a", "target_new": "b", "locality": {"x": {"prompt": ["c", "d"], '
            '"ground_truth": ["e"]}}}]',
            "`x` of its locality has 2 prompts, but 1 answers",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, message):
    path = tmp_path / "edits.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_requests(path)


def test_null_and_nan_are_no_answers(tmp_path):
    path = tmp_path / "edits.json"
    path.write_text('[{"prompt": "a", "target_new": ["b", NaN], "locality": {"x": null}}]')
    [request] = read_requests(path)
    assert request == {
        "prompt": "a",
        "target_new": "b",
        "ground_truth": None,
        "locality": {},
        "portability": {},
    }
