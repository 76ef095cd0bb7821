"""What a ledger has measured of its base model to preserve it: the filters, as a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..data.training_texts import TrainingTexts
from ..hparams import LocFTBFHyperParams
from ..training.preserve.filters import OUTPUTS, Filters
from ..training.preserve.sources import Source
from ..utils.files import output_errors, replacing
from ..utils.hashing import arrays_sha256, json_sha256, tensor_sha256

logger = logging.getLogger(__name__)

_SAID = "locft_filters"


@dataclass(frozen=True)
class FiltersFile:
    """Where the filters for some texts are kept.

    Attributes:
        path: The file.
    """

    path: Path

    @classmethod
    def of(
        cls,
        folder: Path,
        texts: TrainingTexts,
        sources: Sequence[Source],
        hparams: LocFTBFHyperParams,
    ) -> FiltersFile:
        """Returns the file for what was measured with these texts.

        Args:
            folder: The ledger's folder: one base model, and one place.
            texts: The first facts.
            sources: What is to be preserved.
            hparams: `preserve_strength`, `seed`.
        """
        own = texts.texts
        key = json_sha256(
            [
                arrays_sha256(own.ids, own.offsets, own.target_start),
                texts.wordings,
                list(texts.subjects),
                [source.digest() for source in sources],
                hparams.preserve_strength,
                hparams.seed,
            ]
        )
        return cls(folder / f"filters-{key[:16]}.safetensors")

    def load(self, parameters: Mapping[str, nn.Parameter]) -> Filters | None:
        """Returns the filters; `None`, with a warning if they are damaged, where there are none.

        Args:
            parameters: The place's, by name.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                said = json.loads(file.metadata()[_SAID])
                of = {name: file.get_tensor(name) for name in parameters}
                kept = {*file.keys()}
                outputs = {
                    name: file.get_tensor(OUTPUTS + name)
                    for name in parameters
                    if OUTPUTS + name in kept
                }
            found = Filters(of, said["summary"], said["digest"], bool(said["damps"]), outputs)
            if _hashes(found.tensors()) != said["sha256"]:
                raise ValueError("its hashes differ")
            return found
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); it is measured again.", self.path, error)
            return None

    def save(self, filters: Filters) -> None:
        """Writes the filters.

        Raises:
            OutputError: They cannot be written.
        """
        tensors = {name: s.detach().cpu().contiguous() for name, s in filters.tensors().items()}
        said = {
            "sha256": _hashes(tensors),
            "summary": filters.summary,
            "digest": filters.digest,
            "damps": filters.damps,
        }
        with output_errors(self.path), replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={_SAID: json.dumps(said, default=str)})


def _hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
