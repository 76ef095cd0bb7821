"""A few edits made for a trial, at one place and rate after the other, on a model that stays."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import Edit
from ..data.tokenization import TokenizedTexts, tokenize_edits
from ..distributed.world import SINGLE_PROCESS
from ..errors import ModelError, NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..hparams_rules import ALG_NAME
from ..modeling.devices import context_length
from ..modeling.modes import evaluation_mode
from ..prefix.runner import TextRunner
from ..prefix.shortcuts import can_pack
from ..training.choice import Cell, TrialScores
from ..training.health import health_texts
from ..training.result import EditResult
from ..training.session import EditSession
from ..utils.memory import is_out_of_memory
from .held_out import reword
from .score import Drift, score

logger = logging.getLogger(__name__)

_WHICH = slice(None, None, 2)  # of the rewordings: each costs as much as an edit
_AT_ONCE = 32  # texts a forward pass


@dataclass
class Trials:
    """A sample of the edits, and what tells how well they were made.

    Nothing of a request but its prompt and its target is looked at.

    Attributes:
        model: The model; its weights are the same after each trial.
        tokenizer: Its tokenizer.
        edits: The sample.
        hparams: Those of the run; place, rate and epochs are replaced.
        batch_size: Edits in a mini-batch.
        own: The edits as tokens, without an end of sequence.
        rewordings: Their prompts reworded, likewise.
        text: Unrelated text.
        packed: Whether rows are packed.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    edits: Sequence[Edit]
    hparams: LocFTBFHyperParams
    batch_size: int

    def __post_init__(self) -> None:
        self._drift: Drift | None = None
        prompts = [(edit, prompt) for edit in self.edits for prompt in reword(edit.prompt)[_WHICH]]
        self.own = self._tokens(self.edits)
        self.rewordings = self._tokens([replace(edit, prompt=prompt) for edit, prompt in prompts])
        self.text, why_not = health_texts(self.model, self.tokenizer)
        if why_not:
            raise ModelError(
                f"`layers=auto` weighs what an edit does to unrelated text, and {why_not}. Name a "
                "layer and a module."
            )
        with evaluation_mode(self.model):
            self.packed = self.hparams.packing and can_pack(self.model, self.rewordings)

    def _tokens(self, edits: Sequence[Edit]) -> TokenizedTexts:
        return tokenize_edits(
            self.tokenizer, edits, append_eos=False, max_positions=context_length(self.model)
        )

    def run(self, cell: Cell, epochs: int) -> TrialScores:
        """Makes the edits in at most so many epochs, measures, and takes them back."""
        if self._drift is None:
            self._drift = Drift(self.model, self.text, packed=self.packed)
        h = replace(
            cell.applied(self.hparams),
            num_steps=epochs,
            alg_name=ALG_NAME,  # alone: what the preset adds takes the place that suits it
            forms=None,
            augment_model=None,
            preserve=None,
            batch_size=self.batch_size,
            min_batches=None,
            repairs=None,
            on_conflict="train",
            prefix_dir=None,
            compile_layers=False,  # takes longer than a trial
            checkpoint_dir=None,
            health_check=False,
        )
        requests = [{"prompt": e.prompt, "target_new": e.target} for e in self.edits]
        result: EditResult | None = None
        try:
            with EditSession(
                self.model, self.tokenizer, requests, h, progress=False, world=SINGLE_PROCESS
            ) as session:
                result = session.train_()
        except Exception as error:
            if not (isinstance(error, NonFiniteLossError) or is_out_of_memory(error)):
                raise
            logger.info("%s was tried and failed: %s", cell.key, error)
        if result is None:  # outside the handler: its frames hold the tensors that have to go
            gc.collect()
            torch.cuda.empty_cache()
            return TrialScores()
        try:
            learned, reworded = self._likely(self.own), self._likely(self.rewordings)
            drift = self._drift.measure()
        finally:
            result.restore_(self.model)
        return TrialScores(learned, reworded, drift, score(learned, reworded, drift))

    @torch.no_grad()
    def _likely(self, texts: TokenizedTexts) -> float:
        """Returns the targets' mean probability, of each the geometric mean over its tokens."""
        runner = TextRunner(
            self.model, texts, row_tokens=self.hparams.row_tokens, packed=self.packed, prefix=None
        )
        total = 0.0
        with evaluation_mode(self.model), runner.running():
            for start in range(0, len(texts), _AT_ONCE):
                losses = runner.edit_losses(np.arange(start, min(start + _AT_ONCE, len(texts))))
                total += float((-losses.double()).exp().sum())
        return total / len(texts)
