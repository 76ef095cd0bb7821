"""The file of rewordings: what a user may do with it, and what is refused."""

import json
import os

import pytest
from helpers.toys import toy_hparams

from locft_easyedit.errors import OutputError, RewordingsError
from locft_easyedit.training.rewordings.rewording_cache import Line, RewordingCache, cache_file

KEY = ("Who wrote Emma?", "Emma", "writer")
DROPPED = [{"text": "Emma?", "reason": "answer"}]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "kept.jsonl"


@pytest.fixture
def line():
    return Line.of(KEY, ["Emma is by whom?"], DROPPED, "judge")


def test_what_is_added_is_found_again(file, line):
    cache = RewordingCache(file)
    assert cache.find(KEY) is None
    cache.add([line])
    assert cache.find(KEY) == line
    again = RewordingCache(file).find(KEY)
    assert again == line
    assert not again.by_hand
    assert RewordingCache(file).find((*KEY[:2], "another writer")) is None


def test_the_file_can_be_read(file):
    RewordingCache(file).add([Line.of(("エマの作者は？", None, "w"), ["作者は誰？"], [], "j")])
    assert "作者は誰？" in file.read_text(encoding="utf-8")


def test_a_changed_line_is_the_users(file, line):
    RewordingCache(file).add([line])
    values = json.loads(file.read_text())
    values["rewordings"].append("Whose is Emma?")
    file.write_text(json.dumps(values))  # without the end of a line, as editors leave it
    cache = RewordingCache(file)
    assert cache.find(KEY).by_hand
    other = Line.of(("a", None, "w"), [], [], "j")
    cache.add([other])
    again = RewordingCache(file)
    assert again.find(KEY).rewordings == ["Emma is by whom?", "Whose is Emma?"]
    assert again.find(other.key) == other


def test_a_line_of_the_users_own_needs_little(file):
    file.parent.mkdir()
    file.write_text('\n{"prompt": "a", "writer": "w", "rewordings": ["b"]}\n\n')
    assert RewordingCache(file).find(("a", None, "w")).by_hand


def test_what_others_add_meanwhile_stays(file, line):
    cache = RewordingCache(file)
    RewordingCache(file).add([line])
    other = Line.of(("a", None, "w"), [], [], "j")
    cache.add([other])
    assert RewordingCache(file).find(KEY) == line
    assert RewordingCache(file).find(other.key) == other


def test_the_last_line_counts(file, line):
    RewordingCache(file).add([line])
    RewordingCache(file).add([Line.of(KEY, ["Whose is Emma?"], [], "judge")])
    assert RewordingCache(file).find(KEY).rewordings == ["Whose is Emma?"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "is no object"),
        ('{"prompt": "a", "writer": "w"}', "`rewordings` is missing"),
        ('{"prompt": 1, "writer": "w", "rewordings": []}', "`prompt=1` is no text"),
        ('{"prompt": "a", "writer": "w", "rewordings": "b"}', "`rewordings='b'` is no list"),
        ('{"prompt": "a", "writer": "w", "rewordings": [" "]}', "no text or blank"),
        ('{"prompt": "a", "writer": "w", "rewordings": ["\\ud800"]}', "no text or blank"),
        ('{"prompt": "a", "writer": "w", "rewordings": [], "subject": 1}', "`subject=1`"),
        ('{"prompt": "a", "writer": "w", "rewordings": [], "dropped": ["b"]}', "`dropped` must"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_lines_that_cannot_be_used_are_named(file, line, text, reason):
    RewordingCache(file).add([line])
    with file.open("a") as opened:
        opened.write(f"{text}\n[]\n")
    with pytest.raises(RewordingsError, match=r"kept\.jsonl, cannot be used") as raised:
        RewordingCache(file)
    assert "line 2: " in str(raised.value)
    assert reason in str(raised.value)
    assert "line 3: [] is no object. Correct it, or remove the line." in str(raised.value)


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file(toy_hparams()) == tmp_path / "locft_easyedit" / "rewordings.jsonl"
    assert cache_file(toy_hparams(augment_cache=str(tmp_path / "x"))) == tmp_path / "x"
    with pytest.raises(RewordingsError, match=r"is a folder\. Give the path of a file"):
        cache_file(toy_hparams(augment_cache=str(tmp_path)))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(RewordingsError, match="Set `augment_cache` to a file"):
        cache_file(toy_hparams())


def test_a_file_that_cannot_be_written(tmp_path, line):
    (tmp_path / "kept").write_text("")
    with pytest.raises(OutputError, match="set `augment_cache` to a file that you may write to"):
        RewordingCache(tmp_path / "kept" / "x.jsonl").add([line])


def test_nothing_to_add_makes_no_file(file):
    RewordingCache(file).add([])
    assert not os.path.lexists(file)
