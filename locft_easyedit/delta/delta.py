"""An edit as a value: the new matrices, the ones they replaced, and where they belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.requests import distinct_edits
from ..errors import DeltaError, one_message
from ..hparams import LocFTBFHyperParams
from ..training.result import EditResult
from ..training.trained_weights import values_swapped
from .apply import apply_deltas_, revert_deltas_
from .edited_matrices import EditedMatrices
from .export import write_exact_adapter, write_lora_adapter
from .file import read_edit, tensor_problems, write_edit
from .folder import compare_folder, with_originals, write_changed_folder
from .metadata import metadata_of, problems_of
from .verify import Report, compare, values_after
from .weights import ModelWeights


@dataclass(frozen=True, eq=False)
class Delta(EditedMatrices):
    """An edit: what a model's matrices were, what they became, and how to tell that model.

    Make one with `Delta.from_result`, keep it with `save`, get it back with `Delta.load`. Several
    edits, one on top of the other: `apply_deltas_` and `revert_deltas_`, and for models in folders
    `locft_easyedit.delta.folder`.

    Attributes are those of `EditedMatrices`. What is done with folders is written in
    `locft_easyedit.delta.folder` and `locft_easyedit.delta.export`; here it has its name.
    """

    # Made, kept and checked

    @classmethod
    def from_result(
        cls,
        result: EditResult,
        model: nn.Module,
        hparams: LocFTBFHyperParams,
        requests: Sequence[Mapping[str, Any]] | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
    ) -> Delta:
        """Returns an edit that was made.

        Args:
            result: What `edit_model` returned, with the factors of an edit that trained these.
            model: The model that was edited; whether the edit is in it plays no part.
            hparams: The hyper-parameters it was made with.
            requests: The requests that were trained; those of `result` if `None`.
            metrics: Figures to keep, such as `summarize` returns.

        Raises:
            DeltaError: The matrices cannot be kept: their names, types or numbers.
        """
        if requests is None:
            edits = result.edits.edits
        else:
            policy = "last" if hparams.on_conflict == "last" else None
            edits = distinct_edits(requests, policy).edits
        metadata = metadata_of(result, model, hparams, edits, metrics or {})
        lora = result.lora
        factors = {} if lora is None else {name: (lora.a[name], lora.b[name]) for name in lora.a}
        delta = cls(dict(result.new), dict(result.original), metadata, factors)
        delta.check()
        return delta

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Returns the edit in a file, with every value checked against its hash.

        The file may come from anybody: nothing is unpickled, no path in it is opened, and what is
        not as described is refused. What its numbers do to a model is not known: that whoever made
        it can be trusted is for its user to judge.

        Args:
            path: The file that `save` or `locft edit` wrote.

        Raises:
            DeltaError: The file is no edit, of another format, or damaged (one error with all of
                it).
        """
        metadata, tensors = read_edit(path)

        def named(prefix: str) -> dict[str, torch.Tensor]:
            names = metadata["matrices"]
            return {n: tensors[prefix + n] for n in names if prefix + n in tensors}

        a, b = named("lora_A."), named("lora_B.")
        factors = {name: (a[name], b[name]) for name in a}
        return cls(named(""), named("original."), metadata, factors)

    def save(self, path: str | Path, *, originals: bool = True) -> None:
        """Writes the edit as one safetensors file: whole, or not at all.

        Args:
            path: The file.
            originals: Keep what was replaced, so that the edit can be undone without the base
                model.

        Raises:
            DeltaError: The edit is not consistent in itself.
            OutputError: The file cannot be written.
        """
        self.check()
        kept = self if originals else self.without_originals()
        write_edit(path, self.metadata, kept.tensors())

    def check(self) -> None:
        """Checks what is said of the edit, and that its numbers are the ones described.

        Raises:
            DeltaError: Lists everything that is wrong.
        """
        problems = problems_of(self.metadata) or tensor_problems(self.metadata, self.tensors())
        if problems:
            raise DeltaError(one_message("The edit cannot be used:", problems))

    def without_originals(self) -> Delta:
        """Returns the edit without the values that it replaced: half the size, not undone alone."""
        return replace(self, original={})

    with_originals = with_originals

    # In a model in memory

    def verify(self, model: nn.Module) -> Report:
        """Returns how a model stands to the edit; nothing is changed.

        The edited matrices are compared number by number; of every other parameter 1,024 evenly
        strided numbers are. That tells another base model and other edits, before this one or after
        it, but not a change of a few single numbers.
        """
        return compare(self, ModelWeights(model))

    def apply_(self, model: nn.Module) -> None:
        """Puts the edit into a model, in place.

        Args:
            model: The model that was edited, without the edit: same weights, same precision.

        Raises:
            DeltaError: The model is another one, of another precision, has the edit already, or
                carries other edits than when this one was trained; nothing was changed.
        """
        apply_deltas_(model, [self])

    def revert_(self, model: nn.Module) -> None:
        """Takes the edit out of a model, in place: the model is what it was before, bit for bit.

        Raises:
            DeltaError: The edit is not in the model or not the last one in it, or was saved without
                the values that it replaced (see `with_originals`); nothing was changed.
        """
        revert_deltas_(model, [self])

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager within which `model` has the edit; afterwards it is as it was.

        Raises:
            DeltaError: As `apply_`; nothing was changed.
        """
        return values_swapped(model, values_after([self], ModelWeights(model)))

    # In a model's folder

    verify_folder = compare_folder

    def apply_to_folder(
        self, model: str | Path, output: str | Path, *, trust_remote_code: bool = False
    ) -> bool:
        """Writes the model in a folder, with the edit put into it, to another folder.

        Where the parameters lie in the checkpoint under their own names and in the edit's
        precision, the model is not loaded: only the files that hold edited matrices are written
        anew. Otherwise it is loaded in the edit's precision and saved.

        Args:
            model: The folder of the model without the edit.
            output: A folder that does not exist or is empty.
            trust_remote_code: Allow the model's own code, where it has to be loaded.

        Returns:
            Whether the model had to be loaded.

        Raises:
            DeltaError: The edit does not fit; nothing was written.
            ModelError: `model` cannot be used.
            OutputError: `output` holds something or cannot be written.
        """
        return write_changed_folder([self], model, output, trust_remote_code=trust_remote_code)

    def revert_in_folder(
        self, model: str | Path, output: str | Path, *, trust_remote_code: bool = False
    ) -> bool:
        """Writes the model in a folder, which has the edit, without it to another folder.

        Args, what is returned and errors are those of `apply_to_folder`.
        """
        return write_changed_folder(
            [self], model, output, reverted=True, trust_remote_code=trust_remote_code
        )

    # For other programs

    export_adapter = write_exact_adapter
    export_lora = write_lora_adapter
