"""Making the edits of one method: chunk by chunk, resumable, measured right after each one."""

from __future__ import annotations

import json
import logging
import shutil
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..data.forms import CONTEXTS
from ..easyedit.importing import EasyEdit
from ..easyedit.peers.modules import easyedit_name
from ..easyedit.peers.peer_editor import PeerEditor, hparams_class
from ..easyedit.peers.peer_hparams import (
    PEERS,
    name_for_easyedit_,
    padding_side,
    peer_hparams,
)
from ..easyedit.peers.published import MODULE_KEYS
from ..errors import LocFTError
from ..evaluation.evaluation import PLAIN_METRICS, Evaluation
from ..evaluation.predictions import EvalConfig
from ..hparams import LocFTBFHyperParams
from ..training.trained_weights import write_
from ..utils.files import output_errors, replacing
from ..utils.memory import Peak, peak_memory
from .commits import commits_of
from .job import Job, JobFolder, Progress, model_id
from .ours import IN_LEDGER, OURS, LedgerEditor

logger = logging.getLogger(__name__)

# Methods whose state is the weights and their context templates; others keep a cache or an adapter.
_RESUMABLE = ("FT", "ROME", "MEMIT")
_CHECKPOINT_SECONDS = 60.0
_KEPT = ("right_after", "by_commit", "seconds", "seconds_measuring")  # attributes, in a checkpoint
_SEED = 42  # EasyEdit's
# Values that say where things are; the others that a rule has set are choices, and told.
_UNTOLD = tuple(
    f"{key}="
    for key in (
        "model_name",
        "stats_dir",
        "mom2_dataset",
        "mom2_n_samples",
        "P_loc",
        "fp16",
        *MODULE_KEYS,
    )
)


@dataclass
class MethodEditor:
    """A method, ready to edit.

    Attributes:
        name: Its name.
        editor: EasyEdit's editor, or that of a ledger.
        chunk: Edits that one call of the method makes.
        one_by_one: Whether it makes one edit after the other.
        values: Its hyper-parameters.
        notes: What was set by rule.
        needs_subject: Whether the subject must be in the prompt.
        end: What ends a target that it is given: the EOS token's text, or nothing.
    """

    name: str
    editor: Any
    chunk: int
    one_by_one: bool
    values: dict[str, Any]
    notes: list[str]
    needs_subject: bool
    end: str = ""

    def ended(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a request with a target that ends, if this method's targets do."""
        return {**request, "target_new": f"{request['target_new']}{self.end}"}


def method_editor(
    job: Job,
    model: Any,
    tokenizer: Any,
    n_edits: int,
    easyedit: EasyEdit,
    state: Path | None = None,
) -> MethodEditor:
    """Returns the job's method on a loaded model.

    Args:
        job: The job.
        model: The model.
        tokenizer: Its tokenizer.
        n_edits: Edits that come together.
        easyedit: EasyEdit.
        state: Where a ledger, the one method that needs it, keeps what it keeps.

    Raises:
        MethodUnavailableError: This EasyEdit does not have it.
        PeerError: Its hyper-parameters cannot be set up for this model.
    """
    if job.name in OURS:
        own = LocFTBFHyperParams.from_mapping(job.hparams, source="The hyper-parameters")
        own.device = None  # it is placed already
        if job.name.endswith(IN_LEDGER):
            assert state is not None
            shutil.rmtree(state / "ledger", ignore_errors=True)  # of a run that was ended
            editor: Any = LedgerEditor(state / "ledger", model, tokenizer, own)
        else:
            editor = PeerEditor(job.name, model, tokenizer, own, "")
        return MethodEditor(job.name, editor, n_edits, False, job.hparams, [], False)
    cls = hparams_class(job.name)
    statistics = job.statistics or {}
    overrides, notes = dict(job.overrides), []
    if job.model_parallel and job.name in PEERS:
        overrides.setdefault("model_parallel", True)
    if easyedit.is_release and job.name == "FT" and "objective_optimization" not in overrides:
        overrides["objective_optimization"] = "prompt_last"
        notes.append("FT-L: EasyEdit's release knows no other; its current source does FT-M here.")
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    plan = peer_hparams(
        job.name,
        model,
        # The release knows numbers of GPUs only; on a CPU they are taken for it.
        device=0 if easyedit.is_release and on_cpu else model.get_input_embeddings().weight.device,
        n_edits=n_edits,
        stats_dir=str(job.stats_dir),
        corpus_name=statistics.get("name", "none"),
        n_samples=statistics.get("n_samples", 1),
        overrides=overrides,
    )
    if tokenizer.unk_token is None:
        tokenizer.unk_token = tokenizer.eos_token  # the release's FT masks with it
    end = ending(tokenizer) if job.append_eos else ""
    if job.append_eos and not end:
        notes.append(
            "Its targets do not end: the tokenizer has no special token besides EOS to pad with"
        )
    if not end:
        tokenizer.pad_token = tokenizer.eos_token  # as EasyEdit's editor sets both
    tokenizer.padding_side = padding_side(job.name)
    name_for_easyedit_(model, model_id(job.model))
    hparams = plan.load(cls)
    editor = PeerEditor(job.name, model, tokenizer, hparams, easyedit_name(model))
    return MethodEditor(
        job.name,
        editor,
        1 if plan.one_by_one else int(plan.values.get("batch_size", 1)),
        plan.one_by_one,
        plan.values,
        [*notes, *(note for note in plan.notes if not note.startswith(_UNTOLD))],
        str(plan.values.get("fact_token", "")).startswith("subject"),
        end,
    )


def ending(tokenizer: Any) -> str:
    """Returns the EOS token's text, and sees to it that padding is another token.

    EasyEdit's editor pads with EOS, and some methods leave out of the loss whatever is that token.
    """
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    others = [token for token in (pad, *tokenizer.all_special_tokens) if token not in (None, eos)]
    if eos is None or not others:
        return ""
    tokenizer.pad_token = others[0]
    return str(eos)


class Edits:
    """The edits of one method, made with `make_`, which changes the model in place.

    Args:
        method: The method.
        requests: The edits.
        model: The model.
        tokenizer: Its tokenizer.
        how: How metrics are taken.
        folder: The job's folder.
        progress: Who is told how far it is.
        stream: The edits come in this many commits of equal size; all at once if `None`.

    Attributes:
        right_after: Metrics of each edit right after it, for one that edits one by one.
        by_commit: After each commit of a stream the reliability of each commit so far.
        seconds: Seconds of editing alone.
        seconds_measuring: Seconds of measuring in between.
        peak: Peak memory of editing.
        notes: What a reader must know of them.
        n_made: Edits that were made.
    """

    def __init__(
        self,
        method: MethodEditor,
        requests: Sequence[Mapping[str, Any]],
        model: Any,
        tokenizer: Any,
        how: EvalConfig,
        folder: JobFolder,
        progress: Progress,
        stream: int | None = None,
    ) -> None:
        self.method = method
        self.requests = requests
        self.model = model
        self.folder = folder
        self.progress = progress
        self.right_after: list[dict[str, Any]] = []
        self.by_commit: list[list[float]] = []
        self.seconds = self.seconds_measuring = 0.0
        self.peak = Peak()
        self.notes: list[str] = []
        self.possible = [
            i
            for i, r in enumerate(requests)
            if not method.needs_subject or (r.get("subject") and r["subject"] in r["prompt"])
        ]
        self.n_made = len(self.possible)
        if self.n_made < len(requests):
            self.notes.append(
                f"{len(requests) - self.n_made} of {len(requests)} edits could not be made: "
                f"{method.name} needs the subject, and it is not in the prompt. They count in the "
                "metrics."
            )
        if not self.possible:
            raise LocFTError(
                f"{method.name} needs a `subject` that is in the prompt; no record has one."
            )
        if method.name not in (*OURS, *PEERS):  # who knows what it puts into the model
            around = method.editor if method.one_by_one else None
            how = replace(how, packed=False, wrapper=around)
        self.how = how
        self._each: Evaluation | None = None
        self._stream = stream is not None
        self._commits = commits_of(len(requests), stream)
        if method.one_by_one or self._stream:
            parts = ("prompt", "target_new", "rephrase_prompt", "target_aliases")
            own = [{key: r[key] for key in parts if key in r} for r in requests]
            self._each = Evaluation(model, tokenizer, own, how, metrics=PLAIN_METRICS)
            self.how = replace(how, packed=self._each.packed)
        self._checkpoint = folder.state / "edited.safetensors"

    def make_(self) -> None:
        """Makes the edits, going on where a checkpoint is."""
        torch.manual_seed(_SEED)
        done = self._resumed_()
        saved = time.monotonic()
        for commit in self._commits[len(self.by_commit) :]:
            end = bisect_left(self.possible, commit.stop)
            while done < end:
                self.progress.say("editing", done, len(self.possible))
                chunk = self.possible[done : min(done + self.method.chunk, end)]
                start = time.perf_counter()
                device = self.model.get_input_embeddings().weight.device
                with peak_memory(device) as peak:
                    self.method.editor.edit_([self._trained(i) for i in chunk])
                self.seconds += time.perf_counter() - start
                self.peak = max(self.peak, peak, key=lambda p: p.gib or 0.0)
                done += len(chunk)
                if self.method.one_by_one:
                    self.right_after += self._measured("right after", chunk)
                if time.monotonic() - saved > _CHECKPOINT_SECONDS and done < len(self.possible):
                    self._save(done)
                    saved = time.monotonic()
            if self._stream:
                self._look_back(commit.stop)
        self.progress.say("editing", done, len(self.possible))
        if isinstance(self.method.editor, LedgerEditor) and (lost := self.method.editor.lost):
            self.notes.append(f"By the ledger's own check {lost} facts do not hold.")
        if self.method.editor.nothing_changed:
            self.notes.append(
                f"{self.method.name} left every weight as it was: its hyper-parameters leave it no "
                "room in this model (for AlphaEdit, no direction below `nullspace_threshold`)."
            )

    def _measured(self, label: str, which: Sequence[int]) -> list[dict[str, Any]]:
        assert self._each is not None
        start = time.perf_counter()
        records = self._each.measure(label, which)
        self.seconds_measuring += time.perf_counter() - start
        return records

    def _look_back(self, n: int) -> None:
        """Notes the reliability of each commit among the first n edits."""
        records = self._measured("commits so far", range(n))
        self.by_commit.append(
            [
                fmean(record["generated"]["reliability"] for record in records[c.start : c.stop])
                for c in self._commits
                if c.stop <= n
            ]
        )

    def _trained(self, i: int) -> dict[str, Any]:
        """Returns request i as its method gets it: with a target that ends, if all do.

        An answer counts as right only if it ends after the target. LocFT-BF trains the end by
        itself; EasyEdit's methods train the text that they are given. WISE keeps an unrelated text
        as it is for each edit, which EasyEdit's scripts take from a data set's training part.
        """
        unrelated = {"loc_prompt": CONTEXTS[i % len(CONTEXTS)]}
        return unrelated | self.method.ended(self.requests[i])

    def _save(self, done: int) -> None:
        """Saves what was edited so far, whole or not at all.

        Raises:
            OutputError: It cannot be saved; an earlier checkpoint is as it was.
        """
        if self.method.name not in _RESUMABLE:
            return
        changed = self.method.editor.changed
        tensors = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.model.named_parameters()
            if name in changed
        }
        state = {
            "done": done,
            "templates": self.method.editor.templates,
            "peak": [self.peak.gib, self.peak.of],
            **{name: getattr(self, name) for name in _KEPT},
        }
        with output_errors(self._checkpoint):
            self.folder.state.mkdir(parents=True, exist_ok=True)
            with replacing(self._checkpoint) as temporary:
                save_file(tensors, temporary, metadata={"state": json.dumps(state)})

    def _resumed_(self) -> int:
        """Puts back what a checkpoint holds; returns how many edits are done."""
        if self.method.name not in _RESUMABLE or not self._checkpoint.is_file():
            return 0
        with safe_open(self._checkpoint, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        write_(dict(self.model.named_parameters()), tensors)
        self.method.editor.changed |= set(tensors)
        self.method.editor.templates = state["templates"]
        for name in _KEPT:
            setattr(self, name, state[name])
        self.peak = Peak(*state["peak"])
        done: int = state["done"]
        logger.info("Going on after %d edits.", done)
        return done
