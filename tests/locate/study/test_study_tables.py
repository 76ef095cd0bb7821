"""The tables and files of a location study, read back as a user would."""

import csv
import dataclasses
import json
import math
import subprocess
import sys

import pytest
import yaml
from helpers.toys import toy_hparams, toy_model, toy_tokenizer
from rich.console import Console
from test_study_outcome import DOWN, cell, study

from locft_easyedit.errors import OutputError, PlaceError
from locft_easyedit.hparams import LocFTBFHyperParams
from locft_easyedit.locate.study.study_files import CSV_COLUMNS, write_cells_csv, write_chosen_yaml
from locft_easyedit.locate.study.study_outcome import (
    DIVERGED,
    FAILED,
    FIGURES,
    OUT_OF_MEMORY,
    CellOutcome,
    StudyOutcome,
)
from locft_easyedit.locate.study.study_tables import (
    best_of_modules,
    best_places,
    figure_text,
    study_markdown,
    study_table,
)
from locft_easyedit.modeling.locations import MODULES, Location
from locft_easyedit.training.choice import Cell
from locft_easyedit.utils.json_fields import write_dataclass


def marked(layer, state, reason="", module="down", lr=1e-3):
    return CellOutcome(Cell(Location(layer, module, (DOWN,)), lr), state, reason)


def whole():
    """Two modules of twelve layers at two rates, and some cells without figures."""
    cells = [
        cell(layer, module, lr, score=score, generalization=score / 2, locality=0.9)
        for layer in range(12)
        for module, more in (("down", 0.0), ("up", 0.01))
        for lr, score in ((1e-3, 0.02 * layer + more), (2e-3, 0.04 * layer + more))
    ]
    cells += [marked(12, DIVERGED, "NaN [bold]x|y", lr=lr) for lr in (1e-3, 2e-3)]
    cells += [marked(12, OUT_OF_MEMORY, "3 GiB asked for", "up"), marked(13, FAILED, "ValueError")]
    return study(*cells, before={"reliability": 0.03, "generalization": 0.02}, n_cells=60)


def shown(table, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def rows_of(markdown):
    """The tables of a Markdown text: a list of rows each."""
    tables, now = [], []
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("|"):
            now.append([part.strip() for part in line.strip("|").split("|")])
        elif now:
            tables.append(now)
            now = []
    return tables


def test_the_table_fits_a_terminal_and_ranks_the_places():
    text = shown(study_table(whole()))
    lines = [line.rstrip() for line in text.split("\n")]
    assert max(map(len, lines)) <= 80
    assert "chosen: layer 11 up, lr 0.002" in text
    assert "52 of 60 cells, 2 diverged, 1 out of memory, 1 failed" in text
    ranked = [line.split() for line in lines if " up " in line or " down " in line]
    ranked = [row for row in ranked if row[0] != "diverged:"]
    # Ten places, then the best of each module; the chosen one has its mark in both.
    top = ranked[:10]
    assert [row[:3] for row in top[:3]] == [[">", "11", "up"], ["11", "down", "0.002"],
                                            ["10", "up", "0.002"]]  # fmt: skip
    assert sum(line.lstrip().startswith(">") for line in lines) == 2
    scores = [float(row[row.index("0.002") + 1]) for row in top]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 0.45
    before = next(line for line in lines if "before" in line)
    assert before.split() == ["before", "-", "0.030", "-", "-", "0.020", "-"]


def test_marked_cells_are_counted_with_their_reasons_and_are_no_markup():
    text = shown(study_table(whole()), width=120)
    assert "diverged: layer 12 down, lr 0.001 and 1 more: NaN [bold]x|y." in text
    assert "out of memory: layer 12 up, lr 0.001: 3 GiB asked for." in text
    assert "failed: layer 13 down, lr 0.001: ValueError." in text


def test_many_reasons_are_counted_and_not_listed():
    cells = [marked(i, FAILED, f"reason {i}") for i in range(9)]
    cells += [marked(i, FAILED, "the common one", "up") for i in (7, 8)]
    text = shown(study_table(study(*cells)))
    assert "failed: layer 7 up, lr 0.001 and 1 more: the common one." in text
    assert "reason 1." in text
    assert "reason 2." not in text
    assert "failed: 7 more, for 7 other reasons." in text


def test_a_study_without_figures_says_so():
    for found in (study(n_cells=4), study(marked(0, DIVERGED))):
        for text in (shown(study_table(found)), study_markdown(found)):
            assert "no cell has figures" in text
            assert "score" not in text
    assert "0 of 4 cells" in study_markdown(study(n_cells=4))


def test_markdown_holds_the_modules_the_best_places_and_the_marked_cells():
    text = study_markdown(whole())
    modules, places = rows_of(text)
    assert modules[0][:3] == ["layer", "module", "lr"]
    assert modules[0][3:] == ["score ↑", "reliability ↑", "reworded ↑", "drift ↓",
                              "generalization ↑", "locality ↑"]  # fmt: skip
    assert [row[:3] for row in modules[2:]] == [
        ["**11**", "**up**", "**0.002**"],
        ["11", "down", "0.002"],
    ]
    assert places[2][:3] == ["", "before editing", ""]
    assert len(places) == 2 + 1 + 10
    assert places[3][:2] == ["**11**", "**up**"]
    assert places[4][:2] == ["11", "down"]
    assert {len(row) for row in [*modules, *places]} == {9}
    assert "The best 10 of 24 places" in text
    assert "- diverged: layer 12 down, lr 0.001 and 1 more: NaN \\[bold\\]x\\|y." in text


def test_names_cannot_break_the_markdown():
    text = study_markdown(dataclasses.replace(whole(), model="a|b\n# c", data="*d*"))
    assert text.split("\n")[0].startswith("**Where to edit a\\|b \\# c on \\*d\\*,")


def test_places_are_ranked_by_score_then_drift_then_place():
    a, b = cell(5, score=0.5, drift=0.2), cell(4, score=0.5, drift=0.1)
    c, d = cell(3, "up", score=0.7), cell(3, "q", score=0.7)
    found = study(a, b, c, d)
    assert best_places(found) == [d, c, b, a]
    assert best_of_modules(found) == [d, c, b]
    assert best_places(found)[0] == found.chosen()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("score", 0.12345, "0.123"), ("drift", 0.00012345, "0.000123"), ("drift", None, "-"),
     ("score", math.nan, "NaN"), ("drift", math.inf, "inf")],
)  # fmt: skip
def test_a_figure_as_text(key, value, text):
    assert figure_text(key, value) == text


def test_the_csv_has_a_row_a_cell_and_always_the_same_columns(tmp_path):
    several = CellOutcome(
        Cell(Location(0, "q", ("a.{}", "b.{}")), 3e-4), figures={"drift": math.nan},
        epochs=7, converged=True, seconds={"training": 1.5}, parameters=64,
    )  # fmt: skip
    found = study(marked(1, FAILED, 'bad, "very"\nbad'), cell(0, "up", lr=1e-3), several)
    write_cells_csv(tmp_path / "cells.csv", found)
    with (tmp_path / "cells.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == CSV_COLUMNS
    assert set(FIGURES) < set(header)
    first, second, third = (dict(zip(header, row, strict=True)) for row in rows)
    assert (first["module"], first["lr"], first["drift"]) == ("q", "0.0003", "nan")
    assert (first["epochs"], first["converged"], first["parameters"]) == ("7", "true", "64")
    assert (first["training_seconds"], first["metrics_seconds"]) == ("1.5", "")
    assert first["rewrite_module_tmp"] == "a.{} b.{}"
    assert (second["module"], second["reliability"], second["locality"]) == ("up", "0.9", "")
    assert (third["state"], third["reason"], third["score"]) == (FAILED, 'bad, "very" bad', "")


def test_the_json_holds_every_field(tmp_path):
    found = dataclasses.replace(whole(), planned=tuple(one.cell for one in whole().cells))
    write_dataclass(tmp_path / "study.json", found)
    values = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert [CellOutcome.from_dict(one) for one in values.pop("cells")] == found.cells
    assert [Cell.from_dict(one) for one in values.pop("planned")] == list(found.planned)
    assert dataclasses.replace(found, cells=[], planned=()) == StudyOutcome(**values, cells=[])


def test_figures_that_are_no_numbers_show_in_the_json(tmp_path):
    write_dataclass(tmp_path / "study.json", study(cell(capability=math.nan, locality=math.inf)))
    values = json.loads((tmp_path / "study.json").read_text())
    [figures] = [one["figures"] for one in values["cells"]]
    assert figures["capability"] == {"not finite": "nan"}
    assert figures["locality"] == {"not finite": "inf"}


def test_files_that_cannot_be_written_are_output_errors(tmp_path):
    nowhere = tmp_path / "nowhere" / "file"
    for write in (write_dataclass, write_cells_csv):
        with pytest.raises(OutputError, match="cannot be written"):
            write(nowhere, whole())
    with pytest.raises(OutputError, match="cannot be written"):
        write_chosen_yaml(nowhere, whole(), toy_hparams(model_name="toy"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": "cpu", "dtype": "bfloat16", "tuning": "lora", "lora_alpha": 4.0},
        {"checkpoint_minutes": None, "seed": 0, "append_eos": False, "epoch_loss_threshold": 0.0},
        {"model_name": "names: with # signs", "prefix_dir": "'quoted' \"both\" — ü"},
        {"batch_loss_threshold": 1e-5, "weight_decay": 1e-10, "device": 0},
    ],
)
def test_the_yaml_of_the_choice_holds_the_same_values(tmp_path, changes):
    hparams = toy_hparams(**{"model_name": "./toy"} | changes)
    before = dataclasses.asdict(hparams)
    returned = write_chosen_yaml(tmp_path / "chosen.yaml", whole(), hparams)
    back = LocFTBFHyperParams.from_hparams(tmp_path / "chosen.yaml")
    expected = {**before, "layers": [11], "lr": 2e-3}
    expected["rewrite_module_tmp"] = "model.layers.{}.mlp.down_proj.weight"
    assert dataclasses.asdict(back) == dataclasses.asdict(returned) == expected
    assert dataclasses.asdict(hparams) == before


def test_the_yaml_holds_no_defaults_and_no_secret(tmp_path):
    hparams = toy_hparams(model_name="./toy", api_key="secret", seed=42, batch_size=7)
    write_chosen_yaml(tmp_path / "chosen.yaml", whole(), hparams)
    text = (tmp_path / "chosen.yaml").read_text()
    assert list(yaml.safe_load(text)) == [
        "alg_name", "model_name", "layers", "rewrite_module_tmp", "lr", "num_steps", "batch_size",
    ]  # fmt: skip
    assert "secret" not in text
    assert "layers: [11]" in text


def test_the_yaml_says_where_it_comes_from(tmp_path):
    found = dataclasses.replace(whole(), model="a\nlayers: [0]", data="b\x85seed: 1")
    write_chosen_yaml(tmp_path / "chosen.yaml", found, toy_hparams(model_name="toy"))
    text = (tmp_path / "chosen.yaml").read_text()
    comment = [line for line in text.split("\n") if line.startswith("#")]
    assert "a layers: [0] on b seed: 1, 20 edits" in comment[0]
    assert "52 of 60 cells" in comment[1]
    assert "reliability 0.900, reworded 0.800, drift 0.1, score 0.450" in comment[2]
    assert str(tmp_path) not in text
    assert LocFTBFHyperParams.from_hparams(tmp_path / "chosen.yaml").layers == [11]


def test_several_templates_and_a_loaded_model(tmp_path):
    place = Location(3, "mlp", ("model.layers.{}.mlp.a", "model.layers.{}.mlp.b"))
    found = study(dataclasses.replace(cell(), cell=Cell(place, 1e-5)))
    hparams = toy_hparams(model_name=(toy_model(), toy_tokenizer()))
    write_chosen_yaml(tmp_path / "chosen.yaml", found, hparams)
    back = LocFTBFHyperParams.from_hparams(tmp_path / "chosen.yaml")
    assert back.rewrite_module_tmp == list(place.templates)
    assert (back.model_name, back.lr) == ("toy", 1e-5)


def test_no_yaml_without_a_choice(tmp_path):
    with pytest.raises(PlaceError, match="None of the 1 cells that are done has figures"):
        write_chosen_yaml(tmp_path / "c.yaml", study(marked(0, DIVERGED)), toy_hparams())
    assert list(tmp_path.iterdir()) == []


def test_a_cell_of_every_module_is_ranked_in_order():
    cells = [cell(0, module) for module in reversed(MODULES)]
    assert [one.cell.location.module for one in best_of_modules(study(*cells))] == list(MODULES)


def test_tables_and_files_need_no_matplotlib():
    code = "import sys, locft_easyedit.locate.study.study_files; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
