"""Any of EasyEdit's methods on a model that is loaded, run by EasyEdit's own code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...errors import LocFTError
from ...hparams import LocFTBFHyperParams
from ...hparams_rules import ALG_NAMES
from ..cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from ..importing import EasyEdit
from ..registration import register, subclasses


class MethodUnavailableError(LocFTError):
    """The installed EasyEdit does not have a method."""


class PeerEditor:
    """A method of EasyEdit on a loaded model; its edits accumulate in the model.

    The method's own function is called as EasyEdit's editor calls it; what EasyEdit would measure
    before and after each call is left to the caller.

    Args:
        method: A name in EasyEdit's `ALG_DICT`.
        model: The model; edits change it in place.
        tokenizer: Its tokenizer, padding on the side that the method wants.
        hparams: An object of EasyEdit's hyper-parameter class, or ours (see `hparams_class`).
        model_name: The name by which EasyEdit chooses its paths for a kind of model.

    Attributes:
        changed: Names of the parameters that the method says it has changed.
        nothing_changed: Whether all of these have been equal to their former values every time.
    """

    def __init__(
        self, method: str, model: Any, tokenizer: Any, hparams: Any, model_name: str
    ) -> None:
        easyedit = register()
        self._mode = CudaAsCPU() if needs_cuda_as_cpu(easyedit) else nullcontext()
        hparams.model_name = (model, tokenizer)  # what is loaded is taken as it is
        with self._mode:
            self.editor = easyedit.BaseEditor.from_hparams(hparams)
        if method not in ALG_NAMES:
            self.editor.model_name = hparams.model_name = model_name
        self.hparams = hparams

        self.changed: set[str] = set()
        self.nothing_changed = False

    @property
    def templates(self) -> Any:
        """The texts that ROME and MEMIT sampled at their first edit and keep for all others."""
        module = _context_templates(self.editor)
        return None if module is None else module.CONTEXT_TEMPLATES_CACHE

    @templates.setter
    def templates(self, value: Any) -> None:
        module = _context_templates(self.editor)
        if module is not None:
            module.CONTEXT_TEMPLATES_CACHE = value

    def edit_(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Edits the model with all `requests` in one call of the method."""
        with self._mode:
            edited, former = self.editor.apply_algo(
                self.editor.model,
                self.editor.tok,
                [dict(request) for request in requests],
                self.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=False,
            )
        own = getattr(edited, "get_base_model", lambda: edited)()
        if own is not self.editor.model:
            raise LocFTError(
                f"This method gives back a {type(edited).__name__} around the model, which cannot "
                "be measured here. Compare methods that edit the model itself."
            )
        if isinstance(former, Mapping) and former:  # some methods give back a function, or nothing
            parameters = dict(self.editor.model.named_parameters())
            same = all(
                torch.equal(parameters[name].detach().cpu(), value.detach().cpu())
                for name, value in former.items()
                if name in parameters
            )
            self.nothing_changed = same and (self.nothing_changed or not self.changed)
            self.changed |= set(former)


def _context_templates(editor: Any) -> Any:
    """Returns the module in which ROME and MEMIT keep their context templates, if there is one."""
    module = sys.modules.get(getattr(editor.apply_algo, "__module__", ""))
    return module if hasattr(module, "CONTEXT_TEMPLATES_CACHE") else None


def hparams_class(method: str) -> Any:
    """Returns EasyEdit's hyper-parameter class for `method`, or ours.

    Raises:
        MethodUnavailableError: This EasyEdit does not have the method.
    """
    easyedit = register()
    if method in ALG_NAMES:
        return LocFTBFHyperParams
    wanted = method.replace("-", "").lower()
    classes = {
        cls.__name__.lower()
        .removesuffix("hyperparams")
        .removesuffix("hparams")
        .replace("_", ""): cls
        for cls in subclasses(easyedit.HyperParams)
    }
    if method not in easyedit.ALG_DICT or wanted not in classes:
        known = ", ".join(sorted(easyedit.ALG_DICT))
        hint = (
            "The current source on GitHub (zjunlp/EasyEdit) may: clone it and set EASYEDIT_HOME to "
            "the clone."
            if easyedit.is_release
            else "Check the spelling."
        )
        raise MethodUnavailableError(
            f"{describe(easyedit)} has no method {method}; it has {known}. {hint}"
        )
    return classes[wanted]


def describe(easyedit: EasyEdit) -> str:
    """Returns which EasyEdit this is, in words."""
    if easyedit.is_release:
        try:
            return f"EasyEdit's PyPI release {metadata.version('easyeditor')}"
        except metadata.PackageNotFoundError:
            return "EasyEdit's PyPI release"
    commit = commit_of(easyedit.home)
    return f"EasyEdit's current source{f' ({commit})' if commit else ''}"


def commit_of(folder: str | Path) -> str:
    """Returns the short hash of a clone's commit; empty if it is no clone, or git is missing."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
