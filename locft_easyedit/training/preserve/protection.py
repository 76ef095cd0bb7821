"""What a session preserves while it trains: measured once, for every training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.training_texts import TrainingTexts
from ...distributed.world import World
from ...errors import ModelError
from ...hparams import LocFTBFHyperParams
from ...modeling.fsdp import sharded_layers
from ...modeling.places import Place
from ...prefix.shortcuts import Shortcuts
from ...prefix.streaming import FrozenStream
from ...utils.timing import timed
from .confined_change import ConfinedChange, check_confinable
from .filters import Filters, adam_of, filters_for
from .sources import Source


@dataclass
class Protection:
    """The filters of a place, and the change that they confine.

    Attributes:
        filters: What was measured; the same on all ranks.
        change: The confined change of the next training, once begun with `begin_`.
    """

    filters: Filters
    change: ConfinedChange

    @classmethod
    def measured(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        place: Place,
        sources: Sequence[Source],
        texts: TrainingTexts,
        hparams: LocFTBFHyperParams,
        *,
        world: World,
        timings: dict[str, float],
        progress: bool = False,
    ) -> Protection:
        """Returns the protection of a model as it is now.

        Args:
            model: The model as it is before the edit, in evaluation mode.
            tokenizer: Its tokenizer.
            place: Whose matrices are trained.
            sources: What is to be preserved.
            texts: The edits, of which neighbours are made.
            hparams: As for `filters_for`.
            world: The processes that train together.
            timings: Seconds by phase; gets `preserve`.
            progress: Show progress bars.

        Raises:
            LocFTError: As for `filters_for`, here or on another rank.
        """
        # A rank that fails here must not leave the others waiting for the exchange below.
        with timed(timings, "preserve", model), world.sharing_errors():
            filters = filters_for(
                model, tokenizer, place, sources, texts, hparams, progress=progress
            )
        # Unlike GPUs may have rounded differently.
        world.broadcast_(filters.tensors().values())
        return cls(filters, ConfinedChange(model, place.parameters, filters.of, filters.outputs))

    def folded(self, shortcuts: Shortcuts) -> Shortcuts:
        """Returns the shortcuts with the change's constants in what a prefix records."""
        return replace(shortcuts, cuts=tuple(map(self.change.folded, shortcuts.cuts)))

    def begin_(self) -> bool:
        """Puts the change at its beginning, on top of the model's present weights.

        Returns whether what was recorded with it still holds: the weights that it is added to are
        part of that.
        """
        holds = self.change.holds_for(self.change.parameters)
        if holds:
            self.change.reset_()
        else:
            self.change = self.change.on_top()
        return holds

    def adam(self, n_edits: int, hparams: LocFTBFHyperParams) -> dict[str, Any] | None:
        """Returns what Adam is given for `n_edits` beside the rate; `None` for what it always is.

        What is only kept exactly, and not damped, asks for nothing of Adam.
        """
        return adam_of(n_edits, hparams) if self.filters.damps else None


def check_protectable(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter]) -> None:
    """Checks that a model can be protected while these parameters are trained.

    Raises:
        PlaceError: As for `check_confinable`.
        ModelError: This process has only a part of the model.
    """
    check_confinable(model, parameters)
    if sharded_layers(model) is not None:
        raise ModelError(
            "`preserve` needs the whole model in each process, and `shard_frozen` shares "
            "its layers out. Set `shard_frozen: false`, or `preserve: []`."
        )


def check_resident(stream: FrozenStream | None) -> None:
    """Checks that what enters the trained matrices can be measured.

    Args:
        stream: What reads frozen layers from disk, if they are there.

    Raises:
        ModelError: They are.
    """
    if stream is not None:
        raise ModelError(
            "`preserve` measures what enters the trained matrix, and `stream_frozen` leaves "
            "the layers below it on disk. Set `stream_frozen: false`, on a device that holds "
            "the model, or `preserve: []`."
        )
