"""`locft locate`, as a user starts it."""

import csv
import json

import pytest

from locft_easyedit.__main__ import main
from locft_easyedit.hparams import LocFTBFHyperParams

SMALL = ["sweep_layers=[1,3]", "sweep_modules=[v,down]", "sweep_lrs=[1e-2]"]


def locate(*arguments):
    return main(["locate", "--config-name", "toy.yaml", "data=edits.json", *arguments])


@pytest.fixture
def in_process(monkeypatch):
    """Lets the study's work be done here: no process has to start."""
    from locft_easyedit.locate.study import run_study as run
    from locft_easyedit.locate.study import study_worker as worker

    def work(study, progress):
        worker.work(study)
        return []

    monkeypatch.setattr(run, "_work", work)


def test_the_command(toy_folder, capsys):
    assert locate("output=out", *SMALL) == 0
    out = capsys.readouterr().out
    assert f"heat maps: {toy_folder / 'out/heat_maps.png'}" in out.replace("\n", "")
    for picture in ("heat_maps.png", "front.png"):
        assert (toy_folder / "out" / picture).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((toy_folder / "out" / "cells.csv").open()))
    assert {(row["layer"], row["module"]) for row in rows} == {
        (layer, module) for layer in "13" for module in ("v", "down")
    }
    assert "down" in (toy_folder / "out" / "study.md").read_text()
    found = json.loads((toy_folder / "out" / "outcome.json").read_text())
    assert len(found["cells"]) == 4


def test_the_yaml_that_it_writes_is_ready_to_use(toy_folder, in_process, capsys):
    assert locate("output=out", *SMALL) == 0
    hparams = LocFTBFHyperParams.from_hparams("out/hparams.yaml")
    best = max(
        (json.loads(file.read_text()) for file in (toy_folder / "out/cells").iterdir()),
        key=lambda cell: (cell["figures"]["score"], -cell["figures"]["drift"]),
    )
    assert hparams.layers == [best["cell"]["location"]["layer"]]
    assert [hparams.rewrite_module_tmp] == best["cell"]["location"]["templates"]
    assert (hparams.lr, hparams.num_steps, hparams.batch_size) == (1e-2, 3, 4)
    edit = ["edit", "--config-name", "out/hparams.yaml", "data=edits.json", "output=e"]
    assert main([*edit, "save=none"]) == 0


def test_the_same_command_goes_on(toy_folder, in_process, capsys, monkeypatch):
    from locft_easyedit.locate.study.study import Study

    original, written = Study.write, []

    def write(self, outcome):
        original(self, outcome)
        written.append(outcome.cell.key)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Study, "write", write)
    assert locate("output=out", *SMALL) == 130
    assert "The same command goes on" in capsys.readouterr().err
    # What there is can be looked at.
    assert len(list(csv.DictReader((toy_folder / "out" / "cells.csv").open()))) == 2
    assert locate("output=out", *SMALL) == 0
    assert len(written) == len(set(written)) == 4


def test_another_study_in_the_folder_is_refused(toy_folder, in_process, capsys):
    assert locate("output=out", *SMALL) == 0
    ours = [f for f in (toy_folder / "out").glob("[!.]*") if f.is_file() and f.suffix != ".log"]
    files = {f: f.stat().st_mtime_ns for f in [*ours, *(toy_folder / "out/cells").iterdir()]}
    assert locate("output=out", "n=3", *SMALL) == 2
    err = capsys.readouterr().err
    assert "/out` holds another study" in err
    assert "`number of requests=6` there; now 3" in err
    assert len(files) > 8
    assert not [f for f, time in files.items() if f.stat().st_mtime_ns != time]


def test_mistakes_are_one_message_and_write_nothing(toy_folder, capsys):
    assert locate("output=out", "sweep_modules=[up,sideways]", "sweep_layers=[9]") == 2
    err = capsys.readouterr().err
    assert "['sideways'] must be among q, k, v" in err
    assert "[9] is not among the layers 0 to 3" in err
    assert "Traceback" not in err
    assert not (toy_folder / "out" / "study.json").exists()


def test_cells_that_fail_are_marked_in_what_is_written(toy_folder, in_process, capsys):
    assert (
        locate("output=out", "sweep_layers=[3]", "sweep_modules=[layer]", "sweep_lrs=[1e30]") == 0
    )
    assert "diverged" in (toy_folder / "out" / "study.md").read_text()
    assert "diverged" in capsys.readouterr().out
    assert not (toy_folder / "out" / "hparams.yaml").exists()


def test_multirun_makes_a_study_for_each(toy_folder, in_process, capsys):
    assert locate("-m", "output=out", "n=3,4", *SMALL) == 0
    assert {len(list((toy_folder / "out" / i / "cells").iterdir())) for i in "01"} == {4}


def test_jobs_of_a_multirun_can_share_one_study(toy_folder, in_process, capsys):
    assert locate("-m", "output=out", "hydra.sweep.subdir=.", "worker=1,2", *SMALL) == 0
    assert len(list((toy_folder / "out" / "cells").iterdir())) == 4


def test_help(capsys):
    assert main(["locate", "--help"]) == 0
    assert "sweep_modules" in capsys.readouterr().out
