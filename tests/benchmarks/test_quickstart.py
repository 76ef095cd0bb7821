"""The notebook for a first look: its cells run, and outputs of a run are stored below them."""

import json

import pytest
from helpers.toys import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def source_of(cell):
    return "".join(cell["source"])


def test_outputs_are_short_texts(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert all(output["output_type"] == "stream" for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 20_000


@pytest.mark.slow
def test_the_cells_run(cells, smollm2, tmp_path, monkeypatch, capsys):
    (tmp_path / "models").symlink_to(smollm2.parent)
    monkeypatch.chdir(tmp_path)
    names, printed = {}, {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile(source_of(cell), f"{NOTEBOOK.name}, cell {i}", "exec"), names)
            printed[i] = capsys.readouterr().out
    assert names["n_edited"] == len(names["targets"]) == 20
    assert names["undone"] == names["before"]
    assert names["again"] == names["after"]
    # Not the same texts: losses, and where two tokens are nearly as likely answers as well, depend
    # on the machine's arithmetic.
    for i, text in printed.items():
        [stored] = cells[i]["outputs"]
        assert text.count("\n") == len(stored["text"])
