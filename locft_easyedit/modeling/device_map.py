"""A model over several GPUs of a machine, one after another, by accelerate's `device_map`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from torch import nn

from ..distributed.world import get_world, share_of_gpus
from ..errors import HyperParamsError, ModelError
from ..hparams import LocFTBFHyperParams
from ..utils.memory import free_memory
from .places import find_layers, first_layer_of, match_parameters

logger = logging.getLogger(__name__)

USABLE = 0.9  # of the memory that is free: the rest is for what runs

DeviceMap = dict[str, int | str]


def devices_of(
    model_parallel: bool,
    asked: int | str | None,
    device: torch.device,
    gpus: Sequence[int] | None = None,
) -> tuple[torch.device, list[int]]:
    """Returns where a model goes that stays in one place, and the GPUs it is spread over, if any.

    Args:
        model_parallel: EasyEdit's key.
        asked: EasyEdit's key `device`.
        device: What that means.
        gpus: The GPUs that this process may use; `None` for its share of those that are visible.

    Raises:
        HyperParamsError: GPUs are asked for, and the CPU as well.
    """
    if not model_parallel:
        return device, []
    if device.type == "cpu" and asked not in (None, ""):
        raise HyperParamsError(
            f"`model_parallel=true` spreads the model over GPUs, and `device={asked!r}` asks for "
            "none. Leave one of them out."
        )
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    world = get_world()
    own = share_of_gpus(n_gpus, world.local_rank, world.local_size)
    usable = own if gpus is None else list(gpus)
    if len(usable) < 2:
        device = torch.device("cuda", usable[0]) if usable else device
        logger.info("`model_parallel=true` finds no two GPUs: the whole model is on %s.", device)
        return device, []
    # All of EasyEdit's files say `device: 0` beside it.
    if device.index:
        logger.warning(
            "`device=%s` says nothing beside `model_parallel=true`: the model is spread over the "
            "GPUs %s. CUDA_VISIBLE_DEVICES chooses among them.",
            asked,
            ", ".join(map(str, usable)),
        )
    return device, usable


def room_on(gpus: Collection[int]) -> dict[int, int]:
    """Returns how many bytes of weights may go to each GPU: none to those that are not named."""
    everywhere = range(max(torch.cuda.device_count(), *(gpu + 1 for gpu in gpus)))
    return {
        gpu: int(USABLE * free_memory(torch.device("cuda", gpu))) if gpu in gpus else 0
        for gpu in everywhere
    }


def spread_map(
    skeleton: Any, dtype: torch.dtype, room: Mapping[int, int], on_disk: Collection[str] = ()
) -> DeviceMap | None:
    """Returns a device map that shares a model's layers out evenly; `None` if they do not fit.

    Args:
        skeleton: The model without weights.
        dtype: The precision to load it in.
        room: As `room_on` gives it.
        on_disk: Paths of modules that are not resident.
    """
    blocks = getattr(skeleton, "_no_split_modules", None)
    # A layer that a residual stream goes around cannot be divided.
    whole = {"no_split_module_classes": list(blocks) if blocks else None, "dtype": dtype}
    with ExitStack() as undo:
        for path in on_disk:
            parent, _, name = path.rpartition(".")
            owner = skeleton.get_submodule(parent)
            undo.callback(owner._modules.__setitem__, name, owner._modules[name])
            owner._modules[name] = nn.Identity()
        balanced = get_balanced_memory(skeleton, max_memory=dict(room), **whole)
        allowed = {gpu: n_bytes for gpu, n_bytes in balanced.items() if isinstance(gpu, int)}
        places = infer_auto_device_map(skeleton, max_memory=allowed, **whole)
    if "disk" in places.values():
        return None
    first = min(place for place in places.values() if isinstance(place, int))
    found = {path: place for path, place in places.items() if path not in on_disk}
    return full_map(skeleton, found | dict.fromkeys(on_disk, "disk"), first)


def full_map(skeleton: Any, places: Mapping[str, int | str], default: int | str) -> DeviceMap:
    """Returns an entry for every module or parameter, as few as can be.

    Args:
        skeleton: The model without weights.
        places: Where some modules go; one within another counts for itself.
        default: Where all others go, and what has no weights: all layers read it.
    """
    found: DeviceMap = {}

    def visit(module: Any, path: str, place: int | str) -> None:
        if path in places:
            place = places[path]
        inside = f"{path}." if path else ""
        if path and not any(name.startswith(inside) for name in places):
            empty = place != "disk" and not any(True for _ in module.parameters())
            found[path] = default if empty else place
            return
        for name, _ in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            found[inside + name] = places.get(inside + name, place)
        for name, child in module.named_children():
            visit(child, inside + name, place)

    visit(skeleton, "", default)
    return found


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

    Arguments are as for `spread_map`; `gpus` are the GPUs' numbers.

    Raises:
        ModelError: The rest does not fit the GPUs.
    """
    room = room_on(gpus)
    places = spread_map(skeleton, dtype, room, on_disk)
    if places is None:
        n_bytes = resident_bytes(skeleton, dtype, on_disk)
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
    return resident_bytes(skeleton, dtype) <= USABLE * free_memory(device)


def resident_bytes(skeleton: Any, dtype: torch.dtype, on_disk: Iterable[str] = ()) -> int:
    """Returns what a model's weights take, but for modules that stay on disk."""
    left = tuple(f"{path}." for path in on_disk)
    names = skeleton.named_parameters()
    return sum(p.numel() * dtype.itemsize for name, p in names if not name.startswith(left))


def left_on_disk(model: Any) -> bool:
    """Returns whether some of a model's weights were left on disk."""
    return any(parameter.is_meta for parameter in model.parameters())
