"""Which of a model's weights stay on disk, when it does not fit the device or the devices."""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .errors import ModelError
from .hparams import LocFTBFHyperParams
from .place import find_layers, first_layer_of, match_parameters
from .spreading import USABLE, DeviceMap, full_map, room_on, spread_map
from .store import free_host_memory

logger = logging.getLogger(__name__)


def streaming_map(
    skeleton: Any | None,
    hparams: LocFTBFHyperParams,
    device: torch.device,
    gpus: Sequence[int] = (),
) -> DeviceMap | None:
    """Returns a device map that leaves the frozen layers on disk; `None` if all is resident.

    Args:
        skeleton: The model without weights; `None` if it cannot be built.
        hparams: The hyper-parameters; `stream_frozen` decides, or whether the model fits.
        device: Where the rest goes.
        gpus: The GPUs that the rest is spread over instead, if there are several.

    Raises:
        ModelError: `stream_frozen` is asked for and the model cannot be split, or the rest does not
            fit.
    """
    dtype = hparams.dtype_on(device)
    elsewhere = hparams.quantize_frozen is not None
    if hparams.stream_frozen is False or (hparams.stream_frozen is None and elsewhere):
        return None
    stack = None if skeleton is None else find_layers(skeleton)
    first = None
    where = f"GPUs {', '.join(map(str, gpus))}" if gpus else str(device)
    if hparams.chooses:
        if skeleton is None or stack is None or _fits(skeleton, dtype, device, gpus):
            return None
        raise ModelError(
            f"`layers=auto` runs the whole model, and it does not fit the free memory of {where}. "
            "Name the layer (`locft locate` finds it on a larger machine): the frozen layers below "
            "it can be left on disk (`stream_frozen`)."
        )
    if skeleton is not None and stack is not None:
        names = match_parameters(skeleton, hparams.layers, hparams.templates)
        first = first_layer_of(names, stack)
    if first == 0:
        return None  # no layer is frozen
    if hparams.stream_frozen is None:
        if not first or _fits(skeleton, dtype, device, gpus):
            return None
        logger.warning(
            "The model does not fit the free memory of %s: its %d frozen layers are left on disk "
            "and read once (`stream_frozen`).",
            where,
            first,
        )
    if skeleton is None or stack is None or first is None:
        raise ModelError(
            "`stream_frozen=true` needs a place inside the model's list of layers; this model and "
            "place do not give that. Leave it out."
        )
    tied = skeleton.get_input_embeddings().weight is skeleton.get_output_embeddings().weight
    on_disk = [f"{stack.path}.{i}" for i in range(first)]
    if not tied:
        embedding = skeleton.get_input_embeddings()
        on_disk += [name for name, module in skeleton.named_modules() if module is embedding]
    if gpus:
        return resident_map(skeleton, dtype, gpus, on_disk)
    return full_map(skeleton, dict.fromkeys(on_disk, "disk"), str(device))


def resident_map(
    skeleton: Any, dtype: torch.dtype, gpus: Sequence[int], on_disk: Sequence[str] = ()
) -> DeviceMap:
    """Returns a device map that spreads over several GPUs what does not stay on disk.

    Args:
        skeleton: The model without weights.
        dtype: The precision to load it in.
        gpus: The GPUs' numbers.
        on_disk: Paths of the modules that stay there.

    Raises:
        ModelError: The rest does not fit the GPUs.
    """
    room = room_on(gpus)
    places = spread_map(skeleton, dtype, room, on_disk)
    if places is None:
        left = [f"{path}." for path in on_disk]
        n_bytes = dtype.itemsize * sum(
            parameter.numel()
            for name, parameter in skeleton.named_parameters()
            if not name.startswith(tuple(left))
        )
        ways = "choose a later layer" if on_disk else "leave `stream_frozen` out"
        raise ModelError(
            f"`model_parallel=true`: weights of {n_bytes / 2**30:.3g} GiB do not fit the GPUs "
            f"{', '.join(map(str, gpus))}, in layers that stay whole; there is room for "
            f"{sum(room.values()) / 2**30:.3g} GiB. Use more GPUs, {ways}, or set "
            "`quantize_frozen`."
        )
    return places


def _fits(
    skeleton: Any, dtype: torch.dtype, device: torch.device, gpus: Sequence[int] = ()
) -> bool:
    """Returns whether the weights take at most nine tenths of the free memory."""
    if gpus:
        return spread_map(skeleton, dtype, room_on(gpus)) is not None
    needed = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    return bool(needed <= USABLE * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a GPU, or on the host."""
    on_gpu = device.type == "cuda"
    return int(torch.cuda.mem_get_info(device)[0] if on_gpu else free_host_memory())


def room_for_conversions(device_map: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns where weights go that are saved in another form than the model has them in."""
    if not device_map:
        return {}
    folder = tempfile.mkdtemp(prefix="locft-weights-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"offload_folder": folder}


def left_on_disk(model: Any) -> bool:
    """Returns whether some of a model's weights were left on disk."""
    return any(parameter.is_meta for parameter in model.parameters())
