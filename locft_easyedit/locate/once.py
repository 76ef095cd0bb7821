"""`layers: auto` for a run: one process chooses for all of them, and not again on resuming."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hparams import LocFTBFHyperParams
from ..identity import Identity
from ..place import Place
from ..requests import Edit
from ..tokens import TokenizedTexts
from ..world import World
from .auto import choose_place
from .choice import Choice, keep_choice, kept_choice


def choose_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    texts: TokenizedTexts,
    hparams: LocFTBFHyperParams,
    folder: str | None,
    *,
    world: World,
    progress: bool = True,
) -> Choice:
    """Returns the place for these edits, which rank 0 chooses for all.

    Args:
        model: The model, not edited.
        tokenizer: Its tokenizer.
        edits: The distinct edits to be made.
        texts: What is trained, as tokens.
        hparams: As for `choose_place`.
        folder: Where an interrupted run finds its choice again; `None` keeps none.
        world: The processes that train together.
        progress: Show a progress bar.

    Raises:
        LocFTError: As for `choose_place` and `kept_choice`, here or on rank 0.
    """

    def choose() -> Choice:
        if folder is None:
            return choose_place(model, tokenizer, edits, hparams, progress=progress)
        identity = Identity.of(model, Place({}, None, None), texts, hparams)
        kept = kept_choice(folder, identity)
        if kept is not None:
            return kept
        choice = choose_place(model, tokenizer, edits, hparams, progress=progress)
        keep_choice(folder, identity, choice)
        return choice

    return world.broadcast_from_main(choose)
