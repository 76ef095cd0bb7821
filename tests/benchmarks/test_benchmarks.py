"""Every benchmark and check tells how it is used, and runs at its smallest size."""

import json
import runpy
import subprocess
import sys

import pytest
from helpers.ledgers import wide_model
from helpers.toys import REPOSITORY, toy_requests, toy_tokenizer

from locft_easyedit.__main__ import main

FOLDER = REPOSITORY / "benchmarks"
# Imported by the others.
PARTS = {
    "shared", "random_inputs", "generalization_bench", "generalization_peers",
    "generalization_picture", "generalization_report", "gpu_kernels",
    "tiny_models", "study",
}  # fmt: skip
SCRIPTS = sorted(path for path in FOLDER.glob("**/*.py") if path.stem not in PARTS)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as a command would, in this process; returns what it prints."""

    def with_arguments(script, *arguments, statuses=(None, 0)):
        monkeypatch.syspath_prepend(FOLDER)
        monkeypatch.syspath_prepend(script.parent)  # as Python does for a command
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        status = None
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        assert status in statuses, status
        return capsys.readouterr().out

    return with_arguments


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(run, script):
    printed = " ".join(run(script, "--help").split())
    first_line = script.read_text(encoding="utf-8").split("\n")[0].strip('"')
    assert first_line in printed


def figures_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["figures"]


TOY = ("--model", "toy", "--data", "edits.json")


def test_a_step_of_the_published_algorithm_and_of_ours(run, toy_folder):
    printed = run(
        FOLDER / "step.py", *TOY, "--layer", 1, "--n", 6, "--repeats", 1, "--dtype", "float32",
        "--json", "found.json",
    )  # fmt: skip
    rows = {row["variant"]: row for row in figures_of(toy_folder / "found.json")}
    assert len(rows) == 8
    published = rows.pop("published algorithm")
    assert all(name in printed for name in rows)
    for row in rows.values():
        assert row["loss"] == pytest.approx(published["loss"], abs=1e-5)


def test_an_evaluation_beside_easyedit_has_equal_figures(run, toy_folder, easyedit):
    run(FOLDER / "evaluation.py", *TOY, "--layer", 1, "--n", 5, "--json", "found.json")
    [row] = figures_of(toy_folder / "found.json")  # the script compares the figures
    assert row["records"] == 5
    assert row["ratio"] == pytest.approx(row["easyedit"] / row["ours"])


def test_answers_in_rows_that_are_filled_again(run, toy_folder):
    run(
        FOLDER / "answers.py", *TOY, "--n", 6, "--repeats", 1, "--json", "found.json",
    )  # fmt: skip
    whole, refilled = figures_of(toy_folder / "found.json")
    assert whole["times faster"] == 1.0
    assert refilled["passes"] != whole["passes"]
    assert json.loads((toy_folder / "found.json").read_text(encoding="utf-8"))["same"] > 0.5


def test_edits_beside_easyedits_ft(run, toy_folder, easyedit):
    run(
        FOLDER / "easyedit_ft.py", *TOY, "--hparams", "toy.yaml", "--n", 2, "--same-place",
        "--ft", "num_steps=2", "--json", "found.json",
    )  # fmt: skip
    rows = figures_of(toy_folder / "found.json")
    assert [row["method"] for row in rows] == ["EasyEdit's FT", "LocFT-BF"]
    assert all(row["seconds_per_edit"] > 0 for row in rows)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone counts such peaks")
@pytest.mark.slow
def test_growth_with_the_edits(run, tmp_path):
    run(
        FOLDER / "growth.py", "--edits", 20, 40, "--places", 0, "--layer-counts", 2, "--hidden", 64,
        "--inner", 64, "--words", 200, "--sweep-edits", 20, "--sweep-layers", 2, "--json",
        tmp_path / "found.json",
    )  # fmt: skip
    found = figures_of(tmp_path / "found.json")
    assert [row["edits"] for row in found["edits"]] == [20, 40]
    assert found["edits"][1]["state_bytes"] > found["edits"][0]["state_bytes"] > 0
    assert [row["layer"] for row in (*found["places"], *found["layers"])] == [0, 1]


@pytest.mark.slow
def test_the_choice_of_a_place_beside_a_study(run, toy_folder):
    (toy_folder / "edits.json").write_text(json.dumps(toy_requests(9)))
    command = ["locate", "--config-name", "toy.yaml", "data=edits.json", "output=out"]
    assert main([*command, "sweep_layers=[1,3]", "sweep_modules=[down]", "sweep_lrs=[1e-2]"]) == 0
    # The status says whether the choice is cheap, which it is not beside a toy's training.
    run(FOLDER / "checks/auto.py", "out", "--output", "found.json", statuses=(0, 1))
    found = json.loads((toy_folder / "found.json").read_text(encoding="utf-8"))
    assert found["best by score"] in {path.stem for path in (toy_folder / "out/cells").iterdir()}
    assert found["seconds"] > 0


def test_through_which_tokens_an_edit_leaks(run, toy_folder):
    (toy_folder / "mine.txt").write_text("the capital of Belgium is Paris . Who is it ?\n" * 40)
    with open("toy.yaml", "a", encoding="utf-8") as file:
        file.write("preserve: [mine.txt]\n")
    printed = run(
        FOLDER / "checks/leaks.py", "--hparams", "toy.yaml", "--data", "edits.json", "--n", 6
    )
    lines = [line.split() for line in printed.strip().split("\n")[1:]]
    assert [line[1] for line in lines] == ["LocFT-BF", "LocFT-BF+"]
    assert all(float(kl) >= 0 for line in lines for kl in line[2:])


@pytest.mark.parametrize("more", [[], ["--alg-name", "LocFT-BF+", "--no-naive"]])
def test_facts_in_commits(run, toy_folder, more):
    wide_model().save_pretrained("wide")
    toy_tokenizer(pad_is_eos=True).save_pretrained("wide")
    run(
        FOLDER / "ledger.py", "--model", "wide", "--data", "edits.json", "--layer", 2, "--n", 4,
        "--commits", 2, "--take-out", 1, "--supersede", 1, "--lr", 1e-2, "--epochs", 15,
        "--batch-size", 4, "--dtype", "float32", "--device", "cpu", "--json", "found.json",
        "--picture", "found.png", *more,
    )  # fmt: skip
    found = figures_of(toy_folder / "found.json")
    assert ("naive" in found) == (not more)
    once = found["at once"]
    assert once["texts"] == once["epochs"] * 4 * (2 if more else 1)  # one other form an epoch
    assert [one["facts"] for one in found["commits"]] == [2, 2]
    assert found["commits"][-1]["by commit"] == [1.0, 1.0]
    assert found["taken out"]["facts"] == 1
    assert (toy_folder / "found.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_ledger_whose_commands_are_killed(run, tmp_path):
    run(
        FOLDER / "checks/ledger_kills.py", "--kills", 3, "--n", 4, "--commits", 2, "--epochs", 3,
        "--json", tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert (found["kills"], found["wrong"]) == (3, [])


def test_damaged_input_ends_in_a_result_or_a_typed_error(tmp_path):
    # In a process of its own: it watches what its process opens, until that ends.
    command = [sys.executable, str(FOLDER / "checks/fuzz.py"), "--n", "20", "--json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert all(counts["inputs"] == 20 for counts in found.values())
