"""The editor that `ConceptEditor.from_hparams` gives for LocFT-BF."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from ..hparams import LocFTBFHyperParams
from ..modeling.devices import input_device
from ..modeling.loading import load_model
from .editor import apply_locft_bf_to_model

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class ConceptMethods(_Base):
    """EasyEdit's concept editing with LocFT-BF: each edit is made alone, and taken back.

    What is measured, and how, is EasyEdit's; any causal language model is loaded.
    """

    def __init__(self, hparams: LocFTBFHyperParams) -> None:
        hparams.check()
        self.hparams = copy(hparams)  # EasyEdit sets its `batch_size` to 1
        self.alg_name = hparams.alg_name
        self.apply_algo = apply_locft_bf_to_model
        self.model, self.tok = load_model(hparams)
        self.model_name = str(hparams.model_name)
        self.device = input_device(self.model)
        self.hparams.device = str(self.device)

    def edit(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any, Any]:
        """Edits and measures as EasyEdit's does; each entry says the method."""
        metrics, model, former = super().edit(*args, **kwargs)
        for entry in metrics:
            entry["alg_name"] = self.hparams.alg_name
        return metrics, model, former
