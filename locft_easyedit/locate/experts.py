"""The most promising expert of each layer's fused ones, by what one backward pass says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..modeling.locations import EXPERT, Location
from ..modeling.places import match_parameters
from .sensitivity import Sensitivity


def fused_locations(model: PreTrainedModel, locations: Sequence[Location]) -> list[Location]:
    """Returns the places at which all routed experts of a layer are one fused parameter.

    The model's weights need not be loaded.
    """
    found = []
    for location in locations:
        if location.module in EXPERT and len(location.templates) == 1:
            [parameter] = match_parameters(model, [location.layer], location.templates).values()
            if parameter.ndim == 3:
                found.append(location)
    return found


def one_of(location: Location, expert: int) -> Location:
    """Returns the place of one expert, where `location` is that of all that are fused."""
    return Location(
        location.layer, EXPERT[location.module], (f"{location.templates[0]}[{expert}]",)
    )


def promising_experts(
    figures: Mapping[str, Sensitivity], locations: Sequence[Location]
) -> dict[Location, float]:
    """Returns the most promising expert of each place, and its promise.

    Args:
        figures: What the pass says of each parameter, and of each expert.
        locations: Places of fused experts.
    """
    found = {}
    for location in locations:
        name = location.templates[0].replace("{}", str(location.layer))
        promises: list[float] = []
        while (one := figures.get(f"{name}[{len(promises)}]")) is not None:
            promises.append(one.promise)
        best = max(range(len(promises)), key=promises.__getitem__, default=None)
        # What no edit is routed to promises nothing.
        if best is not None and math.isfinite(promises[best]):
            found[one_of(location, best)] = promises[best]
    return found
