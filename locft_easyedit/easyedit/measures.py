"""Metrics for the editor: ours in batches where they are the same, EasyEdit's own elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, ClassVar

from ..distributed.world import SINGLE_PROCESS, World
from ..errors import HyperParamsError, LocFTError, one_message
from ..evaluation.evaluation import SharedMeasurement
from ..evaluation.fluency import fluency_of, word_tokenizer
from ..evaluation.perplexity import PERPLEXITIES, Perplexity
from ..evaluation.predictions import EvalConfig
from ..evaluation.prompts import PARTS, Metrics
from ..evaluation.teacher_forced import TeacherForced, finish_locality_
from ..hparams import LocFTBFHyperParams
from ..modeling.device_map import left_on_disk
from ..modeling.fsdp import sharded_layers
from ..utils.progress import progress_bar
from .cuda_as_cpu import CudaAsCPU, needs_cuda_as_cpu
from .importing import EasyEdit


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _kept_outputs(entry: Any, name: str) -> list[Any]:
    """Returns the outputs that an entry of `pre_edit` holds for a locality's name."""
    try:
        return list(entry["pre"]["locality"][f"{name}_output"])
    except (KeyError, TypeError):
        return []


@dataclass
class Measures:
    """The metrics that one call of the editor asks for.

    Attributes:
        easyedit: EasyEdit, for what only it computes.
        eval_metric: EasyEdit's argument of that name.
        fluency: Whether fluency is asked for (`test_generation=True`).
        scores: Whether requests are scored; chat answers are no scores.
        words: Splits a text into words, if fluency is asked for.
    """

    easyedit: EasyEdit
    model: Any
    tokenizer: Any
    hparams: LocFTBFHyperParams
    device: Any
    eval_metric: str
    fluency: bool
    progress: bool
    scores: ClassVar[bool] = True
    words: Callable[[str], list[str]] | None = field(init=False, default=None)
    _requests: Sequence[Mapping[str, Any]] = field(init=False, default=())
    _ours: list[SharedMeasurement] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.fluency:
            self.words = word_tokenizer()  # what is missing must show before hours of editing
        if self.hparams.evaluation_type is not None and self.easyedit.is_release:
            raise HyperParamsError(
                f"`evaluation_type={self.hparams.evaluation_type!r}` needs the current EasyEdit; "
                "this is the PyPI release. Set EASYEDIT_HOME to a clone, or remove the key."
            )

    def check(self, requests: Sequence[Mapping[str, Any]], pre_edit: Sequence[Any] | None) -> None:
        """Checks that the requests can be measured, and that `pre_edit` was measured on them.

        Raises:
            LocFTError: They cannot, or it was not.
        """
        self._requests = requests
        h = self.hparams
        asked = {
            "`test_generation=True`": self.fluency,
            f"`evaluation_type={h.evaluation_type!r}`": h.evaluation_type is not None,
            "`generate_edit`": not self.scores,
        }
        names = " and ".join(name for name, value in asked.items() if value)
        if names and sharded_layers(self.model) is not None:
            raise LocFTError(
                f"{names}: every process computes it by itself, and the layers that `shard_frozen` "
                "shares out run in all of them together. Leave it out, or set `shard_frozen: "
                "false` on devices that hold the model."
            )
        if names and left_on_disk(self.model):
            raise LocFTError(
                f"{names} needs text token by token, and the layers that `stream_frozen` left on "
                "disk would be read again for each. Leave it out, or set `stream_frozen: false` "
                "on a device that holds the model."
            )
        self.run_as(EvalConfig(h.eval_batch_size, h.row_tokens, progress=self.progress))
        if pre_edit is None:
            return
        if len(pre_edit) != len(requests):
            raise LocFTError(
                f"`pre_edit` has {len(pre_edit)} entries for {len(requests)} requests. Measure "
                "again, or give those of the same requests."
            )
        problems = [
            f"entry {i} has no `pre` with {len(_list(fields['prompt']))} outputs for {name!r}."
            for i, (entry, request) in enumerate(zip(pre_edit, requests, strict=True))
            for name, fields in (request.get("locality") or {}).items()
            if len(_kept_outputs(entry, name)) != len(_list(fields["prompt"]))
        ]
        if problems and self.scores and self.hparams.evaluation_type is None:
            raise LocFTError(
                one_message("`pre_edit` is of other requests. Measure again:", problems)
            )

    def run_as(self, how: EvalConfig, world: World = SINGLE_PROCESS) -> None:
        """Tokenizes the requests, to be run in this way and shared by the processes of `world`.

        Raises:
            RequestError: They cannot be evaluated.
        """
        model, tokenizer, metric = self.model, self.tokenizer, self.eval_metric
        parts = ("locality", "portability") if metric in PERPLEXITIES else PARTS
        makers: list[Callable[..., Any]] = [
            lambda some, _: TeacherForced(model, tokenizer, some, how, parts=parts)
        ]
        if metric in PERPLEXITIES:
            makers.insert(0, lambda some, _: Perplexity(model, tokenizer, some, how, metric=metric))
        self._ours = [SharedMeasurement(world, model, self._requests, make) for make in makers]

    def _asked(self, only: Sequence[int] | None) -> Sequence[Mapping[str, Any]]:
        return self._requests if only is None else [self._requests[i] for i in only]

    def of(self, description: str, only: Sequence[int] | None = None) -> list[Metrics]:
        """Returns what EasyEdit's `compute_edit_quality` gives, for each request or `only` some."""
        requests = self._asked(only)
        if self.hparams.evaluation_type is None:
            parts = [measure.measure(description, only) for measure in self._ours]
            metrics = [reduce(or_, entries) for entries in zip(*parts, strict=True)]
        else:
            metrics = self._by_easyedit(requests, description)
        if self.words is not None:
            values = fluency_of(
                self.model,
                self.tokenizer,
                requests,
                words=self.words,
                progress=self.progress and only is None,
            )
            for entry, value in zip(metrics, values, strict=True):
                entry["fluency"] = value
        return metrics

    def finish_(self, metrics: Metrics, request: Mapping[str, Any]) -> None:
        """Adds locality's `NAME_acc` to the post-edit metrics, as EasyEdit does."""
        if self.hparams.evaluation_type is None:
            finish_locality_(metrics["pre"], metrics["post"])
        else:
            editor = importlib.import_module("easyeditor.editors.editor")
            editor.finalize_locality_metrics(
                metrics, request, self.hparams, str(self.hparams.model_name)
            )

    def _by_easyedit(self, records: Sequence[Mapping[str, Any]], description: str) -> list[Metrics]:
        mode = CudaAsCPU() if needs_cuda_as_cpu(self.easyedit) else nullcontext()
        with mode:
            return [
                self.easyedit.compute_edit_quality(
                    self.model,
                    str(self.hparams.model_name),
                    self.hparams,
                    self.tokenizer,
                    record,
                    self.device,
                    eval_metric=self.eval_metric,
                    test_generation=False,
                )
                for record in progress_bar(
                    records, desc=description, unit="record", show=self.progress
                )
            ]
