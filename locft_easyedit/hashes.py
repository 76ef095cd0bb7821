"""Hashes that name a matrix exactly, or tell two models apart by a few of its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .errors import ModelError

# The numbers that an edit may hold, under safetensors' names.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
N_SAMPLES = 1024
SAMPLE_LENGTH = 16
_CHUNK = 2**24  # numbers hashed at a time
_FINGERPRINT_LENGTH = 10
# Numbers that are read from each parameter to tell models apart.
_FINGERPRINT_NUMBERS = 64
# Keys of a configuration that say where the model came from or how it runs, not what it computes.
_NOT_COMPUTED = frozenset(
    ["transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "name_or_path"]
)
_KEPT = "_locft_sample"  # on a frozen parameter of which a share alone is here


def dtype_name(dtype: torch.dtype) -> str:
    """Returns `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def canonical(value: Any) -> bytes:
    """Returns the one JSON text of a value, whatever the order of its keys."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def hash_of(value: Any) -> str:
    """Returns the sha256 of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest(tensor: torch.Tensor) -> str:
    """Returns the sha256 of a tensor's dtype, shape and bytes, in parts, where it lies."""
    return digest_of_bytes(dtype_name(tensor.dtype), tensor.shape, _bytes_of(tensor.detach()))


def digest_of_bytes(dtype: str, shape: Sequence[int], parts: Iterable[Any]) -> str:
    """Returns what `digest` gives for a tensor of these bytes.

    Args:
        dtype: `float32`, `bfloat16`, ...
        shape: Its shape.
        parts: Its bytes in order, little-endian.
    """
    sha = _begun(dtype, shape)
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def sample_positions(n_numbers: int) -> np.ndarray:
    """Returns the places of the numbers that a sample takes, evenly strided, in a flat tensor."""
    n = min(N_SAMPLES, n_numbers)
    return np.arange(n, dtype=np.int64) * n_numbers // max(n, 1)


def sample_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the numbers of a tensor that a sample takes, on the host, [N]."""
    kept: torch.Tensor | None = getattr(tensor, _KEPT, None)
    if kept is not None:
        return kept
    tensor = tensor.detach()
    positions = sample_positions(tensor.numel())
    if tensor.is_contiguous():
        return tensor.view(-1)[torch.from_numpy(positions).to(tensor.device)].cpu()
    # Indices of each dimension: a flat view of what is not contiguous would copy all of it.
    places = np.unravel_index(positions, tuple(tensor.shape))
    return tensor[tuple(torch.from_numpy(i).to(tensor.device) for i in places)].cpu()


def keep_sample(tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Returns what lets another tensor, a share of this one, have this one's sample."""
    numbers = sample_numbers(tensor)
    return lambda share: setattr(share, _KEPT, numbers)


def sample_digest(numbers: torch.Tensor, shape: Sequence[int]) -> str:
    """Returns a short sha256 of sampled numbers, [N], and of their tensor's dtype and shape."""
    sha = _begun(dtype_name(numbers.dtype), shape)
    sha.update(numbers.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:SAMPLE_LENGTH]


def model_fingerprint(model: Any) -> str:
    """Returns a short hash that changes with the model's configuration or weights.

    Of every parameter some numbers spread over it are read, not all: an edit of one matrix shows,
    a change of single numbers may not.

    Raises:
        ModelError: The weights are not loaded.
    """
    sha = hashlib.sha256()
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key not in _NOT_COMPUTED
    }
    sha.update(json.dumps(config, sort_keys=True, default=str).encode())
    loaded = 0
    for name, parameter in model.named_parameters():
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:  # kept on disk, or not loaded
            continue
        loaded += 1
        flat = parameter.detach().reshape(-1)
        # An odd step, so that the numbers are not all of one column.
        step = flat.numel() // _FINGERPRINT_NUMBERS | 1
        sha.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if not loaded:
        raise ModelError("The model's weights are not loaded (meta device). Load them first.")
    return sha.hexdigest()[:_FINGERPRINT_LENGTH]


def readable(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is here, as plain floating-point numbers."""
    plain = tensor.dtype in DTYPES.values() or tensor.dtype == torch.float64
    return plain and not tensor.is_meta and not hasattr(tensor, "quant_state")


def _begun(dtype: str, shape: Sequence[int]) -> Any:
    return hashlib.sha256(canonical([dtype, list(shape)]))


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes on the host, a limited number at a time."""
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        for part in tensor.view(-1).split(_CHUNK):
            yield part.cpu().view(torch.uint8).numpy().data
        return
    for row in tensor:
        yield from _bytes_of(row if row.dim() else row.reshape(1))
