"""From a model and requests to an edited model: the pieces in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import EditSet, distinct_edits
from ..data.tokenization import TokenizedTexts
from ..data.training_texts import TrainingTexts, subjects_of
from ..distributed.world import SINGLE_PROCESS, Partition, World, get_world
from ..errors import HyperParamsError, NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..modeling.devices import context_length
from ..modeling.fsdp import lockstep
from ..modeling.modes import only_trainable, own_precision, with_gradients
from ..modeling.places import Place, check_low_rank, select_place
from ..modeling.suitability import (
    check_dependence,
    check_ids,
    check_recordable,
    warn_of_other_ends,
)
from ..prefix.frozen_prefix import PrefixRecorder
from ..prefix.prepare import kept_in
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import Shortcuts, enabled_shortcuts
from ..prefix.store import Budget
from ..prefix.streaming import FrozenStream
from ..utils.files import locked
from ..utils.timing import timed
from .checkpoints import Checkpoints, agreed_checkpoints
from .edit_runner import EditRunner
from .edit_training import EditTraining
from .health import HealthCheck
from .lora import low_rank_of
from .preserve.protection import Protection, check_protectable, check_resident
from .preserve.sources import Source, read_sources
from .reparametrization import Reparametrization
from .result import EditResult
from .rewordings.writers import check_writer
from .rewordings.written import with_written_rewordings
from .trained_weights import TrainedWeights

if TYPE_CHECKING:
    from .choice import Choice


logger = logging.getLogger(__name__)


@dataclass
class EditSession:
    """A model, requests and a place, checked and prepared: the prefix serves every training.

    A context manager. Entering tokenizes the requests and records the prefix; `train_` can then
    be called for all edits or for a few, as often as wanted. Nothing is trained on entering.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        requests: EasyEdit's request dictionaries.
        hparams: The hyper-parameters, with a place and a rate.
        progress: Show progress bars.
        alone: Requests will be trained one at a time, so that no two of them are in conflict.
            Processes that a launcher has started then do the same, each for itself.
        world: The processes that train together: those of the launcher. Each has to enter a
            session of the same model, edits and hyper-parameters.
        choice: What `layers: auto` has chosen, and among what, where that is how the place of
            `hparams` came about (see `open_session`).
        states: States of frozen layers that several sessions share (see `SharedStates`).
        fused: Whether frozen matrices that are given the same tensor run as one in training; `None`
            leaves it to `gains_by_fusing`.
        shortcuts: What leaves this model's logits as they are; once entered.
        budget: Where recorded states may lie; once entered.
        stream: What reads frozen layers that are not resident; once entered.
        checkpoints: What the first training of all edits goes on from, and leaves; once checked.
            `None` without `checkpoint_dir`.
        training_texts: The edits and their rewordings as tokens; once checked.
        sources: What is to be preserved; once checked.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    requests: Sequence[Mapping[str, Any]]
    hparams: LocFTBFHyperParams
    progress: bool = True
    alone: bool = False
    states: PrefixRecorder | None = None
    fused: bool | None = None
    world: World = field(default_factory=get_world)
    choice: Choice | None = None
    edits: EditSet = field(init=False)
    place: Place = field(init=False)
    timings: dict[str, float] = field(init=False, default_factory=dict)
    training_texts: TrainingTexts = field(init=False)
    sources: list[Source] = field(init=False, default_factory=list)
    _share: Partition = field(init=False)
    shortcuts: Shortcuts = field(init=False)
    budget: Budget = field(init=False)
    stream: FrozenStream | None = field(init=False, default=None)
    checkpoints: Checkpoints | None = field(init=False, default=None)
    _protection: Protection | None = field(init=False, default=None)
    _health: HealthCheck | None = field(init=False, default=None)
    _written: dict[str, Any] | None = field(init=False, default=None)
    _edit_runner: EditRunner | None = field(init=False, default=None)
    _cleanup: ExitStack = field(init=False, default_factory=ExitStack)

    def check(self) -> None:
        """Checks everything and tokenizes; entering does it too. The model is as before.

        Raises:
            LocFTError: The hyper-parameters, the requests, the place or the checkpoint that is
                there cannot be used.
        """
        h = self.hparams
        if self.alone:
            self.world = SINGLE_PROCESS
        self.progress = self.progress and self.world.is_main_process
        with self._timed("prepare"):
            with self.world.sharing_errors():
                h.check()
                check_writer(h, self.tokenizer)
                if h.chooses:
                    raise HyperParamsError(
                        f"`layers={h.layers}`, `rewrite_module_tmp={h.rewrite_module_tmp}`, "
                        f"`lr={h.lr}`: a session trains at a place and a rate that are given. Open "
                        "it with `open_session`, which chooses them first."
                    )
                self.sources = read_sources(h.preserved)
                self.edits = distinct_edits(self.requests, None if self.alone else h.on_conflict)
                self._select()
                self._tokenize()
                if h.append_eos and self.world.is_main_process:
                    warn_of_other_ends(self.model, self.tokenizer.eos_token_id)
            if h.augment_model is not None:
                self._reword()
        self._share = Partition.of_rank(self.world, self._texts.input_lengths)
        self.checkpoints = agreed_checkpoints(
            self.model,
            self.place,
            self.training_texts,
            h,
            self.sources,
            None if self.alone else h.checkpoint_folder,
            self.world,
        )

    def _select(self) -> None:
        """Finds the place's parameters."""
        h = self.hparams
        check_recordable(self.model)
        self.place = select_place(self.model, h.layers, h.templates)
        if h.tuning == "lora":
            check_low_rank(self.model, self.place.parameters, h.lora_rank)
            if h.cannot_preserve and self.world.is_main_process:
                logger.warning(
                    "`alg_name: %s` with `tuning: lora` only trains other forms: a low-rank change "
                    "is not confined, and nothing is preserved. Set `tuning: full` to preserve.",
                    h.alg_name,
                )
        if self.sources:
            check_protectable(self.model, self.place.parameters)

    def _tokenize(self) -> None:
        """Makes tokens of the edits as they are now."""
        self.training_texts = TrainingTexts.tokenize(
            self.tokenizer,
            self.edits.edits,
            subjects_of(self.requests, self.edits, self.hparams),
            self.hparams,
            max_positions=context_length(self.model),
        )
        check_ids(self.model, self._texts.ids)

    def _reword(self) -> None:
        """Gives the edits the rewordings that a language model writes."""
        with self._timed("rewordings"):
            self.edits, self._written = with_written_rewordings(
                self.model,
                self.tokenizer,
                self.edits,
                self.training_texts.subjects,
                self.hparams,
                world=self.world,
                progress=self.progress,
            )
        with self.world.sharing_errors():
            self._tokenize()

    @property
    def _texts(self) -> TokenizedTexts:
        return self.training_texts.texts

    def __enter__(self) -> EditSession:
        if not hasattr(self, "training_texts"):
            self.check()
        h = self.hparams
        with self._cleanup:
            with self.world.sharing_errors():
                if self.checkpoints is not None and self.world.is_main_process:
                    self._cleanup.enter_context(locked(self.checkpoints.path.parent))
            self._cleanup.enter_context(only_trainable(self.model, self.place.parameters.values()))
            with self.world.sharing_errors(), self._timed("prefix"), with_gradients():
                self.budget = Budget(
                    h.prefix_gpu_gib,
                    h.prefix_host_gib,
                    h.prefix_disk_gib,
                    h.prefix_dir,
                    self.world.local_size,
                )
                ready = enabled_shortcuts(
                    self.model,
                    self._texts,
                    self.place,
                    h,
                    fused=self.fused,
                    progress=self.progress,
                )
                self.shortcuts, self.stream = self._cleanup.enter_context(ready)
                if self.stream is None and not self.world.is_distributed:
                    ids = self._texts.ids[: self._texts.offsets[1]].tolist()
                    check_dependence(self.model, self.place.parameters, ids)
                if self.sources:
                    self._protection = self._protected()
                kept = kept_in(h.prefix_dir, self.place.parameters, self.world)
                self._edit_runner = EditRunner(
                    self.model,
                    self._texts.subset(self._share.own)
                    if self.world.is_distributed
                    else self._texts,
                    h,
                    self.shortcuts,
                    self.budget,
                    protection=self._protection,
                    kept=kept,
                    stream=self.stream,
                    states=self.shared_states,
                    progress=self.progress,
                )
                if self.checkpoints is None or not self.checkpoints.finished:
                    self._edit_runner.prepare(self.checkpoints)
                if h.health_check:
                    self._health = self._cleanup.enter_context(
                        HealthCheck(
                            self.model,
                            self.tokenizer,
                            self.shortcuts,
                            row_tokens=h.row_tokens,
                            # In memory it is sooner computed than found again.
                            kept=None if self.stream is None else kept,
                            stream=self.stream,
                        )
                    )
            self._cleanup = self._cleanup.pop_all()  # all went well: clean up on exit, not now
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    @property
    def _runner(self) -> TextRunner | None:
        return None if self._edit_runner is None else self._edit_runner.runner

    @property
    def shared_states(self) -> PrefixRecorder | None:
        """The states of frozen layers that this place can begin with; once entered."""
        usable = self.stream is None and self.shortcuts.from_layer
        return self.states if usable else None

    @own_precision()
    def train_(
        self, only: Sequence[int] | None = None, *, progress: bool | None = None
    ) -> EditResult:
        """Trains the model's present weights on the edits, in place.

        Args:
            only: Indices of requests to train; all if `None`.
            progress: Show a progress bar; as the session does if `None`.

        Raises:
            NonFiniteLossError: Training diverged; the weights are as they were before the call.
            EditInterrupted: Ctrl-C or SIGTERM, after a checkpoint; the weights likewise.
        """
        indices = np.array(self.edits.indices_of(only))
        # The file holds one training: that of all edits, from the weights that were checked.
        checkpoints = self.checkpoints if only is None else None
        self.checkpoints = None
        edit_runner = self._edit_runner
        assert edit_runner is not None
        lora = low_rank_of(self.model, self.place.parameters, self.hparams)
        change: Reparametrization | None = lora or edit_runner.confined_()
        weights = TrainedWeights(self.place.parameters) if change is None else change.weights
        changed = weights if change is None else change
        try:
            finished = checkpoints is not None and checkpoints.finished
            protection = self._protection
            runner = None if finished else edit_runner.complete_runner(self.world, self.timings)
            if self._health is not None and only is None:
                with lockstep(self.model):
                    self._health.before()
            done = None if checkpoints is None or not finished else checkpoints.resume_(weights)
            if done is None:
                assert runner is not None
                training = EditTraining(
                    runner,
                    weights,
                    self.edits,
                    self.training_texts,
                    self.hparams,
                    self._share,
                    adam=None
                    if protection is None
                    else protection.adam(len(indices), self.hparams),
                    checkpoints=checkpoints,
                    progress=self.progress if progress is None else progress,
                )
                with (
                    nullcontext() if change is None else change.in_force(),
                    self._timed("train"),
                ):
                    done = training.run_(indices)
            if checkpoints is not None:
                self.timings["train"] = done.seconds  # with what earlier processes spent on it
            if change is not None:
                change.merge_()
            new, health = changed.values(), None
            if self._health is not None:
                # Of edits that are made one at a time, hundreds maybe, the norms alone.
                with lockstep(self.model):
                    health = self._health.after(
                        changed.original, new, lr=self.hparams.lr, perplexity=only is None
                    )
            notes = edit_runner.how_it_ran(checkpoints)
            return EditResult(
                losses=done.losses,
                step_losses=done.step_losses,
                original=changed.original,
                new=new,
                timings=dict(self.timings),
                n_updates=done.n_updates,
                converged=done.converged,
                n_trained=len(indices),
                edits=self.edits,
                packed=notes["packed"],
                frozen_prefix=notes["cut"] is not None,
                lora=None if lora is None else lora.adapter(),
                health=health,
                choice=self.choice,
                repairs=done.repairs,
                augmented=self._augmented(),
                preserved=None if protection is None else protection.filters.summary,
            )
        except BaseException as error:
            # Ctrl-C as well: a half-trained model is of no use to anybody.
            changed.restore_()
            weights.clear_gradients_()
            if checkpoints is not None and isinstance(error, NonFiniteLossError):
                checkpoints.discard()  # it leads there again
            raise

    def _augmented(self) -> dict[str, Any] | None:
        """Returns figures of the rewordings, those that were written among them."""
        summary = self.training_texts.summary
        return summary if self._written is None else {**(summary or {}), "written": self._written}

    def _protected(self) -> Protection:
        """Measures what is to be preserved, from the model as it is now."""
        check_resident(self.stream)
        found = Protection.measured(
            self.model,
            self.tokenizer,
            self.place,
            self.sources,
            self.training_texts,
            self.hparams,
            world=self.world,
            timings=self.timings,
            progress=self.progress,
        )
        if self.checkpoints is not None:
            self.checkpoints.check_preserved(found.filters.digest)
        return found

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        return timed(self.timings, phase, self.model)
