"""What `preserve` names: files of every form, and every problem of them at once."""

import json

import pytest

from locft_easyedit.errors import DataError
from locft_easyedit.hparams_rules import NEIGHBOURS, SAMPLED
from locft_easyedit.training.preserve import sources as module
from locft_easyedit.training.preserve.sources import Source, read_sources


def problems_of(preserve):
    with pytest.raises(DataError, match=r"^`preserve` cannot be used:\n") as caught:
        read_sources([str(name) for name in preserve])
    return [line.removeprefix("  - ") for line in str(caught.value).split("\n")[1:]]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# What is read


def test_words_and_files_in_their_order(tmp_path):
    text = write(tmp_path, "a.txt", "\ufeff one\ntwo \n \t\n\n three\r\n\r\nfour\n\n")
    listed = write(tmp_path, "b.json", json.dumps(["Who is it", {"prompt": " so ", "x": 1}]))
    lines = write(tmp_path, "c.JSONL", '"one"\n\n {"prompt": "é"} \n')
    assert read_sources([str(lines), NEIGHBOURS, str(text), SAMPLED, str(listed)]) == [
        Source("prompts", str(lines), ("one", "é")),
        Source("neighbours", "neighbours"),
        Source("text", str(text), ("one\ntwo", "three", "four")),
        Source("sampled", "sampled"),
        Source("prompts", str(listed), ("Who is it", " so ")),
    ]
    assert read_sources([]) == []


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.txt", "one")
    assert read_sources(["~/a.txt"]) == [Source("text", "~/a.txt", ("one",))]
    with pytest.raises(DataError, match="given twice"):
        read_sources(["~/a.txt", str(tmp_path / "a.txt")])
    with pytest.raises(DataError, match="is not a file"):
        read_sources(["~\0/a.txt"])


def test_digest_is_that_of_kind_and_texts():
    sources = [
        Source("text", "a.txt", ("ab", "c")),
        Source("text", "a.txt", ("a", "bc")),
        Source("text", "a.txt", ("c", "ab")),
        Source("prompts", "a.txt", ("ab", "c")),
        Source("sampled", "sampled"),
        Source("neighbours", "neighbours"),
    ]
    assert len({source.digest() for source in sources}) == len(sources)
    assert Source("text", "elsewhere.txt", ("ab", "c")).digest() == sources[0].digest()


# What is refused


def test_all_problems_at_once(tmp_path):
    bad = write(tmp_path, "bad.txt", b"abc\xff")
    blank = write(tmp_path, "blank.txt", " \n\n\t")
    (tmp_path / "folder.txt").mkdir()
    prompts = write(
        tmp_path, "p.json", json.dumps(["good", 3, {"text": "x"}, " ", "\ud800", {"prompt": None}])
    )
    names = ["sample", bad, blank, tmp_path / "folder.txt", prompts, "no\0file.txt", "", SAMPLED]
    found = problems_of(names)
    assert found[:4] == [
        "`sample` is no source. Give `sampled`, `neighbours`, a .txt file of text, or a .json or "
        ".jsonl file of prompts.",
        f"`{bad}` does not parse: it is not UTF-8 (byte 3). Convert it.",
        f"`{blank}` holds no text. Give a file with some.",
        f"`{tmp_path}/folder.txt` is not a file. Give the path of one that is there.",
    ]
    assert found[4:9] == [
        f"`{prompts}`, record 1: 3 is no prompt. Give a text, or an object with `prompt`.",
        f"`{prompts}`, record 2: {{'text': 'x'}} is no prompt. Give a text, or an object with "
        "`prompt`.",
        f"`{prompts}`, record 3: the prompt is blank. Remove it.",
        f"`{prompts}`, record 4: the prompt holds a lone surrogate. Clean the text.",
        f"`{prompts}`, record 5: {{'prompt': None}} is no prompt. Give a text, or an object with "
        "`prompt`.",
    ]
    assert found[9].startswith("`no\0file.txt` is not a file.")
    assert found[10] == "... and 1 more of the kind."


def test_names_that_are_none():
    with pytest.raises(DataError, match=r"\n  - 3 is no name\. Give .*\n  - ' ' is no name\."):
        read_sources([3, " "])


def test_nothing_is_given_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.txt", "text")
    assert problems_of([SAMPLED, "a.txt", SAMPLED, "./a.txt", tmp_path / "a.txt"]) == [
        "`sampled` is given twice. Remove one.",
        "`./a.txt` is given twice. Remove one.",
        f"`{tmp_path}/a.txt` is given twice. Remove one.",
    ]


def test_a_file_may_have_the_name_of_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "sampled", "not looked at")
    (tmp_path / "sampled.txt").write_text("text")
    assert [s.kind for s in read_sources(["sampled", "sampled.txt"])] == ["sampled", "text"]


def test_json_that_does_not_parse(tmp_path):
    one = write(tmp_path, "a.json", '["a",\n"b" "c"]')
    two = write(tmp_path, "b.jsonl", '"a"\n"b\n\n{"prompt": ""}\n[1]\n')
    deep = write(tmp_path, "c.json", "[" * 200_000)
    mapping = write(tmp_path, "d.json", '{"prompt": "a"}')
    empty = [write(tmp_path, "e.json", " "), write(tmp_path, "f.json", "[]")]
    assert problems_of([one, two, deep, mapping, *empty]) == [
        f"`{one}`: line 2, column 5: Expecting ',' delimiter. Correct it.",
        f"`{two}`, line 2: column 1: Unterminated string starting at. Correct it.",
        f"`{two}`, line 4: the prompt is blank. Remove it.",
        f"`{two}`, line 5: [1] is no prompt. Give a text, or an object with `prompt`.",
        f"`{deep}`: it is nested too deeply. Correct it.",
        f"`{mapping}` holds a dict; it must be a list of prompts.",
        f"`{empty[0]}` holds no prompts. Give a file with some.",
        f"`{empty[1]}` holds no prompts. Give a file with some.",
    ]


def test_one_file_does_not_hide_the_others(tmp_path):
    many = write(tmp_path, "many.json", json.dumps([1] * 50))
    found = problems_of([many, tmp_path / "none.txt"])
    assert len(found) == 7
    assert found[5:] == [
        f"`{many}`: 45 more of its prompts.",
        f"`{tmp_path}/none.txt` is not a file. Give the path of one that is there.",
    ]


def test_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 2**20)
    file = write(tmp_path, "large.txt", "a" * (2**20 + 1))
    assert problems_of([file]) == [f"`{file}` has 1 MiB; at most 1 are read. Give a part of it."]
    file.write_text("a" * 2**20)
    assert read_sources([str(file)])[0].texts == ("a" * 2**20,)
