"""How long the phases of a session take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def timed(timings: dict[str, float], phase: str, model: nn.Module) -> Iterator[None]:
    """Context manager around a phase: its seconds are put into `timings`, unless it fails.

    Of a phase that has been there already the later time stays. The model's devices are waited for.
    """
    start, before = time.perf_counter(), sum(timings.values())
    yield
    for device in {parameter.device for parameter in model.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once a phase: launched work belongs to the phase
    # A phase within this one counts by itself.
    within = sum(timings.values()) - before
    timings[phase] = time.perf_counter() - start - within


class Stopwatch:
    """Collects the seconds of named phases; a phase ends where the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Counts the time since the last lap to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
