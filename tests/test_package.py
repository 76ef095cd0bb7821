"""The package as a whole: a light import, and EasyEdit in one place."""

import ast
import subprocess
import sys

import pytest
from helpers.toys import REPOSITORY

import locft_easyedit

PACKAGE = REPOSITORY / "locft_easyedit"
MODULES = sorted(path.relative_to(REPOSITORY).as_posix() for path in PACKAGE.rglob("*.py"))


def run(code, folder):
    """Runs `code` in a new interpreter, in an empty folder."""
    search = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", search + code], cwd=folder, capture_output=True, text=True
    )


# Import


@pytest.mark.parametrize("use", ["", "dir(locft_easyedit)", "locft_easyedit.LocFTError"])
def test_import_is_light_and_without_effects(tmp_path, use):
    code = f"""
import logging, random
state = random.getstate()
import locft_easyedit
{use}
heavy = {{"torch", "transformers", "easyeditor", "numpy", "yaml", "omegaconf"}} & set(sys.modules)
assert not heavy, heavy
assert not logging.getLogger().handlers
assert random.getstate() == state
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""
    assert not list(tmp_path.iterdir())


def test_all_modules_and_names_are_there_without_easyedit(tmp_path):
    modules = [path.removesuffix(".py").replace("/", ".") for path in MODULES]
    code = f"""
import importlib, logging
import locft_easyedit
for name in {modules}:
    importlib.import_module(name.removesuffix(".__init__"))
for name in locft_easyedit.__all__:
    getattr(locft_easyedit, name)
assert "easyeditor" not in sys.modules
assert not logging.getLogger().handlers
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_public_names():
    assert dir(locft_easyedit) == sorted(locft_easyedit.__all__)
    assert locft_easyedit.make_requests("p", "t")[0]["target_new"] == "t"
    assert issubclass(locft_easyedit.LocFTError, ValueError)
    with pytest.raises(AttributeError, match="'locft_easyedit' has no attribute 'nothing'"):
        locft_easyedit.nothing  # noqa: B018


# Source


def imported(tree):
    """Yields what a module imports, also inside of functions and by `import_module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def imports_of(path, top):
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return [name for name in imported(tree) if name.split(".")[0] == top]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import easyeditor.util as u", ["easyeditor.util"]),
        ("def f():\n    from easyeditor import x", ["easyeditor"]),
        ("importlib.import_module('easyeditor')", ["easyeditor"]),
        ("from .easyeditor import x", []),
    ],
)
def test_imports_are_found(source, names):
    assert list(imported(ast.parse(source))) == names


def test_easyedit_is_imported_in_one_subpackage_only():
    importing = {path for path in MODULES if imports_of(path, "easyeditor")}
    assert importing
    assert all(path.startswith("locft_easyedit/easyedit/") for path in importing)
