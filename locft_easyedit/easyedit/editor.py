"""The editor that `BaseEditor.from_hparams` gives for LocFT-BF."""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..api import edit_model, open_session
from ..data.requests import make_requests
from ..distributed.world import get_world
from ..errors import HyperParamsError, LocFTError
from ..evaluation.predictions import EvalConfig
from ..evaluation.prompts import Metrics
from ..evaluation.summary import summarize
from ..hparams import ALG_NAME, LocFTBFHyperParams
from ..modeling.devices import input_device
from ..modeling.fsdp import sharded_layers
from ..modeling.loading import load_model
from ..modeling.parameter_slices import parameters_named, slices_joined
from ..training.result import EditResult
from ..training.rewordings.writers import check_writer
from ..training.session import EditSession
from ..training.trained_weights import values_swapped, write_
from ..utils.files import text_output
from ..utils.progress import progress_bar
from .calls import Request, Returned, check_keywords, takes_columns, usable
from .chat import ChatMeasures
from .importing import EasyEdit
from .into_ledger import EditorLedger
from .measures import Measures
from .sentiment import SentimentMetrics

logger = logging.getLogger(__name__)


class LocFTBFMethods:
    """EasyEdit's editor interface for LocFT-BF; `register` joins it with `BaseEditor`.

    Same signatures, metric dictionaries and returned tuples as EasyEdit's `BaseEditor`, with the
    meaning that its users expect:

    - All edits of a call are trained together, and metrics are taken after all of them are in.
      `edit` and `edit_requests` without `sequential_edit` keep EasyEdit's meaning instead: each
      edit alone, on the original model.
    - The model that is returned carries the edits. With `sequential_edit=False` the next call
      starts from the original weights again; with `sequential_edit=True` edits accumulate. With
      `ledger_dir` these are facts of a ledger, and the model begins with all that it holds.

    Attributes:
        model: The model; edits change it in place.
        tok: Its tokenizer.
        hparams: The hyper-parameters.
        last_result: The `EditResult` of the last call.
        keeps_locality_outputs: Whether `post` keeps the tokens that locality was computed from,
            as EasyEdit's does.
    """

    easyedit: EasyEdit  # set by `register`
    keeps_locality_outputs = True

    def __init__(self, hparams: LocFTBFHyperParams) -> None:
        if not isinstance(hparams, LocFTBFHyperParams):
            raise HyperParamsError(
                f"{type(hparams).__name__} are not the hyper-parameters of {ALG_NAME}. Read them "
                "with `LocFTBFHyperParams.from_hparams`."
            )
        hparams.check()
        check_writer(hparams)
        self.hparams = hparams
        self.alg_name = hparams.alg_name
        self.apply_algo = self._apply
        self.model, self.tok = load_model(hparams)
        self.model_name = hparams.model_name
        self.device = input_device(self.model)
        self.last_result: EditResult | None = None
        self._original: dict[str, torch.Tensor] = {}  # to restore when the next call begins
        self._first: dict[str, torch.Tensor] = {}  # values before the first edit of each parameter
        self._ledger: EditorLedger | None = None
        if hparams.ledger_dir is not None:
            self._ledger = EditorLedger(hparams, self.model, self.tok)
            self.hparams, self._first = self._ledger.hparams, self._ledger.base

    @takes_columns
    def edit(
        self, requests: Sequence[Request], sequential_edit: bool, verbose: bool, **kwargs: Any
    ) -> Returned:
        """Edits, and measures before and after; see the class for `sequential_edit`.

        Args:
            requests: EasyEdit's request dictionaries, by keyword, in place of the next seven.
            prompts: N prompts, or one.
            target_new: N targets, or one.
            ground_truth: N former answers.
            target_neg: Kept in the requests; LocFT-BF does not use it.
            rephrase_prompts: N rewordings, for evaluation.
            locality_inputs: Name -> `prompt` and `ground_truth`, lists of N.
            portability_inputs: The same for portability.
            sequential_edit: Train all edits together and keep them; else each alone.
            verbose: Show progress bars and log the summary.
            **kwargs: EasyEdit's others: `subject`, `loc_prompts`, `test_generation` (fluency),
                `eval_metric`, `pre_edit`, `pre_file`, `metric_kwargs` (ConvSent); those of other
                methods (`train_ds`, `keep_original_weight`) change nothing.

        Returns:
            A list of metric dictionaries, the edited model, and the former weights by name.

        Raises:
            LocFTError: The requests cannot be used, or a keyword is unknown; nothing was changed.
        """
        return self.edit_requests(requests, sequential_edit, verbose, **kwargs)

    def edit_requests(
        self,
        requests: Sequence[Request],
        sequential_edit: bool = False,
        verbose: bool = True,
        test_generation: bool = False,
        **kwargs: Any,
    ) -> Returned:
        """Edits with EasyEdit's request dictionaries, or a data set object; else as `edit`."""
        check_keywords("edit_requests", kwargs, inspect.signature(self.edit_requests).parameters)
        requests = usable(requests)
        metric = kwargs.get("eval_metric", "exact match")
        metrics = self._edit_and_measure(
            requests,
            self._measures(Measures, verbose, test_generation, metric),
            sequential=sequential_edit,
            alone=not sequential_edit,
            pre_edit=kwargs.get("pre_edit"),
            pre_file=kwargs.get("pre_file"),
            metric_kwargs=kwargs.get("metric_kwargs"),
        )
        return metrics, self.model, self._former_weights()

    def edit_dataset(
        self, ds: Any, keep_original_weight: bool = False, verbose: bool = True
    ) -> Returned:
        """Edits with all records of a data set object, as `edit_requests`.

        Args:
            ds: Such as EasyEdit's `CounterFactDataset`.
            keep_original_weight: Make each edit alone, on the original model; else all together.
            verbose: Show progress bars and log the summary.
        """
        return self.edit_requests(ds, not keep_original_weight, verbose)

    @takes_columns
    def batch_edit(
        self, requests: Sequence[Request], sequential_edit: bool, verbose: bool, **kwargs: Any
    ) -> Returned:
        """Edits with all requests together, whatever `batch_size`: that is the mini-batch.

        Arguments, result and errors as for `edit`; each metric dictionary has `time` as well, the
        seconds of the whole edit.
        """
        measures = self._measures(Measures, verbose, kwargs.get("test_generation", False))
        metrics = self._edit_and_measure(
            requests, measures, sequential=sequential_edit, alone=False
        )
        for entry in metrics:
            entry["time"] = self._seconds
        return metrics, self.model, self._former_weights()

    def normal_edit(
        self, prompts: list[str], target_new: list[str], sequential_edit: bool = False
    ) -> Returned:
        """Edits with all requests together and measures nothing: returns `None` for metrics."""
        session = self._opened(make_requests(prompts, target_new))
        self._begin()
        with session:
            self._done(self._trained(session, session.requests, sequential_edit), sequential_edit)
        return None, self.model, self._former_weights()

    @takes_columns
    def generate_edit(
        self, requests: Sequence[Request], sequential_edit: bool, verbose: bool, **kwargs: Any
    ) -> Returned:
        """Edits as `edit`, and records chat answers before and after instead of scores.

        Each entry has `rewrite_ans`, and where the request has the prompts `rephrase_ans`,
        `portability_ans` (`por_hop`) and `locality_ans` (`loc_hop`), as in EasyEdit.
        """
        results = self._edit_and_measure(
            requests,
            self._measures(ChatMeasures, verbose, kwargs.get("test_generation", False)),
            sequential=sequential_edit,
            alone=not sequential_edit,
            pre_edit=kwargs.get("pre_edit"),
            pre_file=kwargs.get("pre_file"),
        )
        return results, self.model, self._former_weights()

    @contextmanager
    def unedited(self) -> Iterator[Any]:
        """Context manager that yields the model without its edits; afterwards it has them again.

        Original and edited model side by side, without a second copy of it.
        """
        with values_swapped(self.model, self._first):
            yield self.model

    def _edit_and_measure(
        self,
        requests: Sequence[Request],
        measures: Measures,
        *,
        sequential: bool,
        alone: bool,
        pre_edit: list[dict[str, Any]] | None = None,
        pre_file: str | None = None,
        metric_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Measures, edits and measures again; returns an entry with `pre` and `post` a request."""
        # All that can be wrong shows before any weight changes, the last call's edits included.
        session = self._opened(requests, progress=measures.progress, alone=alone)
        measures.check(requests, pre_edit)
        sentiment = SentimentMetrics(
            self.easyedit,
            self.model,
            self.tok,
            self.hparams,
            self.device,
            self.unedited,
            metric_kwargs,
            len(requests),
        )
        self._begin()
        with session:
            how = EvalConfig.from_session(session, progress=measures.progress)
            measures.run_as(how, session.world)
            if pre_edit is not None:
                entries = pre_edit
            else:
                entries = [{"pre": value} for value in measures.of("before the edit")]
                if pre_file is not None and get_world().is_main_process:
                    with text_output(pre_file) as file:
                        json.dump(entries, file, indent=4)
            start = time.perf_counter()
            if alone and len(requests) > 1:
                after = self._each_alone(session, requests, measures, sentiment)
            else:
                self._done(self._trained(session, requests, sequential), sequential)
                once = sum(session.timings.get(phase, 0.0) for phase in ("prefix", "preserve"))
                self._seconds = time.perf_counter() - start + once
                values = measures.of("after the edit")
                after = [(value, sentiment.of(i)) for i, value in enumerate(values)]
        # A script's own files are written by all processes: they have to be the same.
        self._seconds = get_world().broadcast_from_main(lambda: self._seconds)
        triples = zip(entries, requests, after, strict=True)
        for i, (entry, request, (value, more)) in enumerate(triples):
            said = {"case_id": i, "alg_name": self.hparams.alg_name, "requested_rewrite": request}
            entry.update({**said, "post": value, **more})
        if measures.scores:
            self._finish_(entries, measures)
        return entries

    def _finish_(self, entries: Sequence[Metrics], measures: Measures) -> None:
        """Completes the locality of each entry, and logs the summary."""
        for entry in entries:
            measures.finish_(entry, entry["requested_rewrite"])
            if not self.keeps_locality_outputs:
                locality = entry["post"]["locality"]
                entry["post"]["locality"] = {
                    key: value for key, value in locality.items() if not key.endswith("_output")
                }
        if measures.progress:
            logger.info("Metrics Summary: %s", json.dumps(summarize(entries)))

    def _each_alone(
        self,
        session: EditSession,
        requests: Sequence[Request],
        measures: Measures,
        sentiment: SentimentMetrics,
    ) -> list[tuple[Metrics, dict[str, Any]]]:
        """Edits and measures each request on the original model; the last one stays in."""
        after = []
        start = time.perf_counter()
        for i in progress_bar(
            range(len(requests)), desc="edits, each alone", unit="edit", show=session.progress
        ):
            self._begin()
            self._done(session.train_([i], progress=False), sequential=False)
            [value] = measures.of("after the edit", [i])
            after.append((value, sentiment.of(i)))
        self._seconds = time.perf_counter() - start
        logger.info(
            "Each of %d edits was made alone, on the original model; the model returned carries "
            "the last. For all of them in one model use batch_edit or sequential_edit=True.",
            len(requests),
        )
        return after

    def _measures(
        self, kind: type[Measures], verbose: bool, fluency: bool, eval_metric: str = "exact match"
    ) -> Measures:
        return kind(
            self.easyedit,
            self.model,
            self.tok,
            self.hparams,
            self.device,
            eval_metric=eval_metric,
            fluency=fluency,
            progress=verbose and get_world().is_main_process,
        )

    def _opened(
        self, requests: Sequence[Request], *, progress: bool = True, alone: bool = False
    ) -> EditSession:
        """Returns a session that is checked; the place that `layers: auto` chooses stays."""
        if alone and sharded_layers(self.model) is not None:
            raise LocFTError(
                "Without `sequential_edit` every process makes each edit by itself, and the layers "
                "that `shard_frozen` shares out run in all of them together. Use batch_edit or "
                "sequential_edit=True, or set `shard_frozen: false`."
            )
        session = open_session(
            self.model, self.tok, requests, self.hparams, progress=progress, alone=alone
        )
        session.check()
        if session.choice is not None:
            self.hparams = session.hparams
            logger.info(
                "Later calls of this editor keep %s (lr=%g): edits accumulate in one place.",
                session.choice.cell.location,
                session.hparams.lr,
            )
        return session

    def _begin(self) -> None:
        """Gives the model the weights that the next edit starts from."""
        write_(parameters_named(self.model, self._original), self._original)
        self._original = {}

    def _trained(
        self, session: EditSession, requests: Sequence[Request], sequential: bool
    ) -> EditResult:
        """Trains a session's edits; with `ledger_dir` those that accumulate go into the ledger."""
        if self._ledger is not None and sequential:
            return self._ledger.add_(session, requests)
        return session.train_()

    def _done(self, result: EditResult, sequential: bool) -> None:
        self.last_result = result
        for name, value in result.original.items():
            self._first.setdefault(name, value.clone())
        # Copies: what is returned to the caller may be changed by the caller.
        self._original = {} if sequential else {k: v.clone() for k, v in result.original.items()}

    def _apply(
        self,
        model: Any,
        tok: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        hparams: LocFTBFHyperParams,
        copy: bool = False,
        return_orig_weights: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """`apply_locft_bf_to_model`; the editor's own model begins as the next edit would."""
        if model is self.model:
            self._begin()
        edited, former = apply_locft_bf_to_model(
            model, tok, requests, hparams, copy=copy, return_orig_weights=True
        )
        if edited is self.model:
            for name, value in former.items():
                self._first.setdefault(name, value.clone())
        return edited, former if return_orig_weights else {}

    def _former_weights(self) -> dict[str, torch.Tensor]:
        if self.last_result is None:
            return {}
        return slices_joined(self.last_result.original, dict(self.model.named_parameters()))


def apply_locft_bf_to_model(
    model: Any,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: LocFTBFHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Edits a model with all `requests` together, and returns it with the original values.

    Args:
        model: A causal language model.
        tok: Its tokenizer.
        requests: EasyEdit's request dictionaries.
        hparams: The hyper-parameters.
        copy: Edit a copy; else the model itself.
        return_orig_weights: Return the trained parameters' former values, by name.
        keep_original_weight: EasyEdit's; the caller decides whether to restore them.
        **kwargs: What EasyEdit passes for other methods.

    Raises:
        LocFTError: As for `edit_model`.
    """
    edited = deepcopy(model) if copy else model
    result = edit_model(edited, tok, usable(requests), hparams)
    if not return_orig_weights:
        return edited, {}
    return edited, slices_joined(result.original, dict(edited.named_parameters()))
