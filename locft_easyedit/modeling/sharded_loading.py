"""Whether the layers above the place are sharded, and loading them so that none was ever whole.

The checkpoint is opened with these layers left on disk, as those below the place can be. Then one
after another is read, cut into shares, and dropped but for this process's own: what a device holds
at once is its shares and one layer. The processes of a machine read the same file, which its
memory keeps for all of them.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from ..distributed.world import World
from ..errors import ModelError
from ..hparams import LocFTBFHyperParams
from ..utils.memory import free_memory
from ..utils.progress import progress_bar
from .device_map import USABLE, DeviceMap, full_map, resident_bytes, streaming_map
from .fsdp import ShardedLayers, note_sharded
from .parameter_slices import whole_name
from .places import LayerList, find_layers, first_layer_of, match_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharding:
    """Which layers of a model will be sharded.

    Attributes:
        stack: The path of its list of layers.
        layers: Their numbers, ascending.
        whole: Names of parameters in them that are trained: every process keeps these.
        within_machines: The processes of each machine hold all of it; else all processes do.
    """

    stack: str
    layers: tuple[int, ...]
    whole: frozenset[str]
    within_machines: bool


def places(
    skeleton: Any | None, hparams: LocFTBFHyperParams, device: torch.device, world: World
) -> tuple[DeviceMap | None, Sharding | None]:
    """Returns the device map that a model is loaded with, and what is sharded then.

    All processes decide alike, though the memory that is free differs.

    Args:
        skeleton: The model without weights; `None` if it cannot be built.
        hparams: The hyper-parameters; `stream_frozen` and `shard_frozen` decide, or what fits.
        device: Where this process computes.
        world: The processes.

    Raises:
        ModelError: What is asked for does not suit this model, place or number of processes.
    """
    device_map = streaming_map(skeleton, hparams, device)
    if not world.is_distributed:
        if hparams.shard_frozen:
            raise ModelError(
                "`shard_frozen=true` needs several processes, and this one is alone. Start them "
                "with `accelerate launch` or `torchrun`, or leave it out."
            )
        return device_map, None
    [somebody_streams] = world.all_max([device_map is not None])
    if somebody_streams and device_map is None:
        device_map = streaming_map(skeleton, replace(hparams, stream_frozen=True), device)
    sharding = _sharding(skeleton, hparams, device, world, device_map)
    if sharding is None:
        return device_map, None
    assert skeleton is not None
    on_disk = _on_disk(device_map) + [f"{sharding.stack}.{i}" for i in sharding.layers]
    return full_map(skeleton, dict.fromkeys(on_disk, "disk"), str(device)), sharding


def _sharding(
    skeleton: Any | None,
    hparams: LocFTBFHyperParams,
    device: torch.device,
    world: World,
    device_map: DeviceMap | None,
) -> Sharding | None:
    """Returns what to shard; `None` if every process can hold what it needs, or must."""
    by_itself = hparams.shard_frozen is None
    elsewhere = hparams.model_parallel or hparams.quantize_frozen
    if hparams.shard_frozen is False or (by_itself and (elsewhere or hparams.chooses)):
        return None
    stack = None if skeleton is None else find_layers(skeleton)
    trained = (
        [] if skeleton is None else match_parameters(skeleton, hparams.layers, hparams.templates)
    )
    first = first_layer_of(trained, stack)
    problem = ""
    if stack is None or first is None:
        problem = "no list of layers was found in it, or the place lies outside"
    elif _shares_parameters(skeleton, stack, first):
        problem = "a layer above the place shares parameters with another one"
    if problem:
        if by_itself:
            return None
        raise ModelError(
            f"`shard_frozen=true` does not suit this model and place: {problem}. Leave it out."
        )
    assert stack is not None
    assert first is not None
    whole = frozenset(map(whole_name, trained))
    layers = tuple(i for i in range(first + 1, len(stack.layers)) if _frozen(stack, i, whole))
    resident = resident_bytes(skeleton, hparams.dtype_on(device), _on_disk(device_map))
    shared = sum(
        parameter.numel() * hparams.dtype_on(device).itemsize
        for i in layers
        for parameter in _frozen(stack, i, whole)
    )
    share_of_machine = resident - shared + shared // world.local_size
    free = USABLE * free_memory(device)
    if device.type != "cuda":
        free /= world.local_size  # they share the machine's memory
    needed, too_much = world.all_max([by_itself and resident > free, share_of_machine > free])
    if not layers or (by_itself and not needed):
        return None
    logger.info(
        "%d frozen layers above the place are sharded over the processes (`shard_frozen`).",
        len(layers),
    )
    return Sharding(stack.path, layers, whole, within_machines=not too_much)


def _frozen(stack: LayerList, number: int, trained: frozenset[str]) -> list[nn.Parameter]:
    """Returns the parameters of a layer that are not trained."""
    prefix = f"{stack.path}.{number}."
    return [
        parameter
        for name, parameter in stack.layers[number].named_parameters()
        if prefix + name not in trained
    ]


def _shares_parameters(skeleton: Any, stack: LayerList, first: int) -> bool:
    """Returns whether a parameter above the place has another name elsewhere."""
    owners: dict[int, set[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        inside = name.startswith(stack.path + ".")
        number = name[len(stack.path) + 1 :].split(".")[0] if inside else ""
        owners.setdefault(id(parameter), set()).add(number)
    above = {str(i) for i in range(first + 1, len(stack.layers))}
    return any(len(found) > 1 and found & above for found in owners.values())


def _on_disk(device_map: DeviceMap | None) -> list[str]:
    return [name for name, place in (device_map or {}).items() if place == "disk"]


def shard_(model: Any, sharding: Sharding, device: torch.device, world: World) -> None:
    """Reads the layers that were left on disk to be sharded, one after another; collective.

    The model was loaded with the device map of `places`, which gives `sharding` as well; `device`
    is where this process computes.
    """
    if device.type == "cuda":
        # FSDP2 compares devices, and takes the current one for its own.
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    stack = find_layers(model)
    assert stack is not None
    mesh = _mesh(sharding, device, world)
    sharded = ShardedLayers(len(sharding.layers), world, mesh)
    for number in progress_bar(
        sharding.layers, desc="sharding", unit="layer", show=world.is_main_process
    ):
        layer = stack.layers[number]
        _read_(layer, device)
        prefix = f"{stack.path}.{number}."
        sharded.add_(
            layer,
            whole={p for name, p in layer.named_parameters() if prefix + name in sharding.whole},
        )
    note_sharded(model, sharded)


def _read_(layer: nn.Module, device: torch.device) -> None:
    """Reads a layer's weights to the device, for good: accelerate's hooks would at every pass."""
    for part in layer.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is None:
            continue
        remove_hook_from_module(part)
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                value = hook.weights_map[name]
                # A copy, and not the map of a whole file that each weight comes in.
                value = value.clone() if device.type == "cpu" else value.to(device)
                part._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=False)
        for name, buffer in part.named_buffers(recurse=False):
            if not buffer.is_meta:
                part._buffers[name] = buffer.to(device)


def _mesh(sharding: Sharding, device: torch.device, world: World) -> Any:
    """Returns the device mesh of the processes that hold one copy together."""
    from torch.distributed.device_mesh import init_device_mesh

    n_machines = world.size // world.local_size
    machine = int(os.environ.get("GROUP_RANK", world.rank // world.local_size))
    # Gathering within a machine is many times faster.
    in_order = world.rank == machine * world.local_size + world.local_rank
    even = in_order and world.size == n_machines * world.local_size
    found = world.all_gather((even, world.local_size))
    alike = all(found_even and size == world.local_size for found_even, size in found)
    if sharding.within_machines and n_machines > 1 and alike:
        shape = (n_machines, world.local_size)
        return init_device_mesh(device.type, shape, mesh_dim_names=("machine", "share"))["share"]
    return init_device_mesh(device.type, (world.size,))
