"""Hashes of tensors, JSON values and models: of every bit, or of a sample of the numbers.

Every bit counts where something computed from them is taken up again: the matrices of an edit
(`tensor_sha256`) and what recorded hidden states depend on (`checksum`, computed where the tensor
lies). A sample of each tensor (`sample_digest`) tells another model without reading all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import ModelError

# The numbers that an edit may hold, under safetensors' names.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SAMPLE_LENGTH = 16
_SAMPLED_NUMBERS = 1024
_CHUNK = 2**24  # numbers hashed at a time
_CHECKSUM_CHUNK = 2**22  # numbers summed at a time
_FINGERPRINT_LENGTH = 10
# Numbers that are read from each parameter to tell models apart.
_FINGERPRINT_NUMBERS = 64
# Keys of a configuration that say where the model came from or how it runs, not what it computes.
_NOT_COMPUTED = frozenset(
    ["transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "name_or_path"]
)
_KEPT = "_locft_sample"  # on a frozen parameter of which a share alone is on this rank


def dtype_name(dtype: torch.dtype) -> str:
    """Returns `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def json_sha256(value: Any) -> str:
    """Returns the sha256 of a value's JSON text, whatever the order of its keys.

    What JSON does not have counts by its `str`. A list is hashed entry by entry: the text of
    100,000 requests would be hundreds of MiB.
    """
    if not isinstance(value, list):
        return hashlib.sha256(_canonical(value)).hexdigest()
    sha = hashlib.sha256(b"[")
    for i, entry in enumerate(value):
        sha.update((b"," if i else b"") + _canonical(entry))
    sha.update(b"]")
    return sha.hexdigest()


def arrays_sha256(*arrays: np.ndarray) -> str:
    """Returns the sha256 of the dtype, shape and bytes of some arrays, such as a text's tokens."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(_canonical([str(array.dtype), array.shape]))
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Returns the sha256 of a tensor's dtype, shape and bytes, read in parts where it lies."""
    return parts_sha256(dtype_name(tensor.dtype), tensor.shape, _bytes_of(tensor.detach()))


def parts_sha256(dtype: str, shape: Sequence[int], parts: Iterable[Any]) -> str:
    """Returns what `tensor_sha256` gives for a tensor of these bytes, little-endian, in order."""
    sha = hashlib.sha256(_canonical([dtype, list(shape)]))
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def checksum(tensor: torch.Tensor) -> int:
    """Returns a number that changes with any bit of `tensor`, computed on its device."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()  # a view of other numbers begins at a multiple of their size
    unit = torch.int32 if len(flat) % 4 == 0 else torch.uint8
    numbers = flat.view(unit)
    factors = torch.arange(1, min(_CHECKSUM_CHUNK, len(numbers)) + 1, device=tensor.device)
    total = 0
    for start in range(0, len(numbers), _CHECKSUM_CHUNK):
        part = numbers[start : start + _CHECKSUM_CHUNK].long()
        # Sums wrap around; a single changed bit still changes them.
        total = (total * 31 + int((part * factors[: len(part)]).sum())) % 2**61
    return total


def sample_digest(tensor: torch.Tensor) -> str:
    """Returns a short sha256 of a tensor's dtype, shape and 1,024 evenly strided numbers."""
    return digest_of_sample(sample_numbers(tensor), tensor.shape)


def digest_of_sample(numbers: torch.Tensor, shape: Sequence[int]) -> str:
    """Returns what `sample_digest` gives for a tensor of this shape and sample, [N]."""
    data = numbers.contiguous().view(torch.uint8).numpy().data
    return parts_sha256(dtype_name(numbers.dtype), shape, [data])[:SAMPLE_LENGTH]


def sample_positions(n_numbers: int) -> np.ndarray:
    """Returns the positions of the numbers that a sample takes in a flat tensor, [N]."""
    n = min(_SAMPLED_NUMBERS, n_numbers)
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


def configuration(model: Any) -> dict[str, Any]:
    """Returns the keys of a model's configuration that have a part in what it computes."""
    return {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith("_") and key not in _NOT_COMPUTED
    }


def model_fingerprint(model: Any) -> str:
    """Returns a short hash that changes with the model's configuration or weights.

    Of every parameter some numbers spread over it are read, not all: an edit of one matrix shows,
    a change of single numbers may not. Files that users keep from one run to the next, such as key
    covariances, are named after it: the hash of a model stays what it is.

    Raises:
        ModelError: The weights are not loaded.
    """
    sha = hashlib.sha256(json.dumps(configuration(model), sort_keys=True, default=str).encode())
    loaded = 0
    for name, parameter in model.named_parameters():
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:  # kept on disk, or not loaded
            continue
        loaded += 1
        flat = parameter.detach().reshape(-1)
        # An odd step, so that the numbers are not all of one column.
        step = flat.numel() // _FINGERPRINT_NUMBERS | 1
        sha.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().data)
    if not loaded:
        raise ModelError("The model's weights are not loaded (meta device). Load them first.")
    return sha.hexdigest()[:_FINGERPRINT_LENGTH]


def readable(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is here, as plain floating-point numbers."""
    plain = tensor.dtype in DTYPES.values() or tensor.dtype == torch.float64
    return plain and not tensor.is_meta and not hasattr(tensor, "quant_state")


def _canonical(value: Any) -> bytes:
    """Returns the one JSON text of a value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


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
