"""The places that `layers: auto` may choose, and which of them are worth a trial."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedModel

from ..errors import PlaceError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import AUTO
from ..lora import check_low_rank
from ..place import LayerList, select_place
from .places import Location, find_locations

_A_MODULE = 2  # places of one module among the first, unless there is no other


def candidates(
    model: PreTrainedModel, stack: LayerList, hparams: LocFTBFHyperParams
) -> list[Location]:
    """Returns the places that can be trained, among all or with the templates that are given.

    Raises:
        PlaceError: There is none; what is wrong with the first, if templates are given.
    """
    given = hparams.rewrite_module_tmp != AUTO
    if given:
        templates = tuple(hparams.templates)
        known = {one.templates: one.module for one in find_locations(model)}
        path = templates[0].partition("{}")[2].strip(".").removesuffix(".weight")
        module = known.get(templates) or path.rpartition(".")[2] or "layer"
        locations = [Location(i, module, templates) for i in range(len(stack.layers))]
    else:
        locations = find_locations(model)
    found, why_not = [], None
    for location in locations:
        try:
            place = select_place(model, [location.layer], location.templates)
            if hparams.tuning == "lora":
                check_low_rank(model, place.parameters, hparams.lora_rank)
            found.append(location)
        except PlaceError as error:
            why_not = why_not or error
    if not found:
        raise PlaceError(
            f"`layers=auto` finds no layer that can be trained. {why_not}"
        ) from why_not
    return found


def diverse(promises: Mapping[Location, float | None], n: int, n_layers: int) -> list[Location]:
    """Returns the `n` most promising places, not all of one module and no two neighbours.

    Where nothing is known of any place they are spread over the depth.
    """
    ranked = sorted(
        (location for location, promise in promises.items() if promise is not None),
        key=lambda location: (-(promises[location] or 0.0), location),
    )
    if not ranked:
        everything = sorted(promises)
        return [everything[i] for i in np.linspace(0, len(everything) - 1, n + 2).astype(int)[1:-1]]
    several = len({location.module for location in ranked}) > 1
    apart = max(1, n_layers // 15)
    chosen: list[Location] = []
    for location in ranked:
        alike = [other for other in chosen if other.module == location.module]
        near = any(abs(other.layer - location.layer) <= apart for other in alike)
        if not near and not (several and len(alike) >= _A_MODULE):
            chosen.append(location)
        if len(chosen) == n:
            break
    return chosen
