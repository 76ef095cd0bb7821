"""What an interrupted training goes on from, once all processes agree on what it is."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from .checkpoint import Checkpoints
from .hparams import LocFTBFHyperParams
from .identity import Identity, check_agreed
from .place import Place
from .preserve.sources import Source
from .training_texts import TrainingTexts
from .world import World


def agreed_checkpoints(
    model: PreTrainedModel,
    place: Place,
    texts: TrainingTexts,
    hparams: LocFTBFHyperParams,
    sources: Sequence[Source],
    folder: str | None,
    world: World,
) -> Checkpoints | None:
    """Returns the checkpoints of a training on which all processes agree.

    Args:
        model: The model, with its original weights.
        place: What is trained.
        texts: The edits and their rewordings.
        hparams: The hyper-parameters, with the place that was chosen.
        sources: What is to be preserved.
        folder: Where checkpoints lie; `None` leaves none, and returns `None`.
        world: The processes that train together.

    Raises:
        RankError: A process is about to make another edit.
        CheckpointError: As for `Checkpoints`.
    """
    if folder is None and not world.is_distributed:
        return None
    identity = Identity.of(
        model,
        place,
        texts.texts,
        hparams,
        world.size,
        sources,
        [*texts.wordings, texts.subjects],
    )
    check_agreed(world.all_gather(identity))
    if folder is None or hparams.checkpoint_minutes is None:
        return None
    checkpoints = Checkpoints(folder, hparams.checkpoint_minutes, identity, world)
    world.advise(
        f"{checkpoints.path} has the last checkpoint, if one was due; the same edit "
        "goes on there, with any number of processes."
    )
    return checkpoints
