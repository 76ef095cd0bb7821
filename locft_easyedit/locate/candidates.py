"""The places that `layers: auto` may choose, and which of them are worth a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..data.tokenization import TokenizedTexts
from ..errors import PlaceError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import AUTO
from ..modeling.devices import input_device
from ..modeling.locations import Location, find_locations
from ..modeling.places import LayerList, check_low_rank, select_place

_A_MODULE = 2  # places of one module among the first, unless there is no other

RUN_EDITS, RUN_BATCH = 3000, 100
RUN_EPOCHS = 25  # at most
SHARE = 0.08  # of a run; a fifth of the tenth is kept for what counting work does not see
_TRAINING = 3  # forward and backward, over forward alone
# Forward, again, backward, and two products for each matrix; times 54 / 37.
_SENSITIVITY = 7.3
_TRIAL = 1.9  # 70 / 37
_PROBES, _PROBE_PASSES = 40, 12  # texts that a session runs to find its shortcuts
_LEAST_ON_GPU = 256  # tokens: fewer take a GPU about as long
_LEAST_WORK = 3e7  # multiplications in a layer: fewer take a CPU about as long


def candidates(
    model: PreTrainedModel, stack: LayerList, hparams: LocFTBFHyperParams
) -> list[Location]:
    """Returns the places that can be trained, among all or with the templates that are given.

    Raises:
        PlaceError: There is none; what is wrong with the first, if templates are given.
    """
    if hparams.rewrite_module_tmp == AUTO:
        locations = find_locations(model)
    else:
        templates = tuple(hparams.templates)
        known = {one.templates: one.module for one in find_locations(model)}
        path = templates[0].partition("{}")[2].strip(".").removesuffix(".weight")
        module = known.get(templates) or path.rpartition(".")[2] or "layer"
        locations = [Location(i, module, templates) for i in range(len(stack.layers))]
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


@dataclass(frozen=True)
class Costs:
    """What runs and trials of one model and data take.

    Attributes:
        n_layers: The model's layers.
        head: The output head's numbers over a layer's.
        tokens: Mean tokens of an edit.
        scored: How many of them are scored.
        n_edits: Edits of a trial.
        batch_size: Edits of a trial's mini-batch.
        rewordings: Tokens of all rewordings.
        text: Tokens of the unrelated text.
        least: Tokens that every pass counts at least.
    """

    n_layers: int
    head: float
    tokens: float
    scored: float
    n_edits: int
    batch_size: int
    rewordings: int
    text: int
    least: int = 0

    @classmethod
    def estimate(
        cls,
        model: Any,
        stack: LayerList,
        own: TokenizedTexts,
        rewordings: TokenizedTexts,
        text: TokenizedTexts,
        batch_size: int,
    ) -> Costs:
        """Returns the costs of a model's trials with these texts."""
        head = model.get_output_embeddings()
        layer = sum(p.numel() for p in stack.layers.parameters()) / len(stack.layers)
        return cls(
            n_layers=len(stack.layers),
            head=0.0 if head is None else head.weight.numel() / layer,
            tokens=float(own.lengths.mean()),
            scored=float((own.lengths - own.target_start).mean()),
            n_edits=len(own),
            batch_size=batch_size,
            rewordings=int(rewordings.lengths.sum()),
            text=int(text.lengths.sum()),
            least=(
                _LEAST_ON_GPU
                if input_device(model).type == "cuda"
                else int(_LEAST_WORK / max(layer, 1))
            ),
        )

    def run(self, first_layer: int, epochs: int) -> float:
        """Returns the work of a run of 3,000 edits from this layer on, in large mini-batches."""
        tokens = max(self.tokens, self.least / RUN_BATCH)
        step = _TRAINING * (tokens * (self.n_layers - first_layer) + self.scored * self.head)
        return RUN_EDITS * (self.tokens * first_layer + min(epochs, RUN_EPOCHS) * step)

    def allowance(self, first_layer: int, epochs: int) -> float:
        """Returns the work that the choice of a place may take."""
        return SHARE * self.run(first_layer, epochs)

    def sensitivities(self) -> float:
        """Returns the work of the pass that looks at every matrix."""
        everything = self.n_edits * self.tokens + self.rewordings + self.text
        return _SENSITIVITY * everything * (self.n_layers + self.head)

    def trial(self, first_layer: int, epochs: int) -> float:
        """Returns the work of one trial, its measurements included."""
        in_batch = min(self.batch_size, self.n_edits)
        passes = epochs * -(-self.n_edits // in_batch)
        upper = self.n_layers - first_layer
        step = max(in_batch * self.tokens, self.least) * upper + in_batch * self.scored * self.head
        probes = max(_PROBES * self.tokens, _PROBE_PASSES * self.least)
        prepared = self.n_edits * self.tokens * first_layer + probes * self.n_layers
        measured = (self.n_edits * self.tokens + self.rewordings) * self.n_layers
        drift = self.text * (self.n_layers + self.head)
        return _TRIAL * (prepared + passes * _TRAINING * step + measured + drift)
