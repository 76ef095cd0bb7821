"""The first event of a ledger: a base model, its tokenizer and the settings are bound to it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distributed.world import World
from ..errors import LedgerError
from ..hparams import LocFTBFHyperParams
from ..modeling.loading import load_model
from ..modeling.places import select_place
from ..utils.files import locked
from .binding import binding_of, check_agreed, check_loaded, check_supported
from .log import INIT, LOG, Log
from .places import chosen_place


def begun(
    folder: Path,
    hparams: LocFTBFHyperParams,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    world: World,
) -> tuple[Log, PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the log of a new ledger, and the model and the tokenizer that it is bound to.

    Args:
        folder: A folder that holds no ledger; made if need be.
        hparams: The settings.
        model: The base model; loaded as `hparams` say if `None`.
        tokenizer: Its tokenizer.
        world: The processes that share the work.

    Raises:
        LocFTError: As for `Ledger.init`.
    """
    hparams.check()
    check_supported(hparams)
    world.broadcast_from_main(lambda: _check_is_new(folder))
    if model is None or tokenizer is None:
        model, tokenizer = load_model(hparams)
    with world.sharing_errors():
        place = None
        if not hparams.chooses:
            found = select_place(model, hparams.layers, hparams.templates)
            check_loaded(model, found.first_layer, hparams)
            place = chosen_place(hparams, found)
        binding = binding_of(model, tokenizer, hparams) | {"place": place}
    check_agreed(world, "models or settings", binding)

    def begin() -> Log:
        with locked(folder):
            _check_is_new(folder)
            log = Log(folder)
            log.append(INIT, binding)
            return log

    return world.broadcast_from_main(begin), model, tokenizer


def _check_is_new(folder: Path) -> None:
    if (folder / LOG).exists():
        raise LedgerError(f"`{folder}` holds a ledger already. Choose another folder.")
