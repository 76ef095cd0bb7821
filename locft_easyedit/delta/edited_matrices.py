"""What an edit consists of: the new matrices, the ones they replaced, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .metadata import DTYPES

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class EditedMatrices:
    """The tensors of an edit and its metadata; `Delta` is what is done with them.

    Attributes:
        new: The edited matrices by the names of the model's parameters.
        original: The values that they replaced; empty where these were left out.
        metadata: What the file says of them: `id`, `base_model` (for display), `matrices` (dtype,
            shape and hashes of each), `frozen` (a sample's hash of every other parameter),
            `requests`, `hparams`, `metrics`, `losses`, `versions`, `created`, `lora`.
        lora: For an edit that was trained as LoRA, the factors A, [R, in], and B, [out, R], of each
            matrix; its change is B A alpha / R.
    """

    new: dict[str, torch.Tensor]
    original: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    lora: dict[str, Factors] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The edit's name: a sha256 over all hashes."""
        return str(self.metadata["id"])

    @property
    def short_id(self) -> str:
        """The beginning of the id, for people."""
        return self.id[:12]

    @property
    def matrices(self) -> dict[str, Any]:
        """Of each matrix its `dtype`, `shape` and the hashes `new` and `original`."""
        return dict(self.metadata["matrices"])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the model that was edited, as its first matrix has it."""
        return DTYPES[next(iter(self.metadata["matrices"].values()))["dtype"]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors by the names that they have in a file."""
        tensors = self.new | {f"original.{name}": value for name, value in self.original.items()}
        for name, (a, b) in self.lora.items():
            tensors |= {f"lora_A.{name}": a, f"lora_B.{name}": b}
        return tensors
