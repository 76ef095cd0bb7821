"""Every file that is written: whatever fails on the way, what was there before still loads."""

import builtins
import errno
import io
import json
import os
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers.rank_pool import run_python
from helpers.toys import REPOSITORY, made_delta, toy_hparams

from locft_easyedit.compare.job import JobFolder
from locft_easyedit.compare.outcome import Comparison
from locft_easyedit.compare.picture import write_comparison_picture
from locft_easyedit.delta.delta import Delta
from locft_easyedit.errors import OutputError
from locft_easyedit.evaluation.records import CompactRecords
from locft_easyedit.evaluation.report import write_loss_curve
from locft_easyedit.prefix.state_file import StateFile
from locft_easyedit.training.checkpoint_file import Saved, read_checkpoint, write_checkpoint
from locft_easyedit.training.identity import Identity
from locft_easyedit.training.progress import Progress
from locft_easyedit.utils.json_fields import write_dataclass
from locft_easyedit.utils.output import write_json


class Writer(NamedTuple):
    """How a file is written, a small number in it, and how that number is found again.

    `native` writes past Python's own files: only the system can fail there.
    """

    write: Callable
    load: Callable
    native: bool = False


def comparison(number):
    return Comparison("model", "data", number, "source", "cpu", "float32")


def checkpoint(epochs):
    progress = Progress.start(42, 4)
    progress.epoch, progress.losses = epochs, [1.0] * epochs
    tensors = {"master.a": torch.ones(999)}
    identity = Identity({}, {}, {}, {})
    return Saved(identity, {"cut": "mlp", "packed": True}, progress, tensors)


EDITS = [made_delta(scale=1.5 + n).id for n in range(3)]


def picture_of(path):
    """Returns nothing: a picture that opens is whole."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()


# A writer more is a line more.
WRITERS = {
    "metrics.json": Writer(
        lambda path, n: write_json(path, {"records": ["a" * 9000] * 3, "n": n}),
        lambda path: json.loads(path.read_text())["n"],
    ),
    "hparams.json": Writer(
        lambda path, n: write_json(path, toy_hparams(seed=n).to_dict()),
        lambda path: json.loads(path.read_text())["seed"],
    ),
    "loss.png": Writer(lambda path, n: write_loss_curve(path, [2.0, n], 0.01), picture_of),
    "edit.safetensors": Writer(
        lambda path, n: made_delta(scale=1.5 + n).save(path),
        lambda path: EDITS.index(Delta.load(path).id),
        native=True,
    ),
    "checkpoint.safetensors": Writer(
        lambda path, n: write_checkpoint(path, checkpoint(n)),
        lambda path: read_checkpoint(path).progress.epoch,
        native=True,
    ),
    "before.jsonl": Writer(
        lambda path, n: CompactRecords([{"n": n, "text": "a" * 9000}]).write(path, "it"),
        lambda path: CompactRecords.read(path, "it")[0]["n"],
    ),
    "comparison.json": Writer(
        lambda path, n: write_dataclass(path, comparison(n)),
        lambda path: json.loads(path.read_text())["n"],
    ),
    "comparison.png": Writer(
        lambda path, n: write_comparison_picture(path, comparison(n)), picture_of
    ),
    "result.json": Writer(
        lambda path, n: JobFolder(path.parent).write(path, {"result": n, "text": "a" * 9000}),
        lambda path: json.loads(path.read_text())["result"],
    ),
}
ERRORS = [errno.ENOSPC, errno.EACCES, errno.EIO]
# A picture takes a second to draw, and its file is replaced as all others are: one error is enough.
NAMES_AND_ERRORS = [
    (name, number)
    for name in WRITERS
    for number in (ERRORS[:1] if name.endswith(".png") else ERRORS)
]
PYTHONS_OWN = [name for name, writer in WRITERS.items() if not writer.native]


class Faults:
    """Fails one call of a kind, and all that follow."""

    def __init__(self, number, at=1):
        self.number, self.at, self.calls = number, at, 0

    def maybe(self):
        self.calls += 1
        if self.calls >= self.at:
            raise OSError(self.number, os.strerror(self.number))


def failing_opens(monkeypatch, faults):
    """Lets opening a file to write fail."""
    original = io.open

    def opening(file, mode="r", *args, **kwargs):
        if set(mode) & set("wax+"):
            faults.maybe()
        return original(file, mode, *args, **kwargs)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", opening)


def failing_writes(monkeypatch, faults):
    """Lets writing to the disk fail, past every buffer."""
    original = io.open

    class Failing(io.FileIO):
        def write(self, data):
            faults.maybe()
            return super().write(data)

    def opening(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **kwargs):
        if not set(mode) & set("wax+"):
            return original(file, mode, buffering, encoding, errors, newline, **kwargs)
        raw = Failing(file, mode.replace("b", "").replace("t", ""))
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", opening)


def failing(name):
    """Lets a function of `os` fail."""

    def patch(monkeypatch, faults):
        original = getattr(os, name)

        def function(*args, **kwargs):
            faults.maybe()
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, function)

    return patch


POINTS = {
    "open": failing_opens,
    "write": failing_writes,
    "fsync": failing("fsync"),
    "replace": failing("replace"),
}


def fails(tmp_path, monkeypatch, name, point, number, at=1):
    """Writes 1, then 2 with a fault; returns whether it came to the fault."""
    writer, path = WRITERS[name], tmp_path / name
    writer.write(path, 1)
    before = path.read_bytes()
    faults = Faults(number, at)
    with monkeypatch.context() as patch:
        POINTS[point](patch, faults)
        try:
            writer.write(path, 2)
        except OutputError as error:
            told = str(error)
        else:
            return False
    assert faults.calls >= at
    assert f"{name} cannot be written: {os.strerror(number)}" in told
    assert "Free some space, or choose another place that you may write to." in told
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.read_bytes() == before
    assert WRITERS[name].load(path) in (1, None)
    return True


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("name", "number"), NAMES_AND_ERRORS, ids=str)
def test_a_fault_leaves_the_last_file(tmp_path, monkeypatch, name, point, number):
    if WRITERS[name].native and point == "write":
        pytest.skip("written past Python's files; see the test of a limited file size")
    assert fails(tmp_path, monkeypatch, name, point, number)
    WRITERS[name].write(tmp_path / name, 2)  # and the next attempt goes well
    assert WRITERS[name].load(tmp_path / name) in (2, None)


@pytest.mark.parametrize("name", PYTHONS_OWN)
def test_a_fault_at_any_write(tmp_path, monkeypatch, name):
    at = 1
    while fails(tmp_path, monkeypatch, name, "write", errno.ENOSPC, at):
        at += 1
    assert at > 1


def test_the_folder_itself_cannot_be_written_to(tmp_path):
    for name, writer in WRITERS.items():
        if name != "result.json":  # makes its folder
            with pytest.raises(OutputError, match=rf"{name} cannot be written: "):
                writer.write(tmp_path / "none" / name, 1)
    assert list(tmp_path.iterdir()) == []


# The system's own limits: writes that are cut short


LIMITED = """
import pathlib, resource, sys
sys.path.insert(0, {tests!r})
from locft_easyedit.errors import OutputError
from utils.test_write_faults import WRITERS, state_file

folder = pathlib.Path({folder!r})
for name, writer in WRITERS.items():
    writer.write(folder / name, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for name, writer in WRITERS.items():
    try:
        writer.write(folder / name, 2)
    except OutputError as error:
        assert "cannot be written" in str(error), error
    else:
        raise AssertionError(name + " was written")
    assert writer.load(folder / name) in (1, None), name
try:
    state_file(folder / "x.states")
except OutputError as error:
    assert "cannot be written" in str(error), error
else:
    raise AssertionError("states were written")
assert sorted(path.name for path in folder.iterdir()) == sorted(WRITERS), list(folder.iterdir())
"""


def test_writes_that_the_system_cuts_short(tmp_path):
    pytest.importorskip("resource", reason="limits of a process are POSIX")
    folder = tmp_path / "folder"
    folder.mkdir()
    code = LIMITED.format(tests=str(REPOSITORY / "tests"), folder=str(folder))
    done = run_python(["-c", textwrap.dedent(code)])
    assert done.returncode == 0, done.stderr


def test_a_full_device():
    try:
        with open("/dev/full", "w") as file:
            file.write("x")
    except OSError as error:
        full = error.errno == errno.ENOSPC
    else:
        full = False  # a sandbox's own idea of it
    if not full:
        pytest.skip("needs a /dev/full that is full")
    with pytest.raises(OutputError, match=r"/dev/full cannot be written: No space left"):
        write_json("/dev/full", {"a": 1})


# Hidden states: a cache, of which a broken file is never used


def state_file(path):
    file = StateFile.create(path, 6, 4, torch.float32)
    try:
        file.put(torch.arange(6), torch.ones(6, 4))
        file.seal("it")
    finally:
        file.close()


@pytest.mark.parametrize("number", ERRORS, ids=os.strerror)
@pytest.mark.parametrize(
    "point", ["open", "posix_fallocate", "write", "pwrite", "fsync", "replace"]
)
@pytest.mark.parametrize("at", [1, 2])
def test_states_that_could_not_be_written_are_never_used(tmp_path, monkeypatch, point, number, at):
    path = tmp_path / "x.states"
    faults = Faults(number, at)
    with monkeypatch.context() as patch:
        POINTS.get(point, failing(point))(patch, faults)
        try:
            state_file(path)
        except OutputError as error:
            told = str(error)
        else:
            assert at > faults.calls
            return
    assert f"{path} cannot be written: {os.strerror(number)}" in told
    assert "Free some space, or point `prefix_dir` at a larger disk" in told
    assert list(tmp_path.iterdir()) == []
    assert StateFile.open_whole(path, "it", 6, 4, torch.float32) == (None, "there is none")
    state_file(path)
    found, _ = StateFile.open_whole(path, "it", 6, 4, torch.float32)
    assert torch.equal(found.get(torch.arange(6)), torch.ones(6, 4))
    found.close()


# What EasyEdit's users ask for


@pytest.mark.parametrize("number", ERRORS, ids=os.strerror)
@pytest.mark.parametrize("point", POINTS)
def test_measurements_before_the_edit(editor, tmp_path, monkeypatch, point, number):
    path = tmp_path / "pre.json"
    path.write_text("old")
    before = [p.clone() for p in editor.model.parameters()]
    with monkeypatch.context() as patch:
        POINTS[point](patch, Faults(number))
        with pytest.raises(
            OutputError, match=rf"pre\.json cannot be written: {os.strerror(number)}"
        ):
            editor.edit(["The river is"], ["long"], verbose=False, pre_file=str(path))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("pre.json", "old")]
    assert all(torch.equal(a, b) for a, b in zip(editor.model.parameters(), before, strict=True))
