"""LocFT-BF is registered by the import of EasyEdit, and a hidden clone is told; in processes."""

import os
import subprocess
import sys

import pytest
from helpers.toys import REPOSITORY

CODE = """
import logging, random, sys
logging.basicConfig(format="%(message)s")
state = random.getstate()
{first}
assert "torch" not in sys.modules or "easyeditor" in sys.modules
sys.path.append("..")
{second}
from easyeditor import BaseEditor, HyperParams, LocFTBFHyperParams
assert issubclass(LocFTBFHyperParams, HyperParams)
from locft_easyedit import LocFTBFEditor
assert issubclass(LocFTBFEditor, BaseEditor)
if "{first}".startswith("import locft"):
    assert random.getstate() == state  # EasyEdit seeds when it is imported
import importlib.util
assert importlib.util.find_spec("easyeditor").origin == sys.modules["easyeditor"].__file__
"""


def run(folder, first, second, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "EASYEDIT_HOME"}
    return subprocess.run(
        [sys.executable, "-c", CODE.format(first=first, second=second)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def in_a_clone(tmp_path):
    """The folder of a clone's examples; its `easyeditor` is never imported."""
    (tmp_path / "easyeditor").mkdir()
    (tmp_path / "easyeditor" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "examples").mkdir()
    return tmp_path / "examples"


def test_an_import_of_both_is_enough_and_the_hidden_clone_is_told(in_a_clone):
    done = run(in_a_clone, "import locft_easyedit", "import easyeditor")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"and not the clone in {in_a_clone.parent}" in done.stderr
    assert f"Set EASYEDIT_HOME={in_a_clone.parent}" in done.stderr


@pytest.mark.skipif(not os.environ.get("EASYEDIT_HOME"), reason="needs EASYEDIT_HOME")
def test_easyedit_home_leads_import_statements_too(in_a_clone):
    home = os.environ["EASYEDIT_HOME"]
    done = run(
        in_a_clone,
        "import locft_easyedit",
        f"import easyeditor; assert easyeditor.__file__.startswith({home!r})",
        EASYEDIT_HOME=home,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "and not the clone" not in done.stderr
