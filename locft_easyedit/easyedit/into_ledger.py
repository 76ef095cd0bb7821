"""`ledger_dir`: an editor's calls with `sequential_edit=True` as events of one ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..distributed.world import get_world
from ..hparams import LocFTBFHyperParams
from ..ledger.binding import check_same_settings
from ..ledger.ledger import Ledger
from ..ledger.log import LOG
from ..training.result import EditResult
from ..training.session import EditSession

SOURCE = "EasyEdit"


class EditorLedger:
    """The ledger that `ledger_dir` names: there already, or begun with the first edits.

    Args:
        hparams: The editor's hyper-parameters; a place that the ledger has chosen is put in.
        model: The editor's model, as it was loaded.
        tokenizer: Its tokenizer.

    Attributes:
        hparams: The hyper-parameters with the ledger's place.
        base: The base model's values of what the ledger has changed so far.

    Raises:
        LocFTError: The ledger cannot be used, is of other settings or of another model.
    """

    def __init__(self, hparams: LocFTBFHyperParams, model: Any, tokenizer: Any) -> None:
        self.hparams = hparams
        self.base: dict[str, torch.Tensor] = {}
        self._folder = Path(str(hparams.ledger_dir))
        self._model, self._tokenizer = model, tokenizer
        self._ledger: Ledger | None = None
        if get_world().broadcast_from_main((self._folder / LOG).is_file):
            self._ledger = ledger = Ledger.open(self._folder, model, tokenizer)
            if hparams.chooses and not ledger.hparams.chooses:
                there = ledger.hparams
                self.hparams = replace(
                    hparams,
                    layers=there.layers,
                    rewrite_module_tmp=there.rewrite_module_tmp,
                    lr=there.lr,
                )
            check_same_settings(ledger.log.events[0], self.hparams)
            _ = ledger.model  # with what came before
            if not ledger.hparams.chooses:
                self.base = ledger.matrices(0)

    def add_(self, session: EditSession, requests: Sequence[Mapping[str, Any]]) -> EditResult:
        """Adds requests to the ledger, and so to the model; returns what that did.

        Args:
            session: The session that was checked with them; its place is the ledger's.
            requests: EasyEdit's request dictionaries.

        Raises:
            LocFTError: As for `Ledger.add`.
        """
        if self._ledger is None:
            self._ledger = Ledger.init(self._folder, session.hparams, self._model, self._tokenizer)
        ledger, start = self._ledger, time.perf_counter()
        ledger.progress = session.progress
        before = ledger.matrices()
        added = ledger.add(requests, source=SOURCE)
        return EditResult(
            losses=[],
            step_losses=[],
            original=before,
            new=ledger.matrices(),
            timings=session.timings | {"train": time.perf_counter() - start},
            n_updates=0,
            converged=not added.lost,
            n_trained=len(added.facts),
            edits=session.edits,
            packed=session.shortcuts.packed,
            frozen_prefix=bool(session.shortcuts.cuts),
        )
