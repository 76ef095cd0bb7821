"""A model made ready for many passes: what they leave out, and what is on disk.

What is found here holds for all texts of a session and for every training of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from transformers import PreTrainedModel

from .errors import ModelError
from .hparams import LocFTBFHyperParams
from .place import Place
from .sharding import lockstep
from .shortcuts import Shortcuts, find_shortcuts
from .stream import FrozenStream, stream_of
from .tokens import TokenizedTexts


@contextmanager
def readied(
    model: PreTrainedModel,
    texts: TokenizedTexts,
    place: Place,
    hparams: LocFTBFHyperParams,
    *,
    progress: bool = False,
) -> Iterator[tuple[Shortcuts, FrozenStream | None]]:
    """Within, a model is ready for many passes; afterwards its modules are as they were.

    Yields what leaves its logits as they are, and what reads frozen layers that are not resident.

    Args:
        model: The model, in evaluation mode.
        texts: All edits as tokens.
        place: What is trained.
        hparams: `packing`, `frozen_prefix`.
        progress: Show progress bars.

    Raises:
        ModelError: Frozen layers are on disk, and the model cannot be split above them.
    """
    with ExitStack() as undo:
        stream = stream_of(model, place.first_layer, progress=progress)
        if stream is not None:
            undo.enter_context(stream)
        shortened = stream.shortened() if stream is not None else nullcontext()
        with shortened, lockstep(model):
            shortcuts = find_shortcuts(
                model,
                texts,
                place,
                packing=hparams.packing,
                frozen_prefix=hparams.frozen_prefix or stream is not None,
            )
        if stream is not None and not shortcuts.cuts:
            raise ModelError(
                "`stream_frozen` does not suit this model: its layers cannot be split (see "
                "the warning). Set `stream_frozen: false`, on a device that holds it whole."
            )
        yield shortcuts, stream
