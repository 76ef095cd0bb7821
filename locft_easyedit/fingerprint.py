"""Whether two runs have the same frozen model, texts and settings: one short text tells."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from .cut import Cut
from .tokens import TokenizedTexts

_CHUNK = 2**22  # numbers summed at a time


def prefix_fingerprint(
    model: Any,
    cut: Cut,
    trained: Iterable[str],
    texts: TokenizedTexts,
    packed: bool,
    weights_of: Callable[[nn.Module], Any] | None = None,
) -> str:
    """Returns a hash of everything that recorded hidden states depend on.

    Every bit of the frozen weights counts. Of weights that were left on disk, the file counts by
    its name, size and time of change.

    Args:
        model: The model.
        cut: Where the states are taken.
        trained: Names of the trained parameters, on which they do not depend.
        texts: What is run.
        packed: Whether rows are packed: it moves states by rounding.
        weights_of: Gives accelerate's map of a module's weights on disk, if some were left there.
    """
    skipped = tuple(
        f"{cut.stack.path}.{i}." for i in range(cut.first_layer + 1, len(cut.stack.layers))
    )
    digest = hashlib.sha256()
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    settings = [
        config,
        cut.kind,
        cut.first_layer,
        packed,
        str(model.dtype),
        transformers.__version__,
        torch.__version__,
    ]
    if cut.fold is not None:
        settings.append(cut.fold.digest)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for array in (texts.ids, texts.offsets):
        digest.update(np.ascontiguousarray(array).tobytes())
    left_out = set(trained)
    for name, parameter in model.named_parameters():
        if name not in left_out and not name.startswith(skipped):
            described = [name, list(parameter.shape), _content(model, name, parameter, weights_of)]
            digest.update(json.dumps(described).encode())
    return digest.hexdigest()


def _content(
    model: nn.Module,
    name: str,
    parameter: torch.Tensor,
    weights_of: Callable[[nn.Module], Any] | None,
) -> Any:
    if weights_of is None or not parameter.is_meta:
        return checksum(parameter)
    owner, _, own_name = name.rpartition(".")
    weights = weights_of(model.get_submodule(owner))
    info = weights.dataset.index[weights.prefix + own_name]
    path = info.get("safetensors_file")
    made_anew = path is None or os.path.dirname(path) == str(weights.dataset.save_folder)
    if made_anew:  # while the model was loaded: its saved form is another one
        return checksum(weights[own_name])
    status = os.stat(path)
    return [os.path.basename(path), status.st_size, status.st_mtime_ns]


def checksum(tensor: torch.Tensor) -> int:
    """Returns a number that changes with any bit of `tensor`, computed where it lies."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()  # a view of other numbers begins at a multiple of their size
    unit = torch.int32 if len(flat) % 4 == 0 else torch.uint8
    numbers = flat.view(unit)
    factors = torch.arange(1, min(_CHUNK, len(numbers)) + 1, device=tensor.device)
    total = 0
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start : start + _CHUNK].long()
        # Sums wrap around; a single changed bit still changes them.
        total = (total * 31 + int((part * factors[: len(part)]).sum())) % 2**61
    return total
