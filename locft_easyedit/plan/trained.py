"""Memory of what is trained: the matrices themselves, LoRA of them, or a confined change."""

from __future__ import annotations

from .confined import ConfinedShapes
from .given import Workload
from .layout import Setting
from .lora import LoraShapes
from .part import AFTER, LATER, Part
from .shapes import ModelShapes


def training_parts(
    shapes: ModelShapes, setting: Setting, work: Workload, device: str
) -> list[Part]:
    """Returns what training adds to the model.

    Args:
        shapes: The model's sizes.
        setting: The choice.
        work: The work.
        device: `gpu` or `host`.
    """
    n = sum(shapes.trained.values())
    if shapes.lora is not None:
        return _lora_parts(shapes.lora, n, setting, work, device)
    if shapes.confined is not None:
        return _confined_parts(shapes, shapes.confined, setting, work, device)
    return _trained_parts(n, setting.itemsize, device)


def _trained_parts(n: int, size: int, device: str) -> list[Part]:
    """Returns what training `n` parameters adds to their values in the model."""
    train = ("train",)
    parts = [
        Part("Adam's moments", device, 8 * n, train),
        Part("gradients", device, size * n, train),
        Part("original values", device, size * n, AFTER),
    ]
    if size < 4:  # in float32 a parameter is its own master, and its gradient is in float32
        parts[:0] = [
            Part("float32 masters", device, 4 * n, train),
            Part("float32 gradients", device, 4 * n, train),
        ]
    return parts


def _lora_parts(
    lora: LoraShapes, n: int, setting: Setting, work: Workload, device: str
) -> list[Part]:
    """Returns what LoRA of `n` parameters adds; A and B are in float32 in every case."""
    train, m, size = ("train",), lora.trained, setting.itemsize
    parts = [
        Part("LoRA's matrices", device, 4 * m, train),
        Part("their values at the beginning", device, 4 * m, train),
        Part("Adam's moments", device, 8 * m, train),
        Part("gradients", device, 4 * m, train),
        Part("original values", device, size * n, AFTER),
    ]
    if setting.dtype == "float16":  # whose loss is scaled: gradients and masters are apart
        parts += [
            Part("float32 masters", device, 4 * m, train),
            Part("float32 gradients", device, 4 * m, train),
        ]
    if size < 4:
        inputs = 4 * work.step_cells(setting.micro_batch_size) * lora.inputs
        parts += [
            Part("LoRA's inputs in float32", device, inputs, train),
            # When the last step's tensors are gone.
            Part("a matrix in float32, to add LoRA to", device, 4 * lora.largest, ("evaluate",)),
        ]
    return parts


def _confined_parts(
    shapes: ModelShapes, confined: ConfinedShapes, setting: Setting, work: Workload, device: str
) -> list[Part]:
    """Returns what training a confined change adds to it."""
    train, size, n = ("train",), setting.itemsize, sum(confined.sizes.values())
    inputs = sum(confined.inputs.values())
    if shapes.folds(setting.cut):  # what is recorded of the first one has passed its filter
        inputs -= shapes.cuts["matrix"] - shapes.hidden
    filtered = size * work.step_cells(setting.micro_batch_size) * inputs
    parts = [
        Part("Adam's moments", device, 8 * n, train),
        Part("gradients", device, size * n, train),
        Part("inputs that the filters have passed", device, filtered, train),
    ]
    if size < 4:
        name = "a matrix in float32, to add the change to"
        parts += [
            Part("float32 gradients", device, 4 * n, train),
            # When the last step's tensors are gone.
            Part(name, device, 4 * max(confined.sizes.values()), ("evaluate",)),
        ]
    return parts


def change_parts(shapes: ModelShapes, setting: Setting, device: str) -> list[Part]:
    """Returns what a confined change takes from its making, before the prefix, to the end."""
    if shapes.confined is None:
        return []
    size, n = setting.itemsize, sum(shapes.trained.values())
    squares = shapes.confined.squares
    sizes = {
        "filters of inputs": 4 * squares,
        "the change's matrices": size * n,
        "their values at the beginning": size * n,
        "original values": size * n,
    }
    if size < 4:  # in float32 the filter is what runs, and a matrix its own master
        sizes["filters as they run"] = size * squares
        sizes["float32 masters"] = 4 * n
    return [Part(name, device, taken, LATER) for name, taken in sizes.items()]
