"""Makes LocFT-BF one of EasyEdit's methods, and undoes it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from ..errors import HyperParamsError
from ..hparams import HyperParamsBase, LocFTBFHyperParams, read_mapping
from ..hparams_rules import ALG_NAMES
from ..hparams_spellings import known_alg_name
from .concept_editor import ConceptMethods
from .cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from .editor import LocFTBFMethods, apply_locft_bf_to_model
from .importing import EasyEdit, load_easyedit

# What `unregister` has to undo; empty while LocFT-BF is not registered.
_undo = ExitStack()
_editor_class: type | None = None
_adapt: ContextVar[Callable[[LocFTBFHyperParams], None] | None] = ContextVar("adapt", default=None)


def register(home: str | os.PathLike[str] | None = None, *, shield: bool = True) -> EasyEdit:
    """Adds LocFT-BF to EasyEdit; a second call changes nothing.

    Afterwards `ALG_DICT["LocFT-BF"]` exists, `BatchEditor.is_batchable_method("LocFT-BF")` is
    true, and both hold for `LocFT-BF+`. `BaseEditor(hparams)` and `BaseEditor.from_hparams` give a
    `LocFTBFEditor` for our hyper-parameters, which are instances of EasyEdit's `HyperParams`, and
    `from_hparams` of any of EasyEdit's hyper-parameter classes gives ours for a YAML that says
    `alg_name: LocFT-BF` or `LocFT-BF+`. `easyeditor` has both classes under their names. All other
    methods behave as before.

    Args:
        home: Folder that holds `easyeditor/`; else `EASYEDIT_HOME` or the installed one.
        shield: Keep the effects of EasyEdit's import (seeding, root logging) from the program.

    Returns:
        EasyEdit's classes and functions (`register().BaseEditor`, for example).

    Raises:
        EasyEditNotFoundError: There is no EasyEdit.
        MissingDependencyError: Packages that EasyEdit needs are not installed.
    """
    global _editor_class
    easyedit = load_easyedit(home, shield=shield)
    if _editor_class is not None:
        return easyedit
    with ExitStack() as done:  # if anything fails halfway, all of it is undone
        for name in ALG_NAMES:
            easyedit.ALG_DICT[name] = apply_locft_bf_to_model
            done.callback(easyedit.ALG_DICT.pop, name, None)
        editor_class = _editor_class_of(easyedit)
        _make_batchable(easyedit, done)
        if needs_cuda_as_cpu(easyedit):
            _run_on_cpu(easyedit.BaseEditor, done)  # its own editors: ours know the devices
        _dispatch_editor(easyedit.BaseEditor, editor_class, done)
        if easyedit.ConceptEditor is not None:
            concept = type("LocFTBFConceptEditor", (ConceptMethods, easyedit.ConceptEditor), {})
            _dispatch_editor(easyedit.ConceptEditor, concept, done)
        for cls in subclasses(easyedit.HyperParams):
            if "from_hparams" in vars(cls):
                _dispatch_hparams(cls, done)
        done.callback(setattr, LocFTBFHyperParams, "__bases__", (HyperParamsBase,))
        LocFTBFHyperParams.__bases__ = (HyperParamsBase, easyedit.HyperParams)
        for cls in (editor_class, LocFTBFHyperParams):
            _replace(sys.modules["easyeditor"], cls.__name__, cls, done)
        done.callback(_forget_editor_class)
        _editor_class = editor_class
        _undo.push(done.pop_all())
    return easyedit


def unregister() -> None:
    """Puts EasyEdit back as it was before `register`; a second call changes nothing."""
    _undo.close()


def editor_class() -> type | None:
    """Returns the class `LocFTBFEditor`, or `None` while LocFT-BF is not registered."""
    return _editor_class


def subclasses(cls: type) -> Iterator[type]:
    """Yields the classes below a class, at every depth."""
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from subclasses(child)


@contextmanager
def reading_with(adapt: Callable[[LocFTBFHyperParams], None]) -> Iterator[None]:
    """Context manager in which `adapt` sees our hyper-parameters when EasyEdit's classes read them.

    Args:
        adapt: Changes them as the program needs them.
    """
    token = _adapt.set(adapt)
    try:
        yield
    finally:
        _adapt.reset(token)


def __getattr__(name: str) -> Any:
    """`LocFTBFEditor`: EasyEdit is imported when it is asked for, and LocFT-BF registered."""
    if name != "LocFTBFEditor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return _editor_class


def _editor_class_of(easyedit: EasyEdit) -> type:
    """Returns the class `LocFTBFEditor`; one and the same, however often it is registered."""
    return next(
        (cls for cls in LocFTBFMethods.__subclasses__() if easyedit.BaseEditor in cls.__bases__),
        None,
    ) or type("LocFTBFEditor", (LocFTBFMethods, easyedit.BaseEditor), {"easyedit": easyedit})


def _forget_editor_class() -> None:
    global _editor_class
    _editor_class = None


def _replace(owner: Any, name: str, new: Any, done: ExitStack) -> None:
    """Sets an attribute of a class or module, to be put back when `done` closes."""
    own = vars(owner).get(name)  # the classmethod object itself, not what it binds to
    setattr(owner, name, new)
    if own is not None:
        done.callback(setattr, owner, name, own)
    else:
        done.callback(delattr, owner, name)


def _make_batchable(easyedit: EasyEdit, done: ExitStack) -> None:
    # The enumeration's members do not count: the method is a fixed chain of comparisons.
    original = easyedit.BatchEditor.is_batchable_method

    @functools.wraps(original)
    def is_batchable_method(alg_name: str) -> bool:
        return alg_name in ALG_NAMES or original(alg_name)

    _replace(easyedit.BatchEditor, "is_batchable_method", staticmethod(is_batchable_method), done)


def _dispatch_editor(cls: type, ours: Any, done: ExitStack) -> None:
    """Makes `cls(hparams)`, and so `cls.from_hparams(hparams)`, one of `ours` where it is meant."""
    original = vars(cls)["__init__"]

    @functools.wraps(original)
    def __init__(self: Any, hparams: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls and known_alg_name(getattr(hparams, "alg_name", None)) in ALG_NAMES:
            self.__class__ = ours
            ours.__init__(self, hparams)
        else:
            original(self, hparams, *args, **kwargs)

    _replace(cls, "__init__", __init__, done)


def _dispatch_hparams(cls: type, done: ExitStack) -> None:
    original = vars(cls)["from_hparams"].__func__

    @functools.wraps(original)
    def from_hparams(cls: type, hparams_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(hparams_name_or_path):
            hparams = LocFTBFHyperParams.from_hparams(hparams_name_or_path)
            adapt = _adapt.get()
            if adapt is not None:
                adapt(hparams)
            return hparams
        return original(cls, hparams_name_or_path, *args, **kwargs)

    _replace(cls, "from_hparams", classmethod(from_hparams), done)


def _is_ours(name_or_path: str) -> bool:
    try:
        _, config = read_mapping(name_or_path)
    except (HyperParamsError, OSError, TypeError):
        return False  # the class that was asked says what is wrong, in its own words
    return known_alg_name(config.get("alg_name")) in ALG_NAMES


def _run_on_cpu(base_editor: type, done: ExitStack) -> None:
    """Wraps the release's editor, which sends everything to a CUDA device, for a CPU."""

    def on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with CudaAsCPU():
                return method(*args, **kwargs)

        return wrapped

    for name in ("__init__", "edit", "edit_requests", "batch_edit", "edit_dataset"):
        if name in vars(base_editor):
            _replace(base_editor, name, on_cpu(vars(base_editor)[name]), done)
