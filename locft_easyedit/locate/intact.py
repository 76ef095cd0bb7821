"""Below which layer a model is still what it was: told by a sample of each weight."""

from __future__ import annotations

import hashlib

from torch import nn

from ..hashes import sample_digest
from ..place import LayerList


class Intact:
    """A sample of a model's weights up to some layer, to be compared with those of later.

    An edit of a matrix changes nearly all of its numbers, so that a thousand of them tell it.

    Args:
        model: The model.
        stack: Its layers.
        highest: The layer below which weights are compared.
    """

    def __init__(self, model: nn.Module, stack: LayerList, highest: int) -> None:
        self.model = model
        self.stack = stack
        self.highest = highest
        self._original = self._samples()

    def up_to(self) -> int:
        """Returns the highest layer, `highest` at most, whose input is what it was; -1 if none."""
        pairs = zip(self._original, self._samples(), strict=True)
        changed = (number - 1 for number, (before, now) in enumerate(pairs) if before != now)
        return next(changed, self.highest)

    def _samples(self) -> list[str]:
        """Returns a digest of what lies outside the layers, then one of each layer."""
        inside = f"{self.stack.path}."
        hashes = [hashlib.sha256() for _ in range(1 + self.highest)]
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                continue
            number = 1 + int(name[len(inside) :].split(".")[0]) if name.startswith(inside) else 0
            if number < len(hashes):
                hashes[number].update(f"{name} {sample_digest(parameter)} ".encode())
        return [sha.hexdigest() for sha in hashes]
