"""The place of a ledger with `layers: auto`: chosen once, with the first facts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import Edit
from ..data.tokenization import tokenize_edits
from ..distributed.world import World
from ..hparams import LocFTBFHyperParams
from ..locate.auto import check_enough, choose_once
from ..modeling.devices import context_length


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    hparams: LocFTBFHyperParams,
    *,
    world: World,
    progress: bool,
) -> LocFTBFHyperParams:
    """Returns the settings with the place, and the rate, that these edits decide.

    Args:
        model: The base model.
        tokenizer: Its tokenizer.
        edits: The first facts.
        hparams: The settings, with `layers: auto`.
        world: The processes; rank 0 chooses for all.
        progress: Show progress bars.

    Raises:
        LocFTError: As for `choose_place`.
    """
    check_enough(len(edits))
    texts = tokenize_edits(
        tokenizer, edits, append_eos=hparams.append_eos, max_positions=context_length(model)
    )
    choice = choose_once(
        model, tokenizer, edits, texts, hparams, None, world=world, progress=progress
    )
    return choice.applied(hparams)
