"""EasyEdit's own scripts under `locft run`, with `--editing_method=LocFT-BF`; see EASYEDIT_HOME.

The check `easyedit_scripts.py` runs all of them; here are those that differ most.
"""

import os
import sys

import pytest
from helpers.scripts import script_module
from helpers.toys import REPOSITORY

from locft_easyedit.__main__ import main
from locft_easyedit.easyedit.script import run_script

CHECK = REPOSITORY / "benchmarks" / "checks" / "easyedit_scripts.py"
SEQUENTIAL = "--sequential_edit"


@pytest.fixture(scope="module")
def check():
    return script_module(CHECK)


@pytest.fixture
def told(easyedit, check, monkeypatch, capsys):
    """Runs the check on scripts whose names have one of these parts; returns its rows."""
    if easyedit.is_release:
        pytest.skip("the release has no scripts; set EASYEDIT_HOME")

    def run(*scripts, method="LocFT-BF", status=0):
        arguments = ["--methods", method, "--scripts", *scripts]
        monkeypatch.setattr(sys, "argv", [str(CHECK), *arguments])
        assert check.main() == status
        return capsys.readouterr().out.strip().split("\n")[1:]

    return run


def test_results_have_the_methods_name(told):
    rows = told("ultraedit", "concept", method="LocFT-BF+")
    assert len(rows) == 4
    assert all(" wrote " in row and "LocFT-BF+" in row.split(" wrote ")[1] for row in rows)


def test_scripts_that_pick_by_dictionary_by_choices_or_not_at_all(told):
    rows = told("AKEW", "convsent", "SimIE")
    assert sum(" wrote " in row for row in rows) == 4
    refused = [row.split(" refused: ")[1] for row in rows if " refused: " in row]
    assert refused[0].endswith("Algorithm LocFT-BF is not supported for unstructured data.")
    assert refused[1].startswith("run_SimIE_editing.py runs methods of its own (SimIE)")


def test_hallueditbench_runs_without_a_gpu(told):
    [row] = told("Hallueditbench")
    assert "llama_halluedit_LocFT-BF_sure_fixed.json" in row


def test_a_script_with_another_methods_yaml_is_refused_before_easyedit_is_imported(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("import args\nargs.editing_method == 'FT'\n")
    (tmp_path / "ft.yaml").write_text("alg_name: FT\n")
    monkeypatch.setattr("locft_easyedit.easyedit.script.register", os.abort)
    arguments = ["--editing_method=LocFT-BF", "--hparams_dir=ft.yaml"]
    assert main(["run", "script.py", *arguments]) == 2
    assert "`--hparams_dir=ft.yaml` is a YAML of FT" in capsys.readouterr().err


def test_a_users_own_script_gets_the_name_and_an_error_of_its_own_stays_one(
    easyedit, toy_folder, monkeypatch
):
    (toy_folder / "mine.py").write_text(
        "import argparse, easyeditor\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--editing_method', choices=['FT'])\n"
        "parser.add_argument('--hparams_dir')\n"
        "args = parser.parse_args()\n"
        "hparams = easyeditor.FTHyperParams.from_hparams(args.hparams_dir)\n"
        "open(f'{args.editing_method}.txt', 'w').write(f'{hparams.alg_name} {hparams.device!r}')\n"
        "{}['key']\n"
    )
    with pytest.raises(KeyError, match="key"):
        run_script("mine.py", ["--editing_method=LocFT-BF+", "--hparams_dir=toy.yaml"])
    assert (toy_folder / "LocFT-BF+.txt").read_text() == "LocFT-BF+ 'cpu'"
