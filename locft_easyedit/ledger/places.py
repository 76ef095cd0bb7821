"""What a ledger's log says of the place, and of the matrices there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LedgerError
from ..hparams import LocFTBFHyperParams
from ..modeling.places import Place
from .log import Event
from .states import sha256_of


def chosen_place(hparams: LocFTBFHyperParams, place: Place) -> dict[str, Any]:
    """Returns what the log says of a place: where it is, the rate, and the base's matrices.

    Args:
        hparams: The settings, with the place.
        place: Its parameters, as the base model has them.
    """
    return {
        "layers": list(hparams.layers),
        "rewrite_module_tmp": hparams.rewrite_module_tmp,
        "lr": hparams.lr,
        "base": sha256_of(place.parameters),
    }


def place_of(events: Sequence[Event]) -> Mapping[str, Any] | None:
    """Returns what the log says of the place; `None` before it is chosen."""
    said = (event.said.get("place") for event in events)
    return next((place for place in said if place is not None), None)


def hashes_at(events: Sequence[Event], number: int) -> dict[str, str]:
    """Returns the sha256 of each matrix after an event, as the log has it; a place is chosen."""
    place = place_of(events)
    assert place is not None
    return dict(events[number].said.get("state") or place["base"])


def event_of(
    found: Place, place: Mapping[str, Any], events: Sequence[Event]
) -> tuple[int, dict[int, dict[str, str]]]:
    """Returns the event whose matrices a model has, and the hashes of each event's.

    Args:
        found: The place, as the model has it.
        place: What the log says of it.
        events: The ledger's events.

    Raises:
        LedgerError: There is no such event.
    """
    present = sha256_of(found.parameters)
    known = {0: dict(place["base"])} | {
        event.number: dict(event.said["state"]) for event in events if "state" in event.said
    }
    at = next((n for n in sorted(known, reverse=True) if known[n] == present), None)
    if at is None:
        raise LedgerError(
            "The model's matrices are neither the base's nor those of any event of the ledger: "
            f"{', '.join(found.parameters)}. Give the base model, without edits of others."
        )
    return at, known
