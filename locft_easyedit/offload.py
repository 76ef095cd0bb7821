"""Which of a model's weights stay on disk, when it does not fit the device."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from typing import Any

import torch

from .errors import ModelError
from .hparams import LocFTBFHyperParams
from .place import find_layers, first_layer_of, match_parameters
from .store import free_host_memory

logger = logging.getLogger(__name__)


def streaming_map(
    skeleton: Any | None, hparams: LocFTBFHyperParams, device: torch.device
) -> dict[str, str] | None:
    """Returns a device map that leaves the frozen layers on disk; `None` if all is resident.

    Args:
        skeleton: The model without weights; `None` if it cannot be built.
        hparams: The hyper-parameters; `stream_frozen` decides, or whether the model fits.
        device: Where the rest goes.

    Raises:
        ModelError: `stream_frozen` is asked for and the model cannot be split.
    """
    elsewhere = hparams.model_parallel or hparams.quantize_frozen is not None
    if hparams.stream_frozen is False or (hparams.stream_frozen is None and elsewhere):
        return None
    stack = None if skeleton is None else find_layers(skeleton)
    first = None
    if hparams.chooses:
        if skeleton is None or stack is None or _fits(skeleton, hparams.dtype_on(device), device):
            return None
        raise ModelError(
            f"`layers=auto` runs the whole model, and it does not fit the free memory of {device}. "
            "Name the layer (`locft locate` finds it on a larger machine): the frozen layers below "
            "it can be left on disk (`stream_frozen`)."
        )
    if skeleton is not None and stack is not None:
        names = match_parameters(skeleton, hparams.layers, hparams.templates)
        first = first_layer_of(names, stack)
    if first == 0:
        return None  # no layer is frozen
    if hparams.stream_frozen is None:
        if not first or _fits(skeleton, hparams.dtype_on(device), device):
            return None
        logger.warning(
            "The model does not fit the free memory of %s: its %d frozen layers are left on disk "
            "and read once (`stream_frozen`).",
            device,
            first,
        )
    if skeleton is None or stack is None or first is None or hparams.model_parallel:
        raise ModelError(
            "`stream_frozen=true` needs one device (no `model_parallel`) and a place inside the "
            "model's list of layers; this model and place do not give that. Leave it out."
        )
    tied = skeleton.get_input_embeddings().weight is skeleton.get_output_embeddings().weight
    on_disk = {f"{stack.path}.{i}" for i in range(first)}
    if not tied:
        embedding = skeleton.get_input_embeddings()
        on_disk |= {name for name, module in skeleton.named_modules() if module is embedding}
    return device_map_of(skeleton, on_disk, str(device))


def device_map_of(skeleton: Any, on_disk: set[str], device: str) -> dict[str, str]:
    """Returns a device map: an entry for every module or parameter, as few as can be.

    Args:
        skeleton: The model without weights.
        on_disk: Paths of the modules that stay on disk.
        device: Where the rest goes.
    """
    places: dict[str, str] = {}

    def visit(module: Any, path: str) -> None:
        if path in on_disk or (not any(name.startswith(path + ".") for name in on_disk) and path):
            places[path] = "disk" if path in on_disk else device
            return
        for name, _ in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            places[f"{path}.{name}" if path else name] = device
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name)

    visit(skeleton, "")
    return places


def _fits(skeleton: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether the weights take at most nine tenths of the device's free memory."""
    needed = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    return bool(needed <= 0.9 * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a GPU, or on the host."""
    on_gpu = device.type == "cuda"
    return int(torch.cuda.mem_get_info(device)[0] if on_gpu else free_host_memory())


def room_for_conversions(device_map: dict[str, str] | None) -> dict[str, str]:
    """Returns where weights go that are saved in another form than the model has them in."""
    if not device_map:
        return {}
    folder = tempfile.mkdtemp(prefix="locft-weights-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"offload_folder": folder}


def left_on_disk(model: Any) -> bool:
    """Returns whether some of a model's weights were left on disk."""
    return any(parameter.is_meta for parameter in model.parameters())
