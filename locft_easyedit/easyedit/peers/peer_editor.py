"""Any of EasyEdit's methods on a model that is loaded, run by EasyEdit's own code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from ...errors import LocFTError
from ...hparams import LocFTBFHyperParams
from ...hparams_rules import ALG_NAMES
from ..cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from ..importing import EasyEdit
from ..registration import register, subclasses
from .yamls import MethodUnavailableError, check_runs


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
        wrapper: What the method puts around the model, if it does: the edits hold in there.
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
        hparams.sequential_edit = True  # WISE begins anew with every edit otherwise
        self.wrapper: Any = None

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
        self._take_all_of_(len(requests))
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
        model: Any = self.editor.model
        if own is not model:
            if getattr(own, "model", None) is not model:
                raise LocFTError(
                    f"This method gives back a {type(edited).__name__} that is no wrapper of the "
                    "model, and cannot be measured here."
                )
            self.wrapper = own
        if isinstance(former, Mapping) and former:  # some methods give back a function, or nothing
            parameters = dict(model.named_parameters())
            same = all(
                torch.equal(parameters[name].detach().cpu(), value.detach().cpu())
                for name, value in former.items()
                if name in parameters
            )
            self.nothing_changed = same and (self.nothing_changed or not self.changed)
            self.changed |= set(former)

    def begins(self, end: int) -> None:
        """Tells what is around the model that a text comes whose prompt ends at a position.

        GRACE looks there whether it knows the prompt.
        """
        for module in self.editor.model.modules():
            if hasattr(module, "key_id"):
                module.key_id = end

    @torch.no_grad()
    def generate(self, ids: list[int], most: int, done: Callable[[list[int]], bool]) -> list[int]:
        """Returns a prompt's tokens and up to `most` of a greedy answer, until they are `done`."""
        around = self.editor.model if self.wrapper is None else self.wrapper
        prompt = torch.tensor([ids], device=self.editor.model.get_input_embeddings().weight.device)
        with self._mode:
            whole = around.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=self.editor.tok.eos_token_id,
                stopping_criteria=[_Until(done)],
            )
        answered: list[int] = whole[0].tolist()
        return answered

    def _take_all_of_(self, n: int) -> None:
        """Makes a method take `n` requests in one call, where it counts them itself."""
        once = getattr(self.hparams, "batch_size_once", None)
        if once is not None:  # UltraEdit drops what is not a whole number of these
            self.hparams.batch_size = n
            self.hparams.batch_size_once = max(i for i in range(1, once + 1) if n % i == 0)


class _Until(StoppingCriteria):
    """Ends `generate` where a function of one text's tokens says so."""

    def __init__(self, done: Callable[[list[int]], bool]) -> None:
        self._done = done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.tensor([self._done(ids) for ids in input_ids.tolist()])


def _context_templates(editor: Any) -> Any:
    """Returns the module in which ROME and MEMIT keep their context templates, if there is one."""
    module = sys.modules.get(getattr(editor.apply_algo, "__module__", ""))
    return module if hasattr(module, "CONTEXT_TEMPLATES_CACHE") else None


def hparams_class(method: str) -> Any:
    """Returns EasyEdit's hyper-parameter class for `method`, or ours.

    Raises:
        MethodUnavailableError: This EasyEdit does not have the method, or it cannot be run here.
    """
    check_runs(method)
    easyedit = register()
    if method in ALG_NAMES:
        return LocFTBFHyperParams
    wanted = method.replace("-", "").lower()
    names = {name.casefold(): name for name in easyedit.ALG_DICT}
    classes = {
        cls.__name__.lower()
        .removesuffix("hyperparams")
        .removesuffix("hparams")
        .replace("_", ""): cls
        for cls in subclasses(easyedit.HyperParams)
    }
    if method.casefold() not in names or wanted not in classes:
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
