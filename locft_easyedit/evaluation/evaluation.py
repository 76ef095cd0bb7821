"""All metrics of a model on the same records: measured once, or before and after an edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import with_subject
from ..distributed.world import World
from ..errors import HyperParamsError, RequestError
from ..modeling.fsdp import lockstep
from .divergence import BeforeEdit
from .fluency import batched_fluency, word_tokenizer
from .generated import Generated, finish_generated_
from .metric_names import DEFAULT_METRICS, check_metrics
from .perplexity import Perplexity
from .predictions import EvalConfig, Measurement
from .prompts import Metrics, Questions
from .records import CompactRecords, LazyRecords
from .teacher_forced import TeacherForced, finish_locality_
from .wrapped import Wrapped

# What choices among places and methods need; `wrapped` multiplies the time.
PLAIN_METRICS = ("accuracy", "generated")

Records = Sequence[Mapping[str, Any]]


class Evaluation(Measurement):
    """Metrics of the same records with the same model, whose weights may change in between.

    Records are checked and tokenized once. With `how.frozen`, the first measurement records what
    the frozen layers make of every prompt, and later ones run only the layers above.

    Args:
        model: A causal language model, edited by whatever method.
        tokenizer: Its tokenizer.
        records: Requests as `make_requests` or `read_requests` return them.
        how: How prompts are run.
        metrics: Any of `accuracy` (EasyEdit's teacher-forced ones, locality and portability),
            `generated` (the paper's), `wrapped` (the same in chat and in other wrappers, which
            multiplies the evaluation's time: see `Wrapped`), `ppl` and `fluency`.
        before: Each record's metrics before the edit, where the edited model's answers themselves
            are not wanted, only what counts (see `Generated`).
        numbers: The records' numbers, which their random draws depend on; counted from 0 if `None`.
        before_edit: Where `wrapped` keeps what the model predicted before the edit, and finds it
            if another evaluation has kept it; a place of its own if `None`.

    Attributes:
        packed: Whether rows are packed; `None` if it was not measured.

    Raises:
        RequestError: The records cannot be evaluated.
        HyperParamsError: A metric is unknown, or cannot be measured with layers left on disk.
        MissingDependencyError: Fluency is asked for, and nltk is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Mapping[str, Any]],
        how: EvalConfig | None = None,
        *,
        metrics: Sequence[str] = DEFAULT_METRICS,
        before: Sequence[Metrics] | None = None,
        numbers: Sequence[int] | None = None,
        before_edit: BeforeEdit | None = None,
    ) -> None:
        how = how or EvalConfig()
        check_metrics(metrics)
        if how.stream is not None and "fluency" in metrics:
            raise HyperParamsError(
                f"`metrics={list(metrics)}`: fluency samples 100 tokens one after another, and the "
                "layers that `stream_frozen` left on disk would be read again for each. Leave "
                "fluency out, or set `stream_frozen: false` on a device that holds the model."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.records = [with_subject(record) for record in records]
        self.how = how
        self.metrics = tuple(metrics)
        self._numbers = range(len(records)) if numbers is None else numbers
        self._words = word_tokenizer() if "fluency" in metrics else None
        self._accuracy = (
            TeacherForced(model, tokenizer, records, how) if "accuracy" in metrics else None
        )
        if self._accuracy is not None and how.packed is None:
            how = replace(how, packed=self._accuracy.packed())  # measured once for all metrics
        self.packed = how.packed
        self._generated = (
            Generated(model, tokenizer, records, how, before=before)
            if "generated" in metrics
            else None
        )
        self._wrapped = (
            Wrapped(model, tokenizer, records, how, numbers=numbers, before=before_edit)
            if "wrapped" in metrics
            else None
        )
        self._perplexity = Perplexity(model, tokenizer, records, how) if "ppl" in metrics else None

    def measure(self, when: str = "evaluation", only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns each record's metrics; see `stream`."""
        return list(self.stream(when, only))

    def stream(
        self, when: str = "evaluation", only: Sequence[int] | None = None
    ) -> Iterator[Metrics]:
        """Measures; yields each record's metrics: EasyEdit's keys, `generated` and `wrapped`.

        Args:
            when: Goes into the labels of the progress bars.
            only: Records to measure; all if `None`.
        """
        parts: list[Iterator[Metrics]] = []
        if self._accuracy is not None:
            parts.append(self._accuracy.stream(f"metrics {when}".strip(), only))
        if self._perplexity is not None:
            parts.append(self._perplexity.stream(f"perplexity {when}".strip(), only))
        if self._generated is not None:
            answers = self._generated.stream(f"answers {when}".strip(), only)
            parts.append({"generated": found} for found in answers)
        if self._wrapped is not None:
            wrapped = self._wrapped.stream(f"answers in wrappers {when}".strip(), only)
            parts.append({"wrapped": found} for found in wrapped)
        if self._words is not None:
            asked = self.records if only is None else [self.records[i] for i in only]
            fluency = batched_fluency(
                self.model,
                self.tokenizer,
                asked,
                words=self._words,
                batch_size=self.how.batch_size,
                numbers=self._numbers if only is None else [self._numbers[i] for i in only],
                progress=self.how.progress and only is None,
            )
            parts.append({"fluency": found} for found in fluency)
        for found in zip(*parts, strict=True):
            measured: Metrics = {"locality": {}, "portability": {}}
            for values in found:
                _merge_(measured, values)
            yield measured

    def keep(self, when: str = "before") -> None:
        """Keeps what only the model tells, for metrics from before the edit that a file has.

        A first measurement of all records does so by itself.

        Args:
            when: Goes into the label of the progress bar.
        """
        if self._wrapped is not None:
            self._wrapped.keep(f"answers in wrappers {when}")

    def paired(self, before: Sequence[Metrics], after: Sequence[Metrics]) -> list[Metrics]:
        """Returns EasyEdit's metric dictionaries of what was measured before and after an edit.

        `PairedMetrics` makes them one at a time.
        """
        return list(PairedMetrics(self.records, before, after))


class PairedMetrics(LazyRecords):
    """Records with their metrics before and after an edit, put together when they are looked at.

    As EasyEdit's dictionaries: `case_id`, `requested_rewrite`, `pre` and `post`. In `post` is also
    what only the comparison tells (see `finish_`).

    Args:
        records: The requests.
        before: The metrics of each before the edit.
        after: Those after it.

    Raises:
        ValueError: Their numbers differ.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        before: Sequence[Metrics],
        after: Sequence[Metrics],
    ) -> None:
        if not len(records) == len(before) == len(after):
            raise ValueError(
                f"{len(records)} records, {len(before)} measured before and {len(after)} after. "
                "Measure all of them."
            )
        self._columns = (records, before, after)

    def __len__(self) -> int:
        return len(self._columns[0])

    def _record(self, index: int) -> dict[str, Any]:
        records, before, after = self._columns
        record, pre, post = records[index], before[index], after[index]
        finish_(pre, post)
        return {"case_id": index, "requested_rewrite": dict(record), "pre": pre, "post": post}


def finish_(pre: Mapping[str, Any], post: Metrics) -> None:
    """Adds to a record's metrics after an edit what only the comparison with those before tells.

    Locality, by tokens (`NAME_acc`), by generated answers and by those in chat.

    Raises:
        ValueError: The two were not measured on the same prompts.
    """
    finish_locality_(pre, post)
    if "wrapped" in pre and "wrapped" in post:
        finish_generated_(pre["wrapped"], post["wrapped"], "chat_")
    if "generated" in pre and "generated" in post:
        finish_generated_(pre["generated"], post["generated"])


def _merge_(entry: Metrics, value: Metrics) -> None:
    """Merges two metric dictionaries, sections into sections; what is there already stays."""
    for key, part in value.items():
        if isinstance(part, Mapping):
            entry[key] = {**part, **entry.get(key, {})}
        else:
            entry[key] = part


def shared_evaluation(
    world: World,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    how: EvalConfig,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    before_edit: BeforeEdit | None = None,
) -> SharedMeasurement:
    """Returns an `Evaluation` whose records the processes of `world` share.

    Args:
        world: The processes.
        model: As for `Evaluation`.
        tokenizer: As for `Evaluation`.
        records: All records.
        how: How this process runs its prompts.
        metrics: As for `Evaluation`.
        before_edit: As for `Evaluation`, made of all records.

    Raises:
        LocFTError: As for `Evaluation`, on all processes.
    """
    if before_edit is None and "wrapped" in metrics:
        before_edit = BeforeEdit(records)

    def make(some: Sequence[Mapping[str, Any]], numbers: list[int]) -> Evaluation:
        return Evaluation(
            model, tokenizer, some, how, metrics=metrics, numbers=numbers, before_edit=before_edit
        )

    return SharedMeasurement(world, model, records, make)


class SharedMeasurement(Measurement):
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

    def stream(self, description: str = "", only: Sequence[int] | None = None) -> Iterator[Metrics]:
        """Measures; yields each record's metrics, in the records' order.

        Args:
            description: Label of the progress bars.
            only: Records to measure; all if `None`. Processes do not share a part of the records.
        """
        if not self.world.is_distributed:
            yield from self._measurement.stream(description, only)
            return
        assert only is None
        # Of a sharded model, a rank that is done goes on taking part in the others' passes.
        with self.world.sharing_errors(), lockstep(self._model):
            found = CompactRecords(self._measurement.stream(description))
        yield from _in_order(self.world.all_gather((self._own, found)))

    def keep(self, description: str = "before") -> None:
        """Keeps what an `Evaluation` keeps with its first measurement, see there."""
        if not isinstance(self._measurement, Evaluation):
            return
        if not self.world.is_distributed:
            self._measurement.keep(description)
            return
        with self.world.sharing_errors(), lockstep(self._model):
            self._measurement.keep(description)


def _in_order(shares: Sequence[tuple[np.ndarray, CompactRecords]]) -> Iterator[Metrics]:
    """Yields the records of all shares, each an ascending list of numbers, in their order."""
    numbers = np.concatenate([own for own, _ in shares])
    owner = np.repeat(np.arange(len(shares)), [len(own) for own, _ in shares])
    remaining = [iter(found) for _, found in shares]
    for rank in owner[np.argsort(numbers)]:
        yield next(remaining[rank])
