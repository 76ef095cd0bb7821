"""An evaluation whose records are measured by several processes, a share each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RequestError
from ..sharding import lockstep
from ..world import World
from .choices import HowToRun
from .compact import CompactRecords
from .evaluation import DEFAULT_METRICS, Evaluation
from .questions import Metrics, Questions


class SharedEvaluation:
    """An `Evaluation` of which every process of a world measures its share of the records.

    All processes get all metrics. With one process it is the evaluation itself.

    Args:
        world: The processes; each makes one of these, of the same records.
        model: As for `Evaluation`.
        tokenizer: As for `Evaluation`.
        records: All records.
        how: How this process runs its prompts.
        metrics: As for `Evaluation`.

    Raises:
        LocFTError: As for `Evaluation`, on all processes.
    """

    def __init__(
        self,
        world: World,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Mapping[str, Any]],
        how: HowToRun,
        *,
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> None:
        self.world = world
        self._model = model
        self.records = records
        if not world.several:
            self._own = np.arange(len(records))
            self._evaluation = Evaluation(model, tokenizer, records, how, metrics=metrics)
            return
        with world.together(), lockstep(model):
            self._own = world.share(np.diff(Questions(records).first_prompt))
            own = self._own.tolist()
            mine = [records[i] for i in own]
            try:
                self._evaluation = Evaluation(
                    model, tokenizer, mine, how, metrics=metrics, numbers=own
                )
            except RequestError:
                # Once more with all records: the message has their numbers, not those of a share.
                Evaluation(model, tokenizer, records, how, metrics=metrics)
                raise

    def measure(self, when: str = "") -> CompactRecords:
        """Returns each record's metrics, in the records' order; see `Evaluation.stream`.

        Args:
            when: Goes into the labels of the progress bars.
        """
        with self.world.together(), lockstep(self._model):
            found = CompactRecords(self._evaluation.stream(when))
        if not self.world.several:
            return found
        return CompactRecords(_in_order(self.world.gather((self._own, found))))


def _in_order(shares: Sequence[tuple[np.ndarray, CompactRecords]]) -> Iterator[Metrics]:
    """Yields the records of all shares, each an ascending list of numbers, in their order."""
    numbers = np.concatenate([own for own, _ in shares])
    owner = np.repeat(np.arange(len(shares)), [len(own) for own, _ in shares])
    remaining = [iter(found) for _, found in shares]
    for rank in owner[np.argsort(numbers)]:
        yield next(remaining[rank])
