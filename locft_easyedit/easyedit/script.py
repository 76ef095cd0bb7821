"""Runs one of EasyEdit's own scripts, unmodified, with LocFT-BF registered."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import LocFTError
from .registration import editor_class, register
from .standins import standing_in


def run_script(script: str | Path, arguments: Sequence[str]) -> None:
    """Runs `script` as `python script arguments...` would.

    EasyEdit is taken from `EASYEDIT_HOME`, else from the clone that holds the script, else from
    the installed packages. Its import has its usual effects (it seeds with 42), so that a script's
    figures are those that it would print by itself.

    Args:
        script: Path of a Python file.
        arguments: Its command line.

    Raises:
        LocFTError: The script does not exist.
        EasyEditNotFoundError: There is no EasyEdit.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise LocFTError(f"`{script}` is not a file. Give the path of one of EasyEdit's scripts.")
    home = None if os.environ.get("EASYEDIT_HOME") else _clone_of(path)
    register(home, shield=False)
    # run_knowedit_llama2.py averages every entry of `locality`, and fails on the token lists that
    # the current EasyEdit leaves there. No script reads them after the edit.
    editor: Any = editor_class()
    keeps = editor.keeps_locality_outputs
    editor.keeps_locality_outputs = False
    argv, search = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(path.parent))
    try:
        with standing_in(("sentence_transformers",)):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, search
        editor.keeps_locality_outputs = keeps


def _clone_of(script: Path) -> Path | None:
    """Returns the nearest folder above the script that holds `easyeditor/`."""
    for folder in script.parents:
        if (folder / "easyeditor" / "__init__.py").is_file():
            return folder
    return None
