"""What is trained after each event, as files: edits of the base model, few of them kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..data.requests import EditSet, distinct_edits
from ..delta.delta import Delta
from ..errors import DeltaError
from ..hparams import LocFTBFHyperParams
from ..training.result import EditResult
from ..utils.files import output_errors, replacing
from ..utils.hashing import tensor_sha256
from .facts import Book
from .log import Event

logger = logging.getLogger(__name__)

Matrices = dict[str, torch.Tensor]
_NO_EDITS = EditSet([], 0, [])
STEP = "step"
_NAME = re.compile(r"state-(\d{6,})\.safetensors")


@dataclass(frozen=True)
class State:
    """What an event leaves, and the next one begins with.

    Attributes:
        matrices: The trained matrices.
        moments: Adam's second moment of what is trained, by name, and the steps behind it (`STEP`);
            `None` where Adam begins anew: on the base model, and with `tuning: lora`.
    """

    matrices: Matrices
    moments: Matrices | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each matrix."""
        return sha256_of(self.matrices)

    @property
    def moments_hashes(self) -> dict[str, str] | None:
        """The sha256 of each tensor of the moments, as the log has them."""
        return None if self.moments is None else sha256_of(self.moments)


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

    def moments_path(self, number: int) -> Path:
        """Returns where the moments after an event lie, or would lie."""
        return self.folder / f"moments-{number:06d}.safetensors"

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

    def load_moments(self, number: int, hashes: Mapping[str, str]) -> Matrices | None:
        """Returns the moments after an event; `None`, with a warning, if they are damaged or gone.

        Args:
            number: The event.
            hashes: Their sha256, as the log has them.
        """
        path = self.moments_path(number)
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged or gone, and is made anew: %s", path, error)
            return None
        if sha256_of(found) != dict(hashes):
            logger.warning("%s holds other moments than the log says; it is made anew.", path)
            return None
        return found

    def looked_through(
        self, events: Sequence[Event], hashes: Sequence[Mapping[str, str]]
    ) -> tuple[list[int], list[str]]:
        """Returns the events whose matrices and moments are whole, and a line for each damage.

        Args:
            events: The ledger's events.
            hashes: The sha256 of each matrix after each of them.
        """
        whole, problems = [], []
        for number in self.kept():
            if number > events[-1].number:
                continue
            moments = events[number].said.get("moments")
            if self.load(number, hashes[number]) is None:
                problems.append(f"{self.path(number).name} is damaged.")
            elif moments is not None and self.load_moments(number, moments) is None:
                problems.append(f"{self.moments_path(number).name} is damaged or gone.")
            else:
                whole.append(number)
        return whole, problems

    def save(self, number: int, delta: Delta, moments: Matrices | None = None) -> None:
        """Writes what an event leaves; of what it replaces, the base's file has a copy.

        Raises:
            OutputError: It cannot be written.
        """
        delta.save(self.path(number), originals=False)
        if moments is not None:
            path = self.moments_path(number)
            with output_errors(path), replacing(path) as temporary:
                save_file({name: value.cpu().contiguous() for name, value in moments.items()},
                          temporary)  # fmt: skip

    def thin(self, last: int) -> None:
        """Removes what is not worth its room: about two copies for each doubling of the log stay.

        Of an older event, the matrices are made anew from the nearest copy before it: from at most
        two thirds of the way.
        """
        for number in self.kept():
            worth_it = number == 0 or last - number < 2 * (number & -number)
            if not worth_it or number > last:  # of a command that was killed before its event
                self.path(number).unlink(missing_ok=True)
                self.moments_path(number).unlink(missing_ok=True)


def sha256_of(values: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns the sha256 of each tensor."""
    return {name: tensor_sha256(value) for name, value in values.items()}


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
