"""The trained matrices after each event, as files: edits of the base model, few of them kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..data.requests import EditSet, distinct_edits
from ..delta.delta import Delta
from ..errors import DeltaError
from ..hparams import LocFTBFHyperParams
from ..training.result import EditResult
from .facts import Book

logger = logging.getLogger(__name__)

Matrices = dict[str, torch.Tensor]
_NO_EDITS = EditSet([], 0, [])
_NAME = re.compile(r"state-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class States:
    """The states that a ledger's folder holds; that of event 0 is the base model's.

    Attributes:
        folder: The ledger's folder.
    """

    folder: Path

    def path(self, number: int) -> Path:
        """Returns where the matrices after an event lie, or would lie."""
        return self.folder / f"state-{number:06d}.safetensors"

    def kept(self) -> list[int]:
        """Returns the events whose matrices are there, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(found[1]) for found in names if found)

    def load(self, number: int, hashes: Mapping[str, str]) -> Matrices | None:
        """Returns the matrices after an event; `None`, with a warning, if they are damaged.

        Args:
            number: The event.
            hashes: The sha256 of each matrix, as the log has it.
        """
        path = self.path(number)
        if not path.is_file():
            return None
        try:
            delta = Delta.load(path)
        except DeltaError as error:
            logger.warning("%s is damaged and is made anew: %s", path, error)
            return None
        if hashes_of(delta) != dict(hashes):
            logger.warning("%s holds other matrices than the log says; it is made anew.", path)
            return None
        return delta.new

    def save(self, number: int, delta: Delta) -> None:
        """Writes the matrices after an event; of what they replace, the base's file has a copy.

        Raises:
            OutputError: They cannot be written.
        """
        delta.save(self.path(number), originals=False)

    def thin(self, last: int) -> None:
        """Removes what is not worth its room: about two copies for each doubling of the log stay.

        Of an older event, the matrices are made anew from the nearest copy before it: from at most
        two thirds of the way.
        """
        for number in self.kept():
            worth_it = number == 0 or last - number < 2 * (number & -number)
            if not worth_it or number > last:  # of a command that was killed before its event
                self.path(number).unlink(missing_ok=True)


def hashes_of(delta: Delta) -> dict[str, str]:
    """Returns the sha256 of each matrix that an edit leaves."""
    return {name: described["new"] for name, described in delta.matrices.items()}


def delta_of(
    base: Matrices,
    new: Matrices,
    model: PreTrainedModel,
    hparams: LocFTBFHyperParams,
    book: Book,
) -> Delta:
    """Returns the matrices of a ledger as one edit of its base model.

    Args:
        base: The base model's matrices.
        new: The matrices.
        model: The model, whatever its matrices are now.
        hparams: The settings, with the place.
        book: The facts that are in.
    """
    requests = [dict(fact.request) for fact in book.active]
    edits = distinct_edits(requests, None) if requests else _NO_EDITS
    result = EditResult(
        losses=[],
        step_losses=[],
        original=base,
        new=new,
        timings={},
        n_updates=0,
        converged=True,
        n_trained=len(requests),
        edits=edits,
        packed=hparams.packing,
        frozen_prefix=hparams.frozen_prefix,
    )
    return Delta.from_result(result, model, hparams)
