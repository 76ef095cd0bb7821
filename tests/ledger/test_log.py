"""The chained log: whole or not at all, mended from its copy, refused where neither is whole."""

import json

import pytest

from locft_easyedit.errors import LedgerError
from locft_easyedit.ledger.log import ADD, COPY, FORMAT, INIT, LOG, Log


@pytest.fixture
def written(tmp_path):
    """A log of four events."""
    log = Log(tmp_path)
    log.append(INIT, {"format": FORMAT, "text": "ä\u2028"})
    for i in range(3):
        log.append(ADD, {"facts": [i]})
    return log


def test_what_was_written_is_read_again(written):
    found = Log.read(written.folder)
    assert found.events == written.events
    assert not found.damage
    assert [event.kind for event in found.events] == [INIT, ADD, ADD, ADD]
    assert (written.folder / LOG).read_bytes() == (written.folder / COPY).read_bytes()
    for line in (written.folder / LOG).read_text(encoding="utf-8").split("\n")[:-1]:
        assert json.loads(line)["hash"]


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_line_that_was_not_finished_does_not_count(written, cut):
    path = written.folder / LOG
    lines = path.read_bytes().split(b"\n")
    torn = lines[3][:cut]
    for name in (LOG, COPY):
        (written.folder / name).write_bytes(b"\n".join([*lines[:3], b""]))
    with path.open("ab") as file:
        file.write(torn)
    found = Log.read(written.folder)
    assert found.events == written.events[:3]
    assert "line 4" in found.damage[0]
    assert "not written to its end" in found.damage[0]
    found.append(ADD, {"facts": ["again"]})
    again = Log.read(written.folder)
    assert len(again.events) == 4
    assert not again.damage


@pytest.mark.parametrize("line", [0, 1, 3])
def test_a_damaged_line_is_taken_from_the_copy(written, line):
    path = written.folder / LOG
    lines = path.read_bytes().split(b"\n")
    lines[line] = lines[line].replace(b'"number":', b'"nummer":')
    path.write_bytes(b"\n".join(lines))
    found = Log.read(written.folder)
    assert found.events == written.events
    assert f"line {line + 1}" in found.damage[0]
    found.mend_()
    assert path.read_bytes() == (written.folder / COPY).read_bytes()
    assert not Log.read(written.folder).damage


def test_a_log_that_is_gone_is_mended_from_the_copy(written):
    (written.folder / LOG).unlink()
    found = Log.read(written.folder)
    assert found.events == written.events
    found.mend_()
    assert not Log.read(written.folder).damage


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:1] + lines[2:],  # one left out
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [lines[0], lines[1].replace(b"[0]", b"[7]"), *lines[2:]],
        lambda lines: [b"", *lines[1:]],
    ],
)
def test_both_damaged_is_an_error(written, change):
    for name in (LOG, COPY):
        path = written.folder / name
        path.write_bytes(b"\n".join(change(path.read_bytes().split(b"\n"))))
    with pytest.raises(LedgerError, match=r"Line [12] of .* is damaged, and so is the copy"):
        Log.read(written.folder)


def test_a_newer_version_is_told(tmp_path):
    log = Log(tmp_path)
    log.append(INIT, {"format": FORMAT + 1})
    with pytest.raises(
        LedgerError, match=rf"format {FORMAT + 1}; this version reads format {FORMAT}"
    ):
        Log.read(tmp_path)


def test_an_unknown_kind_is_told(written):
    written.append("merge", {})
    with pytest.raises(LedgerError, match="of the kind 'merge', which this version does not know"):
        Log.read(written.folder)


def test_no_ledger(tmp_path):
    with pytest.raises(LedgerError, match="is no ledger"):
        Log.read(tmp_path)


def test_an_event_that_cannot_be_written_leaves_the_log(written, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = (written.folder / LOG).read_bytes()
    monkeypatch.setattr("locft_easyedit.ledger.log.os.fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        written.append(ADD, {"facts": []})
    monkeypatch.undo()
    assert (written.folder / LOG).read_bytes() == before
    assert len(written.events) == 4
