"""Runs one of EasyEdit's own scripts, unmodified, with LocFT-BF registered."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import LocFTError
from ..hparams import LocFTBFHyperParams
from ..modeling.loading import resolve_device
from ..utils.parsing import text_of
from .cuda_as_cpu import CudaAsCPU
from .method_name import METHOD, refusal, script_method
from .registration import editor_class, reading_with, register
from .standins import standing_in

# A device that a script names by itself, whatever the YAML says.
_NAMES_CUDA = re.compile(r"""\.cuda\(|["']cuda(:\d+)?["']""")


def run_script(script: str | Path, arguments: Sequence[str]) -> None:
    """Runs `script` as `python script arguments...` would.

    EasyEdit is taken from `EASYEDIT_HOME`, else from the clone that holds the script, else from
    the installed packages. Its import has its usual effects (it seeds with 42), so that a script's
    figures are those that it would print by itself.

    `--editing_method=LocFT-BF` (or `LocFT-BF+`) works in every script that knows `FT`: the script
    goes the way of FT, and the names of its results are LocFT-BF's. The same holds where
    `--editing_method` names another method and `--hparams_dir` is a YAML of ours.

    Args:
        script: Path of a Python file.
        arguments: Its command line.

    Raises:
        LocFTError: The script does not exist, or cannot run LocFT-BF.
        EasyEditNotFoundError: There is no EasyEdit.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise LocFTError(f"`{script}` is not a file. Give the path of one of EasyEdit's scripts.")
    source = text_of(path, LocFTError)
    method = script_method(path, source, arguments)
    home = None if os.environ.get("EASYEDIT_HOME") else _clone_of(path)
    register(home, shield=False)
    with ExitStack() as during:
        during.enter_context(_without_locality_outputs())
        during.enter_context(_command_line([str(script), *method.arguments], path.parent))
        if method.alg_name is not None:
            during.enter_context(reading_with(lambda h: _for_script(h, str(method.alg_name))))
            if _NAMES_CUDA.search(source) and not torch.cuda.is_available():
                during.enter_context(CudaAsCPU())
        during.enter_context(standing_in())
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Exception as error:
            said = refusal(error, path, source)
            if method.alg_name is None or said is None:
                raise
            raise LocFTError(
                f"{path.name} does not take `{METHOD}={method.alg_name}` with these arguments. "
                f"It says: {said}."
            ) from error


def _for_script(hparams: LocFTBFHyperParams, alg_name: str) -> None:
    """Makes the hyper-parameters those of the method that the script is to run."""
    hparams.alg_name = alg_name
    # A text: scripts write "cuda:N" into a number's place and put "cuda:" before it again.
    device = resolve_device(hparams.device)
    hparams.device = "cpu" if device.type == "cpu" else str(device.index or 0)


@contextmanager
def _without_locality_outputs() -> Iterator[None]:
    """Context manager in which editors leave the token lists of `locality` out after the edit.

    run_knowedit_llama2.py averages every entry of `locality`, and fails on the token lists that
    the current EasyEdit leaves there. No script reads them after the edit.
    """
    editor: Any = editor_class()
    keeps = editor.keeps_locality_outputs
    editor.keeps_locality_outputs = False
    try:
        yield
    finally:
        editor.keeps_locality_outputs = keeps


@contextmanager
def _command_line(arguments: list[str], folder: Path) -> Iterator[None]:
    """Context manager with this command line, and with modules looked for in `folder` first."""
    argv, search = sys.argv, list(sys.path)
    sys.argv = arguments
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, search


def _clone_of(script: Path) -> Path | None:
    """Returns the nearest folder above the script that holds `easyeditor/`."""
    for folder in script.parents:
        if (folder / "easyeditor" / "__init__.py").is_file():
            return folder
    return None
