"""The comparison: planned before anything runs, one process a method, taken up where it stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from helpers.toys import DOWN_PROJECTION, toy_hparams, toy_model, toy_requests, toy_tokenizer

from locft_easyedit.cli.compare import main
from locft_easyedit.compare import edits as edits_module
from locft_easyedit.compare import processes as processes_module
from locft_easyedit.compare import run_comparison as run_module
from locft_easyedit.compare import settings as settings_module
from locft_easyedit.compare.commits import commits_of
from locft_easyedit.compare.edits import Edits, MethodEditor
from locft_easyedit.compare.job import BEFORE, STATISTICS, Job, JobFolder, Progress, folder_hash
from locft_easyedit.compare.outcome import Outcome
from locft_easyedit.compare.run_comparison import compare
from locft_easyedit.compare.settings import Settings, planned
from locft_easyedit.easyedit import register
from locft_easyedit.errors import LocFTError, OutputError
from locft_easyedit.evaluation.predictions import EvalConfig
from locft_easyedit.utils.files import locked


@pytest.fixture
def files(tmp_path):
    """A toy model's folder and a file with 12 edits."""
    model = tmp_path / "toy"
    toy_model("llama").save_pretrained(model)
    toy_tokenizer(pad_is_eos=True).save_pretrained(model)
    data = tmp_path / "edits.json"
    data.write_text(json.dumps(toy_requests(12)))
    return model, data


@pytest.fixture
def settings(files, tmp_path):
    model, data = files

    def make(methods=("LocFT-BF", "FT", "MEMIT"), n=4, **changes):
        values = {
            "hparams": toy_hparams(model_name=str(model), device="cpu"),
            "methods": list(methods),
            "data": str(data),
            "n": n,
            "output": tmp_path / "out",
            "stats_dir": str(tmp_path / "stats"),
            "documents": 6,
            "document_tokens": 12,
            "progress": False,
        }
        return Settings(**(values | changes))

    return make


# Planning


def test_plan(settings):
    jobs, needed = planned(settings(peers={"MEMIT": {"layers": [1]}}))
    assert list(jobs) == [BEFORE, STATISTICS, "LocFT-BF", "FT", "MEMIT"]
    assert needed == {"MEMIT": ["model.layers.1.mlp.down_proj"]}
    assert jobs[STATISTICS].covariance_modules == needed["MEMIT"]
    assert jobs["LocFT-BF"].hparams["layers"] == [2]
    assert jobs["MEMIT"].overrides == {"layers": [1]}
    # A method without covariances does not depend on the text they come from.
    assert jobs["FT"].text is None
    assert jobs["FT"].documents == 0
    json.dumps([vars(job) for job in jobs.values()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, r"`methods=\[\]` names none"),
        ({"methods": ["FT", "FT"]}, "names FT twice"),
        ({"methods": ["FT", "ft-m"]}, r"names FT twice \(FT-M is the same\)"),
        ({"methods": ["ROMEE"]}, r"no method `ROMEE`. Did you mean `ROME`\?"),
        ({"peers": {"ROME": {"v_lr": 1}}}, "for a method that is not compared"),
        ({"peers": {"FT": {"learning_rate": 1}}}, "`learning_rate` is not a key of FT"),
        ({"documents": 0}, "`documents` must be 1 or more"),
        ({"text": "nowhere"}, "`text=nowhere` is no folder"),
        ({"data": "nowhere.json"}, "is not a file"),
        ({"n": 99}, "holds 12 edits"),
        (
            {"stream": 0},
            "`stream=0`: the 4 edits come in so many commits. Give a number from 1 to 4",
        ),
        ({"stream": 5}, "`stream=5`"),
        ({"devices": []}, "`devices` is empty"),
        ({"devices": ["cpu", "cuda:0"]}, "`devices` names cpu and cuda: seconds and memory"),
        ({"devices": ["cpu", "gpu"]}, "`devices` names cpu and gpu"),
        ({"devices": ["gpu"]}, "`device=.gpu.` is no device"),
        ({"peers": {"MEMIT": {"layers": [7]}}}, r"MEMIT cannot be set up(?s:.*)\[7\]"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_anything_runs(settings, monkeypatch, changes, message):
    monkeypatch.setattr(run_module, "run_process", None)
    wrong = settings(**changes)
    with pytest.raises(LocFTError, match=message):
        compare(wrong)
    assert not wrong.output.exists()


def test_a_ledger_that_cannot_be_kept_is_refused_before_anything_runs(settings, monkeypatch):
    monkeypatch.setattr(run_module, "run_process", None)
    hparams = replace(settings().hparams, shard_frozen=True)
    with pytest.raises(LocFTError, match="`shard_frozen=True`: all processes have to take part"):
        compare(settings(["LocFT-BF@ledger"], hparams=hparams, stream=2))


def test_names_of_our_methods_whatever_their_case(settings):
    jobs, _ = planned(settings(["locft-bf@LEDGER", "locft-bf+"], stream=2))
    assert list(jobs) == [BEFORE, "LocFT-BF@ledger", "LocFT-BF+"]
    assert jobs["LocFT-BF@ledger"].hparams["alg_name"] == "LocFT-BF"
    assert jobs["LocFT-BF+"].hparams["alg_name"] == "LocFT-BF+"
    assert jobs["LocFT-BF+"].stream == 2
    assert jobs[BEFORE].stream is None  # the model before is the same


def test_a_batch_method_takes_the_edits_of_a_commit(settings, monkeypatch):
    seen = []
    original = settings_module.peer_hparams

    def peer_hparams(method, model, *, n_edits, **options):
        seen.append(n_edits)
        return original(method, model, n_edits=n_edits, **options)

    monkeypatch.setattr(settings_module, "peer_hparams", peer_hparams)
    planned(settings(["MEMIT"], n=5, stream=2))
    planned(settings(["MEMIT"], n=5))
    assert seen == [3, 5]


def test_a_device_each_or_all_devices_for_one(settings):
    hparams = replace(settings().hparams, model_parallel=True)
    with pytest.raises(LocFTError, match="`model_parallel` takes all of them"):
        compare(settings(hparams=hparams, devices=["cpu"]))


def test_a_place_that_does_not_exist(settings):
    with pytest.raises(LocFTError, match=r"`layers=\[9\]` is out of range"):
        compare(settings(hparams=replace(settings().hparams, layers=[9])))


def test_a_folder_that_is_no_causal_model(settings, tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    hparams = toy_hparams(model_name=str(tmp_path / "t5"), device="cpu")
    with pytest.raises(LocFTError, match="cannot be loaded as a causal language model"):
        compare(settings(hparams=hparams))


# Processes: what they leave, and what happens when they do not


class FakeProcesses:
    """Stands in for the processes: writes the results that it was told, and counts."""

    def __init__(self, monkeypatch):
        self.ran = []
        self.results = {
            BEFORE: {
                "n": 4,
                "records": [],
                "summary": {"rewrite_acc": 0.1},
                "capability": None,
                "easyedit": "made up",
                "device": "cpu",
                "versions": {},
            },
            STATISTICS: {"name": "x", "corpus": "a text", "n_samples": 6, "seconds": 1.0},
        }
        monkeypatch.setattr(run_module, "run_process", self)

    def __call__(self, name, folder, progress):
        self.ran.append(name)
        result = self.results.get(name, Outcome(name, n_edits=4).to_dict())
        if isinstance(result, str):
            return result
        if isinstance(result, BaseException):
            raise result
        folder.write(folder.result, {"job": folder.read(folder.job), "result": result})
        return None


def test_results_are_kept_and_taken_up_again(settings, monkeypatch):
    processes = FakeProcesses(monkeypatch)
    processes.results["FT"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare(settings())
    assert processes.ran == [BEFORE, STATISTICS, "LocFT-BF", "FT"]
    processes.ran.clear()
    del processes.results["FT"]
    comparison = compare(settings())
    assert processes.ran == ["FT", "MEMIT"]
    assert [o.method for o in comparison.outcomes] == ["LocFT-BF", "FT", "MEMIT"]
    assert comparison.before == {"rewrite_acc": 0.1}

    processes.ran.clear()
    comparison = compare(settings(methods=["MEMIT", "ROME"]))  # another choice of methods
    assert processes.ran == ["ROME"]
    assert [o.method for o in comparison.outcomes] == ["MEMIT", "ROME"]


def test_what_failed_is_tried_again_and_is_a_row_meanwhile(settings, monkeypatch):
    processes = FakeProcesses(monkeypatch)
    processes.results["FT"] = "its process was ended by SIGKILL"
    processes.results["MEMIT"] = Outcome("MEMIT", status="failed", reason="why").to_dict()
    rows = {o.method: (o.status, o.reason) for o in compare(settings()).outcomes}
    assert rows == {
        "LocFT-BF": ("ok", None),
        "FT": ("failed", "its process was ended by SIGKILL"),
        "MEMIT": ("failed", "why"),
    }
    processes.ran.clear()
    compare(settings())
    assert processes.ran == ["FT", "MEMIT"]


def test_covariances_that_are_gone_are_made_again(settings, monkeypatch, tmp_path):
    processes = FakeProcesses(monkeypatch)
    file = tmp_path / "one.npz"
    file.write_bytes(b"")
    processes.results[STATISTICS] |= {"files": [str(file)]}
    compare(settings())
    processes.ran.clear()
    compare(settings())
    assert processes.ran == []
    file.unlink()
    compare(settings())
    assert processes.ran == [STATISTICS]


def test_without_covariances_only_the_methods_that_need_them_fail(settings, monkeypatch):
    processes = FakeProcesses(monkeypatch)
    processes.results[STATISTICS] = "no text"
    rows = {o.method: (o.status, o.reason) for o in compare(settings()).outcomes}
    assert rows["FT"] == ("ok", None)
    assert rows["MEMIT"] == ("failed", "the key covariances could not be computed: no text")


def test_a_model_that_cannot_be_measured_is_an_error(settings, monkeypatch):
    processes = FakeProcesses(monkeypatch)
    processes.results[BEFORE] = "its process ended with status 1"
    with pytest.raises(LocFTError, match="could not be measured before editing: its process"):
        compare(settings())


def test_results_of_other_settings_are_not_mixed_in(settings, monkeypatch, files):
    processes = FakeProcesses(monkeypatch)
    compare(settings())
    processes.ran.clear()
    with pytest.raises(LocFTError, match=r"(?s)results of other settings.*`n=4` there; now 5"):
        compare(settings(n=5))
    with pytest.raises(LocFTError, match=r"(?s)MEMIT holds results.*`overrides=\{\}` there"):
        compare(settings(peers={"MEMIT": {"v_lr": 0.1}}))
    files[1].write_text(json.dumps(toy_requests(11)))
    with pytest.raises(LocFTError, match=r"(?s)results of other settings.*identity"):
        compare(settings())
    assert processes.ran == []


def test_what_brought_no_result_may_be_run_with_other_settings(settings, monkeypatch):
    processes = FakeProcesses(monkeypatch)
    processes.results["FT"] = "its process was ended by SIGKILL"
    compare(settings())
    (settings().output / "FT" / "job.json").write_text('{"n": 99}')
    del processes.results["FT"]
    assert compare(settings()).outcomes[1].status == "ok"


def test_one_comparison_at_a_time_in_a_folder(settings, monkeypatch):
    FakeProcesses(monkeypatch)
    compare(settings())
    with locked(settings().output), pytest.raises(LocFTError, match="in use: another run"):
        compare(settings())


def test_the_identity_tells_what_results_depend_on(settings, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some words")
    yaml = tmp_path / "ft.yaml"
    yaml.write_text("alg_name: FT\nlr: 1e-3\n")
    given = {"text": str(text), "peers": {"FT": {"hparams": os.path.relpath(yaml)}}}
    before = planned(settings(**given))[0]
    assert before["FT"].overrides["hparams"] == str(yaml)  # processes work elsewhere
    (text / "a.txt").write_text("other words")
    yaml.write_text("alg_name: FT\nlr: 1e-1\n")
    after = planned(settings(**given))[0]
    different = {
        name: {key for key, value in job.identity.items() if after[name].identity[key] != value}
        for name, job in before.items()
    }
    assert different == {
        BEFORE: set(),
        STATISTICS: {"text"},
        "LocFT-BF": set(),
        "FT": {"hparams"},
        "MEMIT": {"text"},
    }
    assert {"torch", "transformers", "easyedit"} < set(before["FT"].identity)


def test_a_folder_of_tasks_may_have_folders(tmp_path):
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "task.yaml").write_text("one")
    first = folder_hash(tmp_path, "*")
    assert folder_hash(tmp_path, "*") == first
    (tmp_path / "group" / "task.yaml").write_text("another")
    assert folder_hash(tmp_path, "*") != first


def test_a_process_that_is_killed(tmp_path, monkeypatch):
    folder = JobFolder(tmp_path)
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    monkeypatch.setattr(processes_module, "_command", lambda folder: [sys.executable, "-c", code])
    reason = processes_module.run_process("FT", folder, False)
    assert reason == ("its process was ended by SIGKILL (the system does so when memory runs out)")
    code = "print('some words'); raise SystemExit('the last words')"
    monkeypatch.setattr(processes_module, "_command", lambda folder: [sys.executable, "-c", code])
    assert processes_module.run_process("FT", folder, False) == "the last words"
    assert "some words" in folder.log.read_text()


def test_sigterm_ends_the_process_that_runs(tmp_path, monkeypatch):
    folder = JobFolder(tmp_path)
    code = "import time; time.sleep(60)"
    monkeypatch.setattr(processes_module, "_command", lambda folder: [sys.executable, "-c", code])
    children = []
    original = subprocess.Popen

    def popen(*args, **kwargs):
        children.append(original(*args, **kwargs))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(SystemExit, match="143"):
        processes_module.run_process("FT", folder, False)
    assert children[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_process_whose_comparison_is_gone_ends(tmp_path, monkeypatch):
    progress = Progress(JobFolder(tmp_path))
    progress.say("editing", 1, 3)
    # Not simply 1, which adopts what a shell leaves behind: pytest as well, if run in a background.
    adopter = os.getppid() + 1
    monkeypatch.setattr(os, "getppid", lambda: adopter)
    with pytest.raises(SystemExit, match="has ended"):
        progress.say("editing", 2, 3)


# Edits: resumable, measured right after each


class AddsToWeights:
    """A method that adds what depends on the edit and on the weights; ends early if told."""

    def __init__(self, model, fail_at=None):
        self.name = DOWN_PROJECTION["llama"].format(1)
        self.weight = dict(model.named_parameters())[self.name]
        self.changed = set()
        self.nothing_changed = False
        self.templates = None
        self.calls = []
        self.fail_at = fail_at

    @torch.no_grad()
    def edit_(self, requests):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        # As ROME: texts made at the first edit, which every later edit depends on.
        self.templates = self.templates or [len(requests[0]["prompt"])]
        self.calls.append([request["prompt"] for request in requests])
        self.weight.mul_(self.templates[0] / 10 + len(requests[0]["prompt"]) / 100)
        self.changed.add(self.name)


def edits_of(tmp_path, model, name="FT", chunk=1, requests=None, stream=None, **options):
    editor = AddsToWeights(model, **options)
    method = MethodEditor(name, editor, chunk, chunk == 1, {}, [], name == "ROME")
    folder = JobFolder(tmp_path)
    return Edits(
        method,
        toy_requests(5) if requests is None else requests,
        model,
        toy_tokenizer(),
        EvalConfig(packed=True),
        folder,
        Progress(folder),
        stream,
    )


def test_commits_are_as_equal_as_can_be():
    assert commits_of(7, 3) == [range(2), range(2, 4), range(4, 7)]
    assert commits_of(4, 1) == [range(4)]


def test_a_stream_looks_back_after_each_commit(tmp_path, monkeypatch):
    """Chunks end where a commit does; an interruption loses no look back."""
    monkeypatch.setattr("locft_easyedit.compare.edits._CHECKPOINT_SECONDS", 0.0)
    whole = edits_of(tmp_path / "whole", toy_model(), chunk=2, stream=2)
    looked = []

    def measure(label, which=None):
        looked.append((label, len(whole.method.editor.calls), list(which)))
        return [{"generated": {"reliability": float(i % 2 == 0)}} for i in which]

    monkeypatch.setattr(whole._each, "measure", measure)
    whole.make_()
    assert [len(call) for call in whole.method.editor.calls] == [2, 2, 1]
    assert looked == [
        ("commits so far", 1, [0, 1]),
        ("commits so far", 3, [0, 1, 2, 3, 4]),
    ]
    assert whole.by_commit == [[0.5], [0.5, 2 / 3]]

    first = edits_of(tmp_path / "cut", toy_model(), chunk=2, stream=2, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        first.make_()
    assert len(first.by_commit) == 1
    second = edits_of(tmp_path / "cut", toy_model(), chunk=2, stream=2)
    second.make_()
    assert len(second.method.editor.calls) == 1
    assert [len(row) for row in second.by_commit] == [1, 2]
    assert torch.equal(second.method.editor.weight, whole.method.editor.weight)


def test_a_stream_without_the_subject_of_a_whole_commit(tmp_path):
    requests = toy_requests(4)
    for request in requests[:2]:
        request["subject"] = "somebody else"
    edits = edits_of(tmp_path, toy_model(), name="ROME", requests=requests, stream=2)
    edits.make_()
    assert len(edits.method.editor.calls) == 2
    assert [len(row) for row in edits.by_commit] == [1, 2]


@pytest.mark.parametrize("append_eos", [True, False])
def test_easyedits_methods_get_targets_that_end(append_eos):
    job = Job("FT", "", "", 2, "cpu", "float32", append_eos=append_eos)
    tokenizer = toy_tokenizer()
    method = edits_module.method_editor(job, toy_model(), tokenizer, 2, register())
    assert method.end == (tokenizer.eos_token if append_eos else "")
    assert not [note for note in method.notes if "do not end" in note]


def test_targets_that_cannot_end_are_told():
    tokenizer = toy_tokenizer()
    for name in ("pad_token", "bos_token", "unk_token"):
        setattr(tokenizer, name, tokenizer.eos_token)
    assert set(tokenizer.all_special_tokens) == {tokenizer.eos_token}
    job = Job("FT", "", "", 2, "cpu", "float32")
    method = edits_module.method_editor(job, toy_model(), tokenizer, 2, register())
    assert method.end == ""
    assert [note for note in method.notes if "Its targets do not end" in note]


def test_edits_in_a_ledger_and_without(tmp_path):
    """In a ledger the first commit's facts are still there; without one the later ones win."""
    job = Job("LocFT-BF@ledger", "", "", 8, "cpu", "float32", stream=4)
    job.hparams = toy_hparams(model_name="toy", num_steps=40, batch_size=2, lr=1e-2).to_dict()
    known = {}
    for name in ("LocFT-BF@ledger", "LocFT-BF"):
        model, tokenizer = toy_model(), toy_tokenizer()
        job.name = name
        state = tmp_path / name
        for _ in range(2):  # what an interrupted run has left is in nobody's way
            method = edits_module.method_editor(job, model, tokenizer, 2, register(), state)
        folder = JobFolder(tmp_path / name)
        edits = Edits(method, toy_requests(8), model, tokenizer, EvalConfig(packed=True), folder,
                      Progress(folder), 4)  # fmt: skip
        edits.make_()
        known[name] = edits.by_commit
    assert [len(row) for row in known["LocFT-BF"]] == [1, 2, 3, 4]
    assert known["LocFT-BF@ledger"][-1] == [1.0] * 4
    assert known["LocFT-BF"][-1][0] < 1.0
    assert known["LocFT-BF"][-1][-1] == 1.0


def test_edits_go_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr("locft_easyedit.compare.edits._CHECKPOINT_SECONDS", 0.0)
    whole = edits_of(tmp_path / "whole", toy_model())
    whole.make_()
    assert [len(call) for call in whole.method.editor.calls] == [1] * 5
    assert len(whole.right_after) == 5
    assert all("rewrite_acc" in entry for entry in whole.right_after)

    first = edits_of(tmp_path / "cut", toy_model(), fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        first.make_()
    second = edits_of(tmp_path / "cut", toy_model())
    second.make_()
    assert len(second.method.editor.calls) == 2
    assert torch.equal(second.method.editor.weight, whole.method.editor.weight)
    assert second.right_after == whole.right_after
    assert second.seconds > 0


def test_a_checkpoint_that_cannot_be_saved_leaves_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr("locft_easyedit.compare.edits._CHECKPOINT_SECONDS", 0.0)
    whole = edits_of(tmp_path / "whole", toy_model())
    whole.make_()
    first = edits_of(tmp_path / "full", toy_model())
    saved = []

    def save_file(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata)

    original = edits_module.save_file
    monkeypatch.setattr(edits_module, "save_file", save_file)
    with pytest.raises(OutputError, match=r"edited\.safetensors cannot be written: No space left"):
        first.make_()
    assert [file.name for file in first.folder.state.iterdir()] == ["edited.safetensors"]
    monkeypatch.undo()
    second = edits_of(tmp_path / "full", toy_model())
    second.make_()
    assert len(second.method.editor.calls) == 3
    assert torch.equal(second.method.editor.weight, whole.method.editor.weight)


def test_a_method_with_state_of_its_own_starts_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("locft_easyedit.compare.edits._CHECKPOINT_SECONDS", 0.0)
    first = edits_of(tmp_path, toy_model(), name="AlphaEdit", chunk=2, fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        first.make_()
    second = edits_of(tmp_path, toy_model(), name="AlphaEdit", chunk=2)
    second.make_()
    assert [len(call) for call in second.method.editor.calls] == [2, 2, 1]
    assert second.right_after == []


def test_edits_without_a_subject_in_the_prompt_are_counted(tmp_path):
    requests = toy_requests(5)
    requests[2]["subject"] = "somebody else"
    edits = edits_of(tmp_path, toy_model(), name="ROME", requests=requests)
    edits.make_()
    assert edits.n_made == 4
    assert "1 of 5 edits could not be made" in edits.notes[0]
    assert requests[2]["prompt"] not in [
        prompt for call in edits.method.editor.calls for prompt in call
    ]
    for request in requests:
        del request["subject"]
    with pytest.raises(LocFTError, match="no record has one"):
        edits_of(tmp_path, toy_model(), name="ROME", requests=requests)


def test_a_result_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    folder = JobFolder(tmp_path / "job")
    folder.write(folder.result, {"n": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"result\.json cannot be written: No space left"):
        folder.write(folder.result, {"n": 2})
    assert folder.read(folder.result) == {"n": 1}
    assert [file.name for file in folder.path.iterdir()] == ["result.json"]
    with pytest.raises(OutputError, match=r"x\.json cannot be written: (Not a dir|File exists)"):
        folder.write(folder.result / "x.json", {})


def test_a_damaged_result_is_none(tmp_path):
    folder = JobFolder(tmp_path)
    folder.result.write_text('{"job": ')
    assert folder.read(folder.result) is None
    job = Job("FT", "model", "data", 3, "cpu", "float32")
    assert job.differences(json.loads(json.dumps(vars(job)))) == []
    assert job.differences({**vars(job), "n": 4}) == ["`n=4` there; now 3."]


# Several devices


# What a stand-in for a method's process does: `did` notes what it was given and when.
STAND_IN = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
started = time.time()
(folder / "started").write_text("")
others = [folder.parent / name / "started" for name in {waits_for!r}]
end = time.time() + 60
while not all(other.exists() for other in others):
    if time.time() > end:
        sys.exit("the others did not start")
    time.sleep(0.02)
(folder / "progress.json").write_text(json.dumps({{"phase": "editing", "done": 1, "total": 4}}))
time.sleep({seconds})
if job["name"] in {dying!r}:
    os.kill(os.getpid(), 9)
did = {{"started": started, "ended": time.time(), "threads": os.environ.get("OMP_NUM_THREADS")}}
(folder / "did.json").write_text(json.dumps(did | {{"device": job["device"]}}))
result = {{**json.loads({outcome!r}), "method": job["name"]}}
(folder / "result.json").write_text(json.dumps({{"job": job, "result": result}}))
"""


@pytest.fixture
def stand_ins(monkeypatch):
    """Lets methods be stand-ins for processes; what is done once for all methods is made up."""

    def make(waits_for=(), seconds=0.3, dying=()):
        outcome = json.dumps(Outcome("", n_edits=4).to_dict())
        code = STAND_IN.format(
            waits_for=list(waits_for), seconds=seconds, dying=list(dying), outcome=outcome
        )
        fakes = FakeProcesses(monkeypatch)

        def command(folder):
            return [sys.executable, "-c", code, str(folder.path)]

        monkeypatch.setattr(processes_module, "_command", command)
        return fakes

    return make


def did(settings, method):
    return json.loads((settings.output / method / "did.json").read_text())


def test_methods_run_beside_one_another(settings, stand_ins, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    fakes = stand_ins(waits_for=["LocFT-BF", "FT"])  # which alone would never end
    wanted = settings(methods=("LocFT-BF", "FT", "MEMIT"), devices=["cpu", "cpu"])
    comparison = compare(wanted)
    assert fakes.ran == [BEFORE, STATISTICS]  # before all methods, and each alone
    assert [(o.method, o.status) for o in comparison.outcomes] == [
        ("LocFT-BF", "ok"), ("FT", "ok"), ("MEMIT", "ok")
    ]  # fmt: skip
    assert {did(wanted, o.method)["device"] for o in comparison.outcomes} == {"cpu"}
    # Two share the processor.
    assert {did(wanted, o.method)["threads"] for o in comparison.outcomes} == {"3"}
    job = JobFolder(wanted.output / "FT").read(wanted.output / "FT" / "job.json")
    assert job["beside"] == 2
    third = did(wanted, "MEMIT")["started"]
    assert third > min(did(wanted, m)["ended"] for m in ("LocFT-BF", "FT"))
    memit = JobFolder(wanted.output / "MEMIT").read(wanted.output / "MEMIT" / "job.json")
    assert memit["statistics"]["corpus"] == "a text"
    assert comparison.outcomes[1].log == str(wanted.output / "FT" / "log.txt")


def test_one_device_has_one_method_at_a_time(settings, stand_ins, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stand_ins(seconds=0.05)
    wanted = settings(methods=("LocFT-BF", "FT", "ROME"), devices=["cpu"])
    compare(wanted)
    times = sorted((did(wanted, m)["started"], did(wanted, m)["ended"]) for m in wanted.methods)
    assert times[0][1] <= times[1][0]
    assert times[1][1] <= times[2][0]
    assert did(wanted, "FT")["threads"] is None


def test_a_method_that_fails_beside_others_is_a_row_and_tried_again(settings, stand_ins):
    stand_ins(dying=["FT"])
    wanted = settings(methods=("FT", "LocFT-BF"), devices=["cpu", "cpu"])
    rows = [(o.method, o.status, o.reason) for o in compare(wanted).outcomes]
    killed = "its process was ended by SIGKILL (the system does so when memory runs out)"
    assert rows == [("FT", "failed", killed), ("LocFT-BF", "ok", None)]
    before = did(wanted, "LocFT-BF")
    fakes = stand_ins()
    assert [o.status for o in compare(wanted).outcomes] == ["ok", "ok"]
    assert fakes.ran == []
    assert did(wanted, "LocFT-BF") == before
    # What is there is taken up in whatever way the rest would run.
    stand_ins(dying=["FT", "LocFT-BF"])
    assert [o.status for o in compare(replace(wanted, devices=None)).outcomes] == ["ok", "ok"]


def test_without_covariances_the_others_run_beside_one_another(settings, stand_ins):
    fakes = stand_ins()
    fakes.results[STATISTICS] = "no text"
    rows = {o.method: o.status for o in compare(settings(devices=["cpu", "cpu"])).outcomes}
    assert rows == {"LocFT-BF": "ok", "FT": "ok", "MEMIT": "failed"}


@pytest.mark.parametrize(
    ("how", "raised", "message"),
    [(signal.SIGINT, KeyboardInterrupt, "^$"), (signal.SIGTERM, SystemExit, "143")],
)
def test_interrupted_all_processes_end(settings, stand_ins, monkeypatch, how, raised, message):
    stand_ins(seconds=60)
    started = []
    original = subprocess.Popen

    def popen(command, *args, **kwargs):
        if "git" in command:  # which commit EasyEdit's clone is at
            return original(command, *args, **kwargs)
        started.append(original(command, *args, **kwargs))
        if len(started) == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), how)).start()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    # Ctrl-C as on a terminal: a shell starts what runs in the background without it.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(raised, match=message):
            compare(settings(methods=("LocFT-BF", "FT", "ROME"), devices=["cpu", "cpu"]))
    finally:
        signal.signal(signal.SIGINT, former)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_lines_of_several_processes(settings, stand_ins, capfd, monkeypatch):
    stand_ins(seconds=0.6)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a log file gets no bars
    compare(settings(methods=("LocFT-BF", "FT"), devices=["cpu", "cpu"], progress=True))
    told = capfd.readouterr().err
    assert "FT on cpu: editing" in told
    assert "LocFT-BF on cpu: editing" in told
    assert "methods: 100%" in told
    assert "done: " in told


def test_another_device_of_the_kind_is_no_other_setting():
    def job(on, **hparams):
        return Job("FT", "model", "data", 3, on, "float32", hparams=hparams)

    first = vars(job("cuda:0", device=0, lr=0.1))
    for device in ("cuda:3", "3", "cuda"):
        assert job(device, device="cuda:3", lr=0.1).differences(first | {"beside": 4}) == []
    assert job("cpu", device=0, lr=0.1).differences(first)[0] == "`device='cuda'` there; now 'cpu'."
    assert job("3", device=3, lr=0.2).differences(first) != []
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert job(None).differences(vars(job(here))) == []


def test_what_is_done_once_is_done_on_the_first_device(settings):
    jobs, _ = planned(settings(devices=["cpu", "cpu"]))
    assert {job.device for job in jobs.values()} == {"cpu"}
    hparams = replace(settings().hparams, device=None)
    jobs, _ = planned(settings(hparams=hparams, devices=["cpu"]))
    assert jobs[BEFORE].device == "cpu"
    jobs, _ = planned(settings(hparams=hparams))
    assert jobs[BEFORE].device is None


# All of it


@pytest.mark.slow
def test_the_command(files, tmp_path, capsys, monkeypatch):
    """LocFT-BF and ROME run with every EasyEdit; AlphaEdit is not in the release."""
    pytest.importorskip("nltk", reason="EasyEdit needs nltk: pip install locft_easyedit[easyedit]")
    model, data = files
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--config-name=smollm2-135m",
        f"model_name={model}",
        "layers=[2]",
        "num_steps=2",
        f"data={data}",
        "n=3",
        "methods=[LocFT-BF,ROME,AlphaEdit]",
        "peers.ROME.v_num_grad_steps=2",
        "documents=6",
        "document_tokens=12",
        "output=out",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    rows = {row["method"]: Outcome(**row) for row in comparison["outcomes"]}
    for name in ("LocFT-BF", "ROME"):
        assert rows[name].status == "ok", rows[name].reason
        assert rows[name].n_edits == 3
        assert rows[name].peak_memory_gib > 0
        assert rows[name].seconds_per_edit > 0
        assert set(rows[name].after_all) >= {"rewrite_acc", "locality", "generated"}
        assert name in printed
    assert rows["LocFT-BF"].right_after_each is None
    assert set(rows["ROME"].right_after_each) >= {"rewrite_acc", "generated"}
    assert rows["ROME"].hparams["v_num_grad_steps"] == 2
    if os.environ.get("EASYEDIT_HOME"):
        assert rows["AlphaEdit"].status == "ok", rows["AlphaEdit"].reason
        assert "sampled from" in rows["AlphaEdit"].corpus
    else:
        assert rows["AlphaEdit"].status == "unavailable"
        assert "EASYEDIT_HOME" in rows["AlphaEdit"].reason
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    assert "| ROME |" in (tmp_path / "out" / "comparison.md").read_text()
