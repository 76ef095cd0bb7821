"""A study's folder and its processes."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.toys import toy_model, toy_requests, toy_tokenizer

from locft_easyedit.data.requests import distinct_edits
from locft_easyedit.errors import DataError, HyperParamsError, LocFTError, OutputError
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.locate.auto import promises_of
from locft_easyedit.locate.study import run_study as run
from locft_easyedit.locate.study import study_worker as worker
from locft_easyedit.locate.study.run_study import locate
from locft_easyedit.locate.study.study import Study, load_study
from locft_easyedit.locate.study.study_outcome import (
    DIVERGED,
    FAILED,
    OK,
    OUT_OF_MEMORY,
    CellOutcome,
)
from locft_easyedit.locate.study.study_settings import StudySettings, coarse_to_fine
from locft_easyedit.modeling.locations import Location
from locft_easyedit.training.choice import Cell
from locft_easyedit.utils.subprocesses import WorkerPool

GRID = {"layers": [1, 3], "modules": ["v", "down"], "rates": [1e-2]}


@pytest.fixture
def study(toy_folder):
    """Makes a study of the toy."""

    def make(output="out", hparams=None, **changes):
        h = dataclasses.replace(LocFTBFHyperParams.from_hparams("toy.yaml"), **(hparams or {}))
        return Study(StudySettings(h, "edits.json", **(GRID | changes)), toy_folder / output)

    return make


def done(one):
    return {file.stem for file in one.cells_folder.glob("*.json")}


def finished(one):
    one.open()
    worker.work(one)
    return one


def test_all_places_of_the_model_are_visited_by_default(study):
    one = study(layers=None, modules=None, rates=None)
    assert len(one.locations) == 4 * 9
    assert one.rates == pytest.approx([1e-3, 3e-3, 1e-2, 3e-2])
    there = ["q", "k", "v", "o", "gate", "up", "down", "mlp", "layer"]
    assert [location.module for location in one.locations[:9]] == there


def test_modules_that_a_model_lacks_are_absent(study, toy_folder):
    toy_model("gpt2").save_pretrained("gpt2")
    toy_tokenizer(pad_is_eos=True).save_pretrained("gpt2")
    gpt2 = {"model_name": "./gpt2"}
    one = study(hparams=gpt2, layers=[1], modules=["q", "down", "layer"])
    assert [str(location) for location in one.locations] == ["layer 1 down", "layer 1 layer"]
    with pytest.raises(HyperParamsError, match=r"this model has none of them, but qkv, o, up"):
        study(hparams=gpt2, modules=["q", "gate"])


def test_lora_changes_places_of_matrices_alone(study):
    one = study(hparams={"tuning": "lora"}, layers=None, modules=None, n=4)
    assert {location.module for location in one.locations} == {
        *("q", "k", "v", "o", "gate", "up", "down", "mlp")
    }
    small = study("lora", {"tuning": "lora", "lora_rank": 2}, layers=[3], modules=["mlp"])
    assert [cell.state for cell in finished(small).outcome().cells] == [OK]


def test_every_counts_from_the_last(study):
    assert {one.layer for one in study(layers=None, every=3).locations} == {0, 3}
    assert {one.layer for one in study(layers=None, every=9).locations} == {3}


@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_the_order_is_coarse_to_fine(n):
    places = [Location(i, module, ("{}",)) for i in range(n) for module in ("q", "down")]
    order = coarse_to_fine(places[::-1])
    assert sorted(order) == sorted(places)
    assert [one.module for one in order] == ["q", "down"] * n
    layers = [one.layer for one in order[::2]]
    for i in range(1, n):  # after every few the largest gap has become smaller
        seen = sorted([-1, *layers[: 2**i], n])
        gaps = [b - a for a, b in itertools.pairwise(seen)]
        assert max(gaps) <= max(2, 2 * n / i)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 4]}, r"`sweep_layers`: \[4\] is not among the layers 0 to 3"),
        ({"layers": []}, "`sweep_layers` is empty"),
        ({"modules": ["upward"]}, r"`sweep_modules`: \['upward'\] must be among q, k, v"),
        ({"modules": []}, "`sweep_modules` is empty"),
        ({"rates": [1e-3, 0]}, r"`sweep_lrs=\[0.001, 0\]` must be numbers above 0"),
        ({"rates": []}, r"`sweep_lrs=\[\]` must be numbers above 0, at least one"),
        ({"every": 0}, "`every=0` must be 1 or more"),
        (
            {"hparams": {"layers": "auto", "lr": "auto"}, "rates": None},
            "`lr=auto`: a study has rates to try",
        ),
        ({"devices": []}, "`devices` is empty"),
        ({"devices": ["cpu", "warm"]}, "`device='warm'` is no device"),
        ({"hparams": {"stream_frozen": True}}, "every layer of the model is trained in turn"),
        ({"hparams": {"quantize_frozen": "8bit"}}, "all of it must be on the device"),
        ({"hparams": {"model_name": None}}, "`model_name` must be a folder or hub name"),
        ({"n": 99}, "99"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(study, toy_folder, changes, message):
    with pytest.raises(LocFTError, match=message):
        study(**changes)
    assert not (toy_folder / "out").exists()


def test_several_problems_are_one_message(study):
    with pytest.raises(HyperParamsError, match=r"(?s)`every=0`.*`sweep_modules` is empty"):
        study(every=0, modules=[])


def test_text_of_the_user(study, toy_folder):
    (toy_folder / "own.txt").write_text("One two three.\n\n" + "word " * 400)
    one = study(text="own.txt")
    assert [len(passage.split()) for passage in one.passages] == [3, 150, 150, 100]
    (toy_folder / "long.txt").write_text("word " * 9999)
    assert sum(len(p.split()) for p in study(text="long.txt").passages) == 1500
    (toy_folder / "blank.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match="holds no words"):
        study(text="blank.txt")
    (toy_folder / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        study(text="latin.txt")


def test_a_study_is_tried_cell_by_cell(study):
    one = finished(study(rates=[1e-3, 1e-2]))
    outcome = one.outcome()
    assert done(one) == {
        f"layer-{layer:02d}-{module}-{rate}"
        for layer in (1, 3)
        for module in ("v", "down")
        for rate in ("0.001", "0.01")
    }
    assert (outcome.model, outcome.data, outcome.n, outcome.n_cells) == ("toy", "edits", 6, 8)
    assert all(cell.state == OK for cell in outcome.cells)
    assert outcome.chosen() in outcome.cells


def test_what_is_done_is_not_done_again(study, monkeypatch):
    one = finished(study())
    (one.cells_folder / "layer-03-down-0.01.json").write_text('{"format": 1, "cell"')  # damaged
    (one.cells_folder / "layer-01-v-0.01.json").unlink()
    times = {file.name: file.stat().st_mtime_ns for file in one.cells_folder.iterdir()}
    monkeypatch.setattr(worker, "measure_before", None)  # nor is the model measured again
    again = finished(study())
    changed = {
        file.name
        for file in again.cells_folder.iterdir()
        if times.get(file.name) != file.stat().st_mtime_ns
    }
    assert changed == {"layer-03-down-0.01.json", "layer-01-v-0.01.json"}


def test_the_grid_may_grow(study):
    finished(study())
    one = finished(study(layers=[0], modules=["o"], rates=[1e-3]))
    assert "layer-00-o-0.001" in done(one)
    assert len(done(one)) == 5
    assert one.outcome().n_cells == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 4}, r"`number of requests=6` there; now 4"),
        ({"hparams": {"num_steps": 9}}, r"`num_steps=3` there; now 9"),
        ({"capability": ["locft_basics"]}, r"`capability=\[\]` there; now \['locft_basics'\]"),
    ],
)
def test_the_folder_of_another_study_is_refused(study, changes, message):
    study().open()
    with pytest.raises(OutputError, match=message):
        study(**changes).open()


def test_place_and_rate_of_the_yaml_make_no_other_study(study):
    study().open()
    study(hparams={"layers": [0], "lr": 5e-5, "health_check": False}).open()


def test_a_damaged_folder_is_refused(study):
    one = study()
    one.open()
    (one.path / "study.json").write_text("{")
    with pytest.raises(OutputError, match="damaged or of another version"):
        study().open()
    with pytest.raises(OutputError, match="damaged or of another version"):
        load_study(one.path)
    with pytest.raises(OutputError, match=r"holds no study: it has no study\.json"):
        load_study(one.path.parent)


def test_a_process_reads_the_study_as_it_was_asked_for(study):
    one = study(rates=[1e-3, 1e-2], devices=["cpu", "cpu"], n=4)
    one.open()
    found = load_study(one.path)
    assert found.all_cells() == one.all_cells()
    assert found.identity == one.identity


def test_a_place_that_somebody_is_at_is_left_to_him(study):
    one = study()
    one.open()
    with one.held("layer-01-down", wait=False) as mine:
        assert mine
        worker.work(study())
        assert done(one) == {"layer-01-v-0.01", "layer-03-v-0.01", "layer-03-down-0.01"}
    worker.work(study())
    assert len(done(one)) == 4


def test_marked_cells_are_tried_again_if_asked(study, monkeypatch):
    one = study()
    one.open()
    for layer, state in ((1, DIVERGED), (3, OUT_OF_MEMORY)):
        [location] = [p for p in one.locations if (p.layer, p.module) == (layer, "down")]
        one.write(CellOutcome(Cell(location, 1e-2), state, "as it happens"))
    finished(study())
    states = {cell.cell.key: cell.state for cell in one.outcome().cells}
    assert states["layer-01-down-0.01"] == DIVERGED
    again = finished(study(retry=True))
    assert {cell.state for cell in again.outcome().cells} == {OK}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(study):
    alone = finished(study("alone")).outcome()
    both = locate(study("both", devices=["cpu", "cpu"]), progress=False)
    assert [one.cell for one in both.cells] == [one.cell for one in alone.cells]
    for one, other in zip(both.cells, alone.cells, strict=True):
        assert one.figures == pytest.approx(other.figures, rel=1e-3)
    assert len(list((both_folder := study("both").path / "logs").iterdir())) == 2, both_folder


OPEN_STUDY = (
    "from pathlib import Path\n"
    "from locft_easyedit.locate.study.study import load_study\n"
    "study = load_study(Path(sys.argv[1]))\n"
    "cells = study.open_cells()\n"
)


def _worker_that(code):
    """Returns what starts a process that runs some code, given the folder of the study."""
    start = "import os, signal, sys, time\n"
    return lambda study, device: [sys.executable, "-c", start + code, str(study.path)]


@pytest.mark.parametrize(
    ("number", "state", "reason"),
    [
        ("SIGKILL", OUT_OF_MEMORY, "when memory runs out"),
        pytest.param("SIGSEGV", FAILED, "was ended by SIGSEGV", marks=pytest.mark.slow),
    ],
)
def test_a_cell_that_kills_its_process_is_marked_and_the_study_goes_on(
    study, monkeypatch, number, state, reason
):
    # One of these for every cell: all are tried, all are marked.
    code = f"if cells:\n    study.begin(cells[0])\n    os.kill(os.getpid(), signal.{number})"
    monkeypatch.setattr(run, "_command", _worker_that(OPEN_STUDY + code))
    outcome = locate(study(modules=["down"]), progress=False)
    assert [one.state for one in outcome.cells] == [state, state]
    assert all(reason in one.reason for one in outcome.cells)


def test_a_process_that_cannot_work_is_told(study, monkeypatch):
    code = "sys.exit('The model cannot be loaded: no such file.')"
    monkeypatch.setattr(run, "_command", _worker_that(code))
    with pytest.raises(LocFTError, match=r"(?s)could not be finished.*no such file. \(see .*logs"):
        locate(study(), progress=False)


def test_interrupted_the_processes_end(study, monkeypatch):
    monkeypatch.setattr(run, "_command", _worker_that("time.sleep(600)"))
    started = []
    original = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(original(*args, **kwargs))
        return started[-1]

    def interrupted(pool):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(WorkerPool, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate(study(devices=["cpu", "cpu"]), progress=False)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_processes_on_one_cpu_share_its_cores(study, monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    code = "sys.exit(os.environ.get('OMP_NUM_THREADS', 'none'))"
    monkeypatch.setattr(run, "_command", _worker_that(code))
    with pytest.raises(LocFTError, match="cpu: 3 "):
        locate(study(devices=["cpu", "cpu"]), progress=False)


def test_nothing_is_written_outside_the_folder(study, toy_folder):
    there = {path.name for path in toy_folder.iterdir()}
    one = finished(study())
    assert {path.name for path in toy_folder.iterdir()} - there == {"out"}
    stored = json.loads((one.cells_folder / "layer-01-v-0.01.json").read_text())
    assert stored["state"] == OK


# Mixtures


@pytest.fixture
def mixture(study, toy_folder):
    """Makes a study of a mixture, with edits enough to tell its experts apart."""
    toy_model("qwen2_moe").save_pretrained("mixture")
    toy_tokenizer(pad_is_eos=True).save_pretrained("mixture")
    (toy_folder / "edits.json").write_text(json.dumps(toy_requests(8)))

    def make(output="out", hparams=None, **changes):
        h = {"model_name": "./mixture", "num_steps": 2} | (hparams or {})
        return study(output, h, **changes)

    return make


def test_the_most_promising_expert_of_each_layer_is_tried(mixture):
    one = mixture(modules=["down", "shared_down", "expert_down"])
    assert [str(place) for place in one.locations] == [
        f"layer {layer} {module}" for layer in (3, 1) for module in ("down", "shared_down")
    ]
    assert one.experts.missing
    outcome = finished(one).outcome()
    assert not one.experts.missing
    assert not one.unfinished
    assert [(c.cell.location.layer, c.cell.location.module, c.state) for c in outcome.cells] == [
        (layer, module, OK) for layer in (1, 3) for module in ("down", "shared_down", "expert_down")
    ]
    h = dataclasses.replace(one.settings.hparams, layers="auto", rewrite_module_tmp="auto")
    edits = distinct_edits(one.requests).edits
    promises = promises_of(toy_model("qwen2_moe"), toy_tokenizer(pad_is_eos=True), edits, h)
    experts = {(p.layer, p.module): p for p in promises}
    sizes = {}
    for cell in outcome.cells:
        place = cell.cell.location
        if place.module == "expert_down":
            assert place == experts[place.layer, "expert_down"]
        sizes.setdefault(place.module, set()).add(cell.parameters)
    assert sizes == {"down": {4 * 32 * 32}, "shared_down": {32 * 64}, "expert_down": {32 * 32}}
    again = mixture(modules=["expert_down"])  # found before: nothing is left
    assert not again.unfinished
    assert len(again.locations) == 2


def test_experts_alone_are_found_and_tried_by_a_process(mixture):
    one = mixture(layers=[2], modules=["expert_gate_up"])
    assert one.locations == []
    [cell] = locate(one, progress=False).cells
    assert (cell.state, cell.cell.location.module) == (OK, "expert_gate_up")
    assert cell.cell.key == "layer-02-expert_gate_up-0.01"


def test_too_few_edits_tell_no_experts_apart(mixture):
    one = mixture(modules=["shared_down", "expert_down"], n=7)
    assert not one.experts.missing
    assert {place.module for place in one.locations} == {"shared_down"}
    with pytest.raises(HyperParamsError, match=r"single experts alone.*8 distinct.*there are 7"):
        mixture(modules=["expert_down"], n=7)


def test_memory_that_runs_out_leaves_experts_out(mixture, monkeypatch, caplog):
    def out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(worker, "promises_of", out)
    one = finished(mixture(layers=[3], modules=["shared_down", "expert_down"]))
    assert "Single experts are left out" in caplog.text
    assert [place.module for place in one.locations] == ["shared_down"]
    assert not one.unfinished
