"""What recorded hidden states depend on, as one hash: the frozen weights, the texts, settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import nn

from ..data.tokenization import TokenizedTexts
from ..modeling.parameter_slices import whole_name
from ..utils.hashing import arrays_sha256, checksum, configuration, json_sha256
from .cut import Cut


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
    left_out = set(map(whole_name, trained))  # of fused experts none runs before the cut
    weights = [
        [name, list(parameter.shape), _content(model, name, parameter, weights_of)]
        for name, parameter in model.named_parameters()
        if name not in left_out and not name.startswith(skipped)
    ]
    return json_sha256(
        [
            configuration(model),
            str(model.dtype),
            weights,
            arrays_sha256(texts.ids, texts.offsets),
            [cut.kind, cut.first_layer, None if cut.fold is None else cut.fold.digest, packed],
            [transformers.__version__, torch.__version__],
        ]
    )


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
