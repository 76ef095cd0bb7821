"""Files that are written: the old content or the new one, never half of it."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.toys import REPOSITORY, made_delta, toy_hparams
from safetensors.torch import save_file

from locft_easyedit import api as pipeline
from locft_easyedit.api import Run
from locft_easyedit.cli import compare as cli
from locft_easyedit.compare.outcome import Comparison
from locft_easyedit.compare.picture import write_comparison_picture
from locft_easyedit.errors import OutputError
from locft_easyedit.evaluation.report import write_loss_curve
from locft_easyedit.utils.files import new_folder, output_errors, replacing, write_atomically
from locft_easyedit.utils.json_fields import write_dataclass
from locft_easyedit.utils.output import write_json

FAILURES = [OSError(28, "stopped"), KeyboardInterrupt("stopped")]


def content_of(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    return path


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_the_new_content_takes_the_place_of_the_old(target):
    with replacing(target) as temporary:
        assert temporary.parent == target.parent  # a rename between file systems is a copy
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert content_of(target.parent) == {"file": "new"}
    write_atomically(str(target), b"newer")
    write_atomically(target.with_name("other"), b"first")
    assert content_of(target.parent) == {"file": "newer", "other": "first"}


# What goes wrong


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_failure_while_writing_changes_nothing(target, error):
    with pytest.raises(type(error), match="stopped"), replacing(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert content_of(target.parent) == {"file": "old"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_failure_at_the_end_changes_nothing(target, monkeypatch, function, error):
    monkeypatch.setattr(os, function, raising(error))
    with pytest.raises(type(error), match="stopped"):
        write_atomically(target, b"new")
    assert content_of(target.parent) == {"file": "old"}


def test_a_failure_before_anything_is_written(target):
    with pytest.raises(KeyError, match="first"), replacing(target):
        raise KeyError("first")
    with pytest.raises(FileNotFoundError, match="No such file"), replacing(target):
        pass
    assert content_of(target.parent) == {"file": "old"}


def test_what_failed_first_is_told(target, monkeypatch):
    monkeypatch.setattr(Path, "unlink", raising(OSError("cannot be removed")))
    monkeypatch.setattr(os, "replace", raising(OSError("stopped")))
    with pytest.raises(OSError, match="stopped"):
        write_atomically(target, b"new")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        write_atomically(tmp_path / "none" / "file", b"new")
    assert content_of(tmp_path) == {}


# On the disk


def test_the_content_is_on_the_disk_before_its_name_and_the_name_after(target, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor):
        found = os.fstat(descriptor)
        done.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)
        fsync(descriptor)

    def seen_replace(source, destination):
        done.append("rename")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_atomically(target, b"12345")
    assert done == [5, "rename", "folder"]


def test_a_folder_that_cannot_be_synchronized_is_no_failure(target, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_atomically(target, b"new")
    assert content_of(target.parent) == {"file": "new"}


# What is no plain file


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_one(tmp_path, exists):
    (tmp_path / "there").mkdir()
    if exists:
        (tmp_path / "there" / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(Path("there") / "file")
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert content_of(tmp_path / "there") == {"file": "new"}


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, b"new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


# Folders


def test_a_folder_is_there_whole(tmp_path):
    target = tmp_path / "above" / "folder"
    with new_folder(target) as temporary:
        assert temporary.parent == target.parent
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("new")
        assert not target.exists()
    assert content_of(target / "inner") == {"file": "new"}
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as temporary:
        (temporary / "file").write_text("new")
    assert content_of(tmp_path / "empty") == {"file": "new"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_nothing_is_left_of_a_folder_that_fails(tmp_path, monkeypatch, function, error):
    monkeypatch.setattr(os, function, raising(error))
    with pytest.raises(type(error), match="stopped"), new_folder(tmp_path / "x") as temporary:
        (temporary / "file").write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    code = """
import os, pathlib, sys
from locft_easyedit.utils.files import new_folder
with new_folder(sys.argv[1]) as folder:
    pathlib.Path(folder, "weights").write_bytes(bytes(100))
    os._exit(9)
"""
    target = tmp_path / "a [1]"
    subprocess.run([sys.executable, "-c", code, str(target)], cwd=REPOSITORY)
    [left] = tmp_path.iterdir()
    with new_folder(target) as mine, new_folder(tmp_path / "other"):
        assert not left.exists()
        with new_folder(target):  # what a living process writes stays
            assert mine.exists()
        target.rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a [1]", "other"]


def test_of_two_runs_that_write_one_folder_the_second_is_told(tmp_path):
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="has been written by another run meanwhile"),
        output_errors(target),
        new_folder(target),
        new_folder(target) as other,
    ):
        (other / "a").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_something_is_refused(tmp_path, target):
    for path in (tmp_path, target):
        with pytest.raises(OutputError, match=r"is there already\. Choose"), new_folder(path):
            raise AssertionError
    assert content_of(tmp_path) == {"file": "old"}


# What a user is told


def test_an_error_of_the_disk_names_the_file_the_reason_and_the_remedy(target):
    message = r"file cannot be written: No space left\. Free some space, or choose another place"
    with pytest.raises(OutputError, match=message), output_errors(target), replacing(target):
        raise OSError(28, "No space left", "/somewhere/.file.1.tmp")
    message = r"file cannot be written: no number\. Free"
    with pytest.raises(OutputError, match=message), output_errors(target):
        raise OSError("no number")
    assert content_of(target.parent) == {"file": "old"}


def test_an_error_of_safetensors_is_told_alike(tmp_path):
    path = tmp_path / "none" / "x.safetensors"
    message = r"x\.safetensors cannot be written: .*No such file"
    with pytest.raises(OutputError, match=message), output_errors(path):
        save_file({"a": torch.zeros(2)}, path)


def test_other_errors_stay_what_they_are(target):
    with pytest.raises(TypeError, match="no text"), output_errors(target):
        raise TypeError("no text")


# All files with results


def write_table(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "compare", lambda settings: COMPARISON)
        # Only the table's own file is to be looked at.
        patch.setattr(cli, "write_dataclass", lambda *_: None)
        patch.setattr(cli, "write_comparison_picture", lambda *_: None)
        patch.setattr(cli, "show", lambda *_: None)
        command = {"data": "edits.json", "n": 1, "methods": ["FT"]}
        cli.run_compare(toy_hparams(), command, path.parent)


def save_model(path):
    run = Run([], SimpleNamespace(losses=[1.0], summary=dict, choice=None), {})
    unfinished = SimpleNamespace(save_pretrained=raising(OSError(28, "No space left")))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_json", "write_loss_curve"):
            patch.setattr(pipeline, name, lambda *_: None)
        pipeline.write_run(path.parent, run, toy_hparams(), save="model", model=unfinished)


COMPARISON = Comparison("model", "data", 1, "source", "cpu", "float32", {}, {}, None, [])
WRITERS = {
    "metrics.json": lambda path: write_json(path, {"a": 1}),
    "loss.png": lambda path: write_loss_curve(path, [2.0, 1.0], 0.01),
    "edit.safetensors": lambda path: made_delta().save(path),
    "comparison.json": lambda path: write_dataclass(path, COMPARISON),
    "comparison.png": lambda path: write_comparison_picture(path, COMPARISON),
    "comparison.md": write_table,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_result_that_cannot_be_written_is_told_and_the_last_one_stays(
    tmp_path, monkeypatch, name
):
    path = tmp_path / name
    WRITERS[name](path)
    assert path.stat().st_size > 10
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left")))
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match=rf"{name} cannot be written: No space left\. Free"):
        WRITERS[name](path)
    assert content_of(tmp_path) == {name: "old"}


def test_a_model_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(OutputError, match=r"model cannot be written: No space left\. Free"):
        save_model(tmp_path / "model")


def test_a_team_may_read_what_the_umask_lets_it_read(tmp_path):
    former = os.umask(0o027)
    try:
        made_delta().save(tmp_path / "edit.safetensors")
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
