"""Finds EasyEdit and imports it, without what its import does to the rest of the program."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import EasyEditNotFoundError, LocFTError, MissingDependencyError
from .standins import standing_in

logger = logging.getLogger(__name__)

# What EasyEdit cannot do without: import name -> what to install. See `standins` for the rest.
REQUIREMENTS = {
    "higher": "higher",
    "hydra": "hydra-core",
    "nltk": "nltk",
    "omegaconf": "omegaconf",
    "peft": "peft",
}
HOW_TO_GET_IT = (
    "Either `pip install --no-deps easyeditor` (the release on PyPI; its pins are of 2023), or "
    "clone https://github.com/zjunlp/EasyEdit and set EASYEDIT_HOME to the clone."
)

_loading = False  # while the import statements of others are not ours to answer

# The current source sets it to "1" at import, which makes every CUDA kernel wait for the last.
_LAUNCH_BLOCKING = "CUDA_LAUNCH_BLOCKING"


@dataclass(frozen=True)
class EasyEdit:
    """What this library uses of an EasyEdit, under EasyEdit's own names.

    Attributes:
        home: The folder that holds `easyeditor/`.
        is_release: Whether it is the PyPI release of 2023 and not the current source.
        ALG_DICT: From `alg_name` to the function that edits; may be added to.
        BatchEditor: The enumeration of methods that edit in batches.
        BaseEditor: The editor class.
        ConceptEditor: The editor of concepts, a class of its own; `None` in the release.
        HyperParams: The base of all hyper-parameter classes.
        compute_edit_quality: Scores one request.
        test_generation_quality: Scores the fluency of generated text.
    """

    home: Path
    is_release: bool
    ALG_DICT: dict[str, Callable[..., Any]]
    BatchEditor: Any
    BaseEditor: Any
    ConceptEditor: Any
    HyperParams: type
    compute_edit_quality: Callable[..., dict[str, Any]]
    test_generation_quality: Callable[..., dict[str, Any]]


def load_easyedit(home: str | os.PathLike[str] | None = None, *, shield: bool = True) -> EasyEdit:
    """Returns EasyEdit, imported if it was not yet.

    Looked for in this order: an `easyeditor` that is already imported, `home`, the environment
    variable `EASYEDIT_HOME`, an installed `easyeditor`.

    Args:
        home: Folder that holds `easyeditor/`, such as a clone of EasyEdit.
        shield: Undo what the import does to random states, the root logger and
            `CUDA_LAUNCH_BLOCKING`. Otherwise all of that is as after EasyEdit's own import.

    Raises:
        EasyEditNotFoundError: It is nowhere, or not in the home given.
        LocFTError: It is already imported, and not from the home given.
        MissingDependencyError: Packages that EasyEdit needs are not installed.
    """
    init = _wanted_init(home)
    package = sys.modules.get("easyeditor")
    if package is None:
        spec = _spec(init)
        _check_requirements()
        with importing(shield=shield):
            package = _import(spec)
    found = Path(str(package.__file__)).resolve()
    if init is not None and found != init:
        raise LocFTError(
            f"easyeditor is already imported from {found.parent.parent}, not from the home asked "
            f"for, {init.parent.parent}. Start a new process, or do not give a home."
        )
    easyedit = _handles(found.parent.parent)
    if easyedit.is_release and init is None:
        _say_which(easyedit.home)
    return easyedit


def spec_for_statement() -> ModuleSpec | None:
    """Returns the spec for an `import easyeditor` in somebody's program.

    Returns:
        That of what `load_easyedit` would import; `None` if there is none, or while it does.

    Raises:
        EasyEditNotFoundError: `EASYEDIT_HOME` leads nowhere.
    """
    if _loading:
        return None
    init = _wanted_init(None)
    try:
        return _spec(init)
    except EasyEditNotFoundError:
        return None


@contextmanager
def importing(*, shield: bool) -> Iterator[None]:
    """Context manager in which EasyEdit can be imported without the packages that it need not have.

    Args:
        shield: As for `load_easyedit`.
    """
    global _loading
    former, _loading = _loading, True
    try:
        with (
            imports_shielded() if shield else nullcontext(),
            standing_in(importers=("easyeditor",), lenient=True),
        ):
            yield
    finally:
        _loading = former


@functools.cache  # once is enough
def _say_which(home: Path) -> None:
    """Warns where the release is used and a clone is at hand.

    EasyEdit's scripts append `..` to `sys.path`, where what is installed wins.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    folders = [*sys.path, "..", *map(str, Path(main).resolve().parents if main else ())]
    for folder in folders:
        clone = Path(folder).resolve()
        if clone != home and (clone / "easyeditor" / "__init__.py").is_file():
            logger.warning(
                "easyeditor is the release of 2023, installed in %s, and not the clone in %s: "
                "`sys.path.append` puts a folder behind the installed packages. Set "
                "EASYEDIT_HOME=%s, or uninstall the release (pip uninstall easyeditor).",
                home,
                clone,
                clone,
            )
            return


def _wanted_init(home: str | os.PathLike[str] | None) -> Path | None:
    """Returns the `easyeditor/__init__.py` that was asked for, or None for any."""
    source = "home" if home is not None else "EASYEDIT_HOME"
    value = home if home is not None else os.environ.get("EASYEDIT_HOME")
    # An empty variable is the usual way to say that it is not set.
    if value is None or (home is None and not value):
        return None
    init = Path(value).expanduser().resolve() / "easyeditor" / "__init__.py"
    if not init.is_file():
        raise EasyEditNotFoundError(
            f"{source}={os.fspath(value)!r} holds no easyeditor/__init__.py. It must be the folder "
            "that holds the folder easyeditor, such as a clone of "
            "https://github.com/zjunlp/EasyEdit."
        )
    return init


def _spec(init: Path | None) -> ModuleSpec:
    # Not by way of `sys.path`: a clone holds other modules at its top, such as `edit`.
    spec = _installed() if init is None else spec_from_file_location("easyeditor", init)
    # A folder that happens to be called easyeditor makes a namespace package: no origin.
    if spec is None or spec.origin is None:
        raise EasyEditNotFoundError(f"EasyEdit is not installed. {HOW_TO_GET_IT}")
    return spec


def _installed() -> ModuleSpec | None:
    """Returns the spec of what an import statement finds by itself."""
    global _loading
    former, _loading = _loading, True
    try:
        return importlib.util.find_spec("easyeditor")
    finally:
        _loading = former


def _check_requirements() -> None:
    missing = {
        name: package
        for name, package in REQUIREMENTS.items()
        if sys.modules.get(name) is None and importlib.util.find_spec(name) is None
    }
    if missing:
        raise _missing(missing)


def _missing(missing: dict[str, str]) -> MissingDependencyError:
    names = ", ".join(repr(name) for name in missing)
    return MissingDependencyError(
        f"easyeditor needs {names}, not installed. Install: pip install "
        f"{' '.join(missing.values())}"
    )


def _import(spec: ModuleSpec) -> ModuleType:
    """Imports EasyEdit; leaves nothing of it behind where that fails."""
    assert spec.loader is not None  # a spec with an origin has one
    # Parts left by a failed import may be of another EasyEdit.
    _forget()
    package = importlib.util.module_from_spec(spec)
    sys.modules["easyeditor"] = package
    try:
        spec.loader.exec_module(package)
    except BaseException as error:
        _forget()
        root = str(getattr(error, "name", None)).partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and root != "easyeditor":
            raise _missing({root: root}) from error
        raise
    return package


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "easyeditor"]:
        del sys.modules[name]


def _handles(home: Path) -> EasyEdit:
    # `import easyeditor.util.alg_dict as A` fails: star imports rebind `easyeditor.util`.
    from easyeditor.editors.batch_editor import BatchEditor
    from easyeditor.editors.editor import BaseEditor
    from easyeditor.evaluate.evaluate import compute_edit_quality
    from easyeditor.evaluate.evaluate_utils import test_generation_quality
    from easyeditor.util.alg_dict import ALG_DICT
    from easyeditor.util.hparams import HyperParams

    try:
        from easyeditor.editors.concept_editor import ConceptEditor
        from easyeditor.editors.utils import summary_metrics
    except ImportError:
        ConceptEditor = summary_metrics = None
    return EasyEdit(
        home=home,
        is_release=summary_metrics is None,
        ALG_DICT=ALG_DICT,
        BatchEditor=BatchEditor,
        BaseEditor=BaseEditor,
        ConceptEditor=ConceptEditor,
        HyperParams=HyperParams,
        compute_edit_quality=compute_edit_quality,
        test_generation_quality=test_generation_quality,
    )


@contextmanager
def imports_shielded() -> Iterator[None]:
    """Puts back random states, root logger and `CUDA_LAUNCH_BLOCKING` as they were before.

    The random states are those of Python, NumPy and torch, on the CPU and on CUDA, also where
    CUDA is not initialised yet.
    """
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # Before CUDA is initialised, `torch.manual_seed` leaves a seed to be set when it is.
    cuda_seeds = getattr(torch.cuda, "_lazy_seed_tracker", None)
    queued = dict(vars(cuda_seeds)) if cuda_seeds is not None else {}
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    blocking = os.environ.get(_LAUNCH_BLOCKING)
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if cuda_seeds is not None:
            vars(cuda_seeds).update(queued)
        root.handlers[:] = handlers
        root.setLevel(level)
        if blocking is None:
            os.environ.pop(_LAUNCH_BLOCKING, None)
        else:
            os.environ[_LAUNCH_BLOCKING] = blocking
