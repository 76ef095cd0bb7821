"""The place that was chosen, what else was tried, and the file by which a run remembers it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError, one_message
from ..files import output_errors, write_atomically
from ..hparams import LocFTBFHyperParams
from ..identity import Identity
from ..reading import is_file, json_of, text_of
from .outcome import Cell
from .trial import Found

logger = logging.getLogger(__name__)

FILE_NAME = "choice.json"
_FORMAT = 1
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Tried:
    """A place and rate that was tried with a few edits.

    Attributes:
        cell: The place and the rate.
        promise: What one backward pass said of the place; `None` where it can say nothing.
        epochs: Passes over the few edits, at most.
        found: What came of it.
    """

    cell: Cell
    promise: float | None
    epochs: int
    found: Found


@dataclass(frozen=True)
class Choice:
    """A place and a learning rate, and why.

    Attributes:
        cell: What was chosen.
        tried: What it was chosen among, in the order of the trials.
        n_places: Places that the first look ranked.
        n_edits: Edits that were looked at.
        seconds: What the choice took.
    """

    cell: Cell
    tried: Sequence[Tried]
    n_places: int
    n_edits: int
    seconds: float

    def applied(self, hparams: LocFTBFHyperParams) -> LocFTBFHyperParams:
        """Returns the hyper-parameters with the place and the rate in them."""
        location = self.cell.location
        return replace(
            hparams,
            layers=[location.layer],
            rewrite_module_tmp=location.rewrite_module_tmp,
            lr=self.cell.lr,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the choice ready for JSON."""
        values = asdict(self)
        for tried in values["tried"]:
            found = tried["found"]
            found["drift"] = None if found["drift"] != found["drift"] else found["drift"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Choice:
        """Returns the choice that `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: It is not of that form.
        """
        tried = tuple(
            Tried(
                Cell.from_dict(one["cell"]),
                None if one["promise"] is None else float(one["promise"]),
                int(one["epochs"]),
                Found(**{k: float("nan" if v is None else v) for k, v in one["found"].items()}),
            )
            for one in values["tried"]
        )
        return cls(
            Cell.from_dict(values["cell"]),
            tried,
            int(values["n_places"]),
            int(values["n_edits"]),
            float(values["seconds"]),
        )


def kept_choice(folder: str | Path, identity: Identity) -> Choice | None:
    """Returns the choice that an earlier process of the same run has made; `None` if none has.

    Args:
        folder: The run's `checkpoint_dir`.
        identity: What the choice depends on.

    Raises:
        CheckpointError: It is damaged, or another run's.
    """
    path = Path(folder) / FILE_NAME
    if not is_file(path):
        return None
    try:
        values = json_of(text_of(path, CheckpointError, most=_MOST_BYTES))
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        found, choice = Identity.from_dict(values["identity"]), Choice.from_dict(values["choice"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}, which holds the place that was chosen, cannot be used: {error}. Remove it to "
            "choose anew, or take another `checkpoint_dir`."
        ) from error
    differences = identity.differences(found)
    if differences:
        raise CheckpointError(
            one_message(
                f"{path} holds the place that was chosen for another run. Take another "
                "`checkpoint_dir`, or remove it:",
                differences,
            )
        )
    logger.info("%s: %s was chosen before; it is not chosen again.", path, choice.cell.key)
    return choice


def keep_choice(folder: str | Path, identity: Identity, choice: Choice) -> None:
    """Writes a choice where `kept_choice` finds it; warns where the disk refuses."""
    path = Path(folder) / FILE_NAME
    content = {"format": _FORMAT, "identity": identity.to_dict(), "choice": choice.to_dict()}
    try:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(content, indent=1, default=str).encode())
    except OutputError as error:
        logger.warning("An interrupted run will choose its place again: %s", error)
