"""Our own methods in a comparison: LocFT-BF and LocFT-BF+, and each of them in a ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..easyedit.peers.yamls import known_method
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import ALG_NAMES
from ..hparams_spellings import known_alg_name
from ..ledger.ledger import Ledger

IN_LEDGER = "@ledger"
OURS = (*ALG_NAMES, *(f"{name}{IN_LEDGER}" for name in ALG_NAMES))


def known_name(method: Any) -> Any:
    """Returns the name that a method has in a comparison, whatever its case."""
    plain = known_alg_name(str(method).lower().removesuffix(IN_LEDGER))
    if plain in ALG_NAMES:
        return f"{plain}{IN_LEDGER}" if str(method).lower().endswith(IN_LEDGER) else plain
    return known_method(method)


def own_hparams(method: str, hparams: LocFTBFHyperParams) -> dict[str, Any]:
    """Returns the hyper-parameters that one of `OURS` is run with, by name."""
    return hparams.to_dict() | {"alg_name": method.removesuffix(IN_LEDGER)}


class LedgerEditor:
    """Edits that are facts of a ledger: each call of `edit_` is a commit of it.

    Args:
        folder: A folder of its own, which holds nothing yet.
        model: The base model; edits change it in place.
        tokenizer: Its tokenizer.
        hparams: The hyper-parameters.

    Attributes:
        lost: How many facts did not hold after the last commit, by the ledger's own check.
        nothing_changed: Whether no commit has changed a weight: a ledger's always does.
    """

    nothing_changed = False

    def __init__(
        self,
        folder: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hparams: LocFTBFHyperParams,
    ) -> None:
        self._ledger = Ledger.init(folder, hparams, model, tokenizer)
        self.lost = 0

    def edit_(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Adds the requests to the ledger."""
        self.lost = len(self._ledger.add(requests).lost)
