"""Measurements of many records that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from ..errors import RequestError
from ..sharding import lockstep
from ..world import World
from .compact import CompactRecords
from .questions import Metrics, Questions

Records = Sequence[Mapping[str, Any]]


class Measurement(Protocol):
    """What measures records that it was made with: `Evaluation`, `TeacherForced` and the like."""

    def measure(self, description: str, only: Sequence[int] | None = None, /) -> list[Metrics]:
        """Returns each record's metrics; those of `only` if given."""


class SharedMeasurement:
    """A measurement of which every process of a world makes its share.

    All processes get all metrics. With one process it is the measurement itself.

    Args:
        world: The processes; each makes one of these, of the same records.
        model: What is measured.
        records: All records.
        make: Returns the measurement of some of them, given these and their numbers.

    Raises:
        LocFTError: Whatever `make` raises, on all processes.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        records: Records,
        make: Callable[[Records, list[int]], Measurement],
    ) -> None:
        self.world = world
        self._model = model
        if not world.is_distributed:
            self._measurement = make(records, list(range(len(records))))
            return
        with world.sharing_errors(), lockstep(model):
            self._own = world.partition(np.diff(Questions(records).first_prompt))
            own = self._own.tolist()
            try:
                self._measurement = make([records[i] for i in own], own)
            except RequestError:
                # Once more with all records: the message has their numbers, not those of a share.
                make(records, list(range(len(records))))
                raise

    def measure(self, description: str = "", only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns each record's metrics, in the records' order.

        Args:
            description: Label of the progress bars.
            only: Records to measure; all if `None`. Processes do not share a part of the records.
        """
        return list(self.stream(description, only))

    def stream(self, description: str = "", only: Sequence[int] | None = None) -> Iterator[Metrics]:
        """Measures; yields what `measure` returns."""
        stream = getattr(self._measurement, "stream", self._measurement.measure)
        if not self.world.is_distributed:
            yield from stream(description, only)
            return
        assert only is None
        # Of a model that is sharded, whoever is done goes on taking part in the others' passes.
        with self.world.sharing_errors(), lockstep(self._model):
            found = CompactRecords(stream(description))
        yield from _in_order(self.world.all_gather((self._own, found)))


def _in_order(shares: Sequence[tuple[np.ndarray, CompactRecords]]) -> Iterator[Metrics]:
    """Yields the records of all shares, each an ascending list of numbers, in their order."""
    numbers = np.concatenate([own for own, _ in shares])
    owner = np.repeat(np.arange(len(shares)), [len(own) for own, _ in shares])
    remaining = [iter(found) for _, found in shares]
    for rank in owner[np.argsort(numbers)]:
        yield next(remaining[rank])
