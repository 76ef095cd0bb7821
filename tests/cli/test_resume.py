"""`locft edit` after a kill, Ctrl-C or its end: the same command goes on, another is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.rank_pool import run_python, start_python
from helpers.toys import REPOSITORY
from safetensors.torch import load_file

from locft_easyedit.errors import OutputError
from locft_easyedit.evaluation.records import CompactRecords
from locft_easyedit.utils.files import locked
from locft_easyedit.utils.run_folder import run_folder, unfinished_run

pytestmark = pytest.mark.processes

LONGER = """
num_steps: 20
epoch_loss_threshold: 0
batch_loss_threshold: 0
"""


@pytest.fixture
def folder(toy_folder):
    """A folder with a model, edits and hparams, as the current one."""
    yaml = toy_folder / "toy.yaml"
    yaml.write_text(yaml.read_text().replace("num_steps: 3\n", "") + LONGER)
    return toy_folder


def command(*arguments):
    start = ["-m", "locft_easyedit", "edit", "--config-name", "toy.yaml", "data=edits.json"]
    return [*start, *arguments]


def run(*arguments):
    return run_python(command(*arguments))


def interrupted(number, *arguments):
    """Starts the command and sends it a signal in training; returns its exit status and errors."""
    shown, begun = Path("stderr.txt"), time.time()
    with shown.open("w") as stderr:
        steps = ("num_steps=100000", "checkpoint_minutes=0")
        process = start_python(command(*steps, *arguments), stderr=stderr)
        try:
            while not any(  # a step is done
                file.stat().st_mtime > begun for file in Path().rglob("checkpoint/*.safetensors")
            ):
                assert process.poll() is None, shown.read_text()
                time.sleep(0.02)
            process.send_signal(number)
            status = process.wait()
        finally:
            process.kill()
    return status, shown.read_text()


def matrices(folder):
    [file] = folder.glob("*.safetensors")
    return {k: v for k, v in load_file(file).items() if not k.startswith("original.")}


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_one_that_was_not_killed():
    script = REPOSITORY / "benchmarks" / "checks" / "kill.py"
    ran = subprocess.run(
        [sys.executable, str(script), "--kills", "5", "--epochs", "10", "--seed", "3"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "equal bit for bit" in ran.stdout


def test_an_interrupted_command_says_how_to_go_on(folder):
    status, shown = interrupted(signal.SIGINT, "output=out")
    assert status == 130
    assert "locft edit: Interrupted in epoch" in shown
    assert "The same command goes on." in shown
    assert "Traceback" not in shown
    assert not (folder / "out" / "metrics.json").exists()
    [left] = (folder / "out").glob("checkpoint/*.safetensors")
    refused = run("output=out", "lr=1e-3", "num_steps=100000")
    assert refused.returncode == 2
    assert "holds the interrupted run of something else" in refused.stderr
    assert "`lr=0.01` there; now 0.001." in refused.stderr
    assert "Traceback" not in refused.stderr
    assert left.exists()


def test_without_an_output_the_interrupted_run_is_found_again(folder):
    interrupted(signal.SIGINT)
    [first] = folder.glob("outputs/*/*/run.json")
    done = run()  # another number of epochs: another run
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("outputs/*/*/run.json"))) == 2
    status, _ = interrupted(signal.SIGTERM)
    assert status == 143
    assert len(list(folder.glob("outputs/*/*/run.json"))) == 2
    assert not json.loads(first.read_text())["finished"]
    log = (first.parent / "locft_edit.log").read_text()
    assert "training goes on in epoch" in log
    assert "has the metrics before the edit; they are not measured again" in log


def test_a_finished_run_is_shown_again_and_replaced_only_if_asked(folder):
    first = run("output=out")
    assert first.returncode == 0, first.stderr
    assert not (folder / "out" / "checkpoint").exists()
    expected = matrices(folder / "out")
    written = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*.safetensors")}

    again = run("output=out")
    assert again.returncode == 0, again.stderr
    assert "This run was finished" in again.stdout
    assert "Check after the epochs" not in again.stdout
    tables = first.stdout[first.stdout.index("Metrics:") : first.stdout.index("metrics: ")]
    assert tables in again.stdout
    assert {p: p.stat().st_mtime_ns for p in written} == written

    refused = run("output=out", "lr=1e-3")
    assert refused.returncode == 2
    assert "holds the finished run of something else" in refused.stderr
    assert {p: p.stat().st_mtime_ns for p in written} == written

    replaced = run("output=out", "lr=1e-3", "resume=false")
    assert replaced.returncode == 0, replaced.stderr
    assert not all(torch.equal(matrices(folder / "out")[k], v) for k, v in expected.items())


def test_two_runs_do_not_share_an_output(folder):
    with locked(folder / "out"):
        refused = run("output=out")
    assert refused.returncode == 2
    assert "out is in use: another run is writing there" in refused.stderr


def test_other_edits_under_the_same_name_are_another_run(tmp_path):
    with run_folder(tmp_path, {"requests": "a", "lr": 1e-3}, {}) as folder:
        folder.checkpoints.mkdir()
        (folder.checkpoints / "before.jsonl").write_text("something")
    with (
        pytest.raises(OutputError, match="`requests='a'` there; now 'b'"),
        run_folder(tmp_path, {"requests": "b", "lr": 1e-3}, {}),
    ):
        pass


def test_a_run_that_ended_before_it_had_anything_gives_way(tmp_path):
    """A wrong layer, say, shows when the model is looked at: the corrected command goes there."""
    with run_folder(tmp_path, {"layers": [99]}, {}) as folder, locked(folder.checkpoints):
        pass
    with run_folder(tmp_path, {"layers": [2]}, {}) as folder:
        assert folder.settings == {"layers": [2]}
        folder.finish()
    with (
        pytest.raises(OutputError, match="holds the finished run of something else"),
        run_folder(tmp_path, {"layers": [1]}, {}),
    ):
        pass


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 1}', "[" * 10**5, '{"format": 2, "finished": 1}']
)
def test_a_damaged_note_of_a_run_is_told(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with (
        pytest.raises(OutputError, match=r"run.json is damaged.*resume=false"),
        run_folder(tmp_path, {}, {}),
    ):
        pass
    assert (tmp_path / "run.json").read_text() == content
    assert unfinished_run([tmp_path], {}) is None
    with run_folder(tmp_path, {}, {}, resume=False) as folder:
        assert not folder.finished


def test_the_latest_unfinished_run_of_the_same_command_is_found(tmp_path):
    values = {"lr": 1e-3, "layers": [1]}
    for name, of in {"1": values, "2": values, "3": {"lr": 1}, "4": values}.items():
        with run_folder(tmp_path / name, {}, of) as folder:
            if name == "4":
                folder.finish()
    folders = sorted(tmp_path.iterdir())
    assert unfinished_run(folders, values) == tmp_path / "2"
    assert unfinished_run(folders, {"lr": 2}) is None
    assert unfinished_run([], values) is None


def test_metrics_before_the_edit_survive_a_kill(tmp_path):
    records = CompactRecords({"a": i, "nan": float("nan"), "text": "\ud800\n"} for i in range(150))
    path = tmp_path / "before.jsonl"
    records.write(path, {"model": (1, 2)})
    found = CompactRecords.read(path, {"model": [1, 2]})
    assert [r["a"] for r in found] == list(range(150))
    assert found[3]["text"] == "\ud800\n"
    assert CompactRecords.read(path, {"model": 3}) is None
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-30], b"", b"\xff\xfe", whole + b"{}\n"):
        path.write_bytes(damaged)
        assert CompactRecords.read(path, {"model": [1, 2]}) is None
    assert CompactRecords.read(tmp_path / "none", {}) is None


def test_the_lock_ends_with_the_process(tmp_path):
    code = (
        "import time; from locft_easyedit.utils.files import locked\n"
        f"with locked({str(tmp_path)!r}):\n    print('held', flush=True); time.sleep(60)"
    )
    said = tmp_path / "said.txt"
    with said.open("w") as stdout:
        process = start_python(["-c", code], stdout=stdout)
    while said.read_text() != "held\n":
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(OutputError, match="in use"), locked(tmp_path):
        pass
    process.kill()
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < 10


def test_a_full_disk_ends_in_one_message_and_the_run_goes_on_later(folder):
    """A limit on the size of files: writes end half way, as on a disk that is full."""
    code = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    full = run_python(["-c", code, *command("output=out", "checkpoint_minutes=0")[1:]])
    assert full.returncode == 2, full.stderr
    assert "No checkpoint was made, and training goes on" in full.stderr + full.stdout
    assert "cannot be written: " in full.stderr
    assert "Free some space" in full.stderr
    assert "Traceback" not in full.stderr
    names = {path.name for path in (folder / "out").rglob("*") if path.is_file()}
    assert not any(name.endswith(".tmp") for name in names)
    assert not json.loads((folder / "out" / "run.json").read_text())["finished"]
    for path in (folder / "out").rglob("*.json"):
        json.loads(path.read_text())

    later = run("output=out")
    assert later.returncode == 0, later.stderr
    undisturbed = run("output=another")
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected, found = matrices(folder / "another"), matrices(folder / "out")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
