"""The frozen prefix: what no step of the training changes is computed once and replayed.

Nothing below the first trained parameter changes, so the hidden states that enter it are constants
of the training. They are recorded in one pass and kept in a store. In training the frozen part
steps aside, and the recorded states are put in where the trained part takes its input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.batching import in_batches
from ..data.packing import Rows, lay_out
from ..data.tokenization import TokenizedTexts
from ..modeling.devices import input_device, row_length
from .cut import Cut, layer_cut
from .state_file import StateFile
from .store import Budget, StateStore

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What can record the states of frozen layers that are not resident."""

    def run(self) -> None:
        """Records the states of all prefixes that wait for it."""


class PrefixRecorder(Protocol):
    """States of frozen layers that are there already, for several prefixes."""

    def fill(
        self,
        prefix: FrozenPrefix,
        texts: TokenizedTexts,
        *,
        batch_size: int,
        row_tokens: int,
        packed: bool,
        first_position: np.ndarray | None = None,
    ) -> bool:
        """Returns whether `prefix` now has the states of `texts`."""


class FrozenPrefix:
    """The hidden states of all sequences where the trained part begins.

    Args:
        model: The model.
        cut: Where it begins.
        n_tokens: Tokens of all sequences that are run, T (the last of each is not).
        budget: Where the states may lie.
        kept: A file that outlives this run, and a hash of what the states depend on.

    Attributes:
        complete: Whether every sequence was recorded, so that they can be replayed.
        source: A stream of frozen layers that will record them, if they are not resident.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cut: Cut,
        n_tokens: int,
        budget: Budget | None = None,
        kept: tuple[Path, str] | None = None,
    ) -> None:
        self.model = model
        self.cut = cut
        self.n_tokens = n_tokens
        self.budget = budget or Budget()
        self.complete = False
        self.source: Source | None = None
        self._kept = kept
        self._store: StateStore | None = None
        self._borrowed = False
        self._fed: torch.Tensor | None = None
        embedding: Any = model.get_input_embeddings()
        self._embedding_width = int(embedding.weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the states lie or are to lie: on the device of the cut, where they are used."""
        if self._store is not None:
            return self._store.device
        return self.cut.device or input_device(self.model)

    def fits(self) -> bool:
        """Returns whether the budgets can hold the states; warns if not."""
        width = self.cut.width or self._embedding_width
        allowed = self.budget.rows(width * self.model.dtype.itemsize, self.device)
        if sum(allowed) < self.n_tokens:
            logger.warning(
                "The frozen prefix of %d tokens takes %.2f GiB, more than is allowed or free: all "
                "layers run in every measurement instead.",
                self.n_tokens,
                self.n_tokens * width * self.model.dtype.itemsize / 2**30,
            )
        return sum(allowed) >= self.n_tokens

    @property
    def store(self) -> StateStore:
        """The recorded states, [T, W], in the model's precision."""
        if self._store is None:
            raise RuntimeError("Nothing was recorded yet.")
        return self._store

    def ensure(self) -> None:
        """Has the states recorded by the stream of frozen layers, if they are to come from it."""
        if not self.complete and self.source is not None:
            self.source.run()

    def reuse(self, *, progress: bool = False) -> bool:
        """Returns whether the file of an earlier run holds the very states; then they are here."""
        if self._kept is None:
            return False
        path, fingerprint = self._kept
        file, why_not = StateFile.open_whole(
            path, fingerprint, self.n_tokens, self.cut.width, self.model.dtype, progress=progress
        )
        if file is None:
            logger.info("The prefix in %s is not used: %s. It is computed.", path, why_not)
            return False
        store = StateStore(
            self.n_tokens, file.width, file.dtype, self.device, self.budget, file=file
        )
        store.fill_from_file_()
        self._store, self.complete = store, True
        logger.info("The prefix of an earlier run is used: %s.", path)
        return True

    def new_store(self, width: int, dtype: torch.dtype, device: torch.device) -> StateStore:
        """Returns an empty store for the states of all sequences.

        Raises:
            MemoryBudgetError: The budgets cannot hold it.
            OutputError: The disk is full or cannot be written to.
        """
        path = None if self._kept is None else self._kept[0]
        return StateStore(self.n_tokens, width, dtype, device, self.budget, path=path)

    def holds(self, store: StateStore) -> bool:
        """Returns whether `store` is what the states are replayed from."""
        return self._store is store

    def adopt(self, store: StateStore) -> None:
        """Takes over a store that holds the states of all sequences."""
        if self._kept is not None and store.file is not None:
            store.file.seal(self._kept[1])
        self._store, self.complete = store, True

    def borrow(self, store: StateStore) -> None:
        """Replays a store that holds the states of all sequences and belongs to its maker."""
        self._store, self.complete, self._borrowed = store, True, True

    def close(self) -> None:
        """Gives back what recorded states took, unless they belong to another."""
        if self.complete and not self._borrowed:
            self.store.close()

    def record(
        self,
        texts: TokenizedTexts,
        ids: torch.Tensor,
        *,
        batch_size: int,
        row_tokens: int,
        packed: bool,
        progress: bool,
        first_position: np.ndarray | None = None,
        below: StateStore | None = None,
    ) -> None:
        """Runs what is frozen, and nothing else, over all sequences and keeps what leaves it.

        Args:
            texts: The sequences.
            ids: Their token ids on the model's device, [T].
            batch_size: Sequences a forward pass.
            row_tokens: As for `lay_out`.
            packed: As for `lay_out`.
            progress: Show a progress bar.
            first_position: As for `lay_out`.
            below: The states that enter the first trained layer, [T, D]: what is below it does
                not run. `None` runs it.

        Raises:
            MemoryBudgetError: The budgets cannot hold the states.
            OutputError: The disk is full or cannot be written to.
        """
        row_tokens = row_length(self.model, row_tokens)
        entry = layer_cut(self.cut.stack, self.cut.first_layer, self.cut.returns_tuple)

        def run(batch: np.ndarray) -> None:
            on_host = lay_out(
                texts, batch, row_tokens=row_tokens, packed=packed, first_position=first_position
            )
            rows = on_host.to(ids.device)
            begin: AbstractContextManager[None] = nullcontext()
            inputs = {"input_ids": ids[rows.gather_index]}
            if below is not None:
                states = below.get(on_host.state_index.clamp(min=0))  # [R, L, D]
                begin = entry.replaying(lambda: states)
                inputs = {"inputs_embeds": self.zeros(states, ids.device)}
            with begin, self.keeping(on_host, go_on=False), torch.no_grad():
                self.model(
                    **inputs,
                    position_ids=rows.position_ids,
                    attention_mask=rows.attention_mask,
                    use_cache=False,
                )

        try:
            in_batches(
                texts.lengths,
                batch_size,
                run,
                description="frozen prefix",
                unit="edit",
                progress=progress,
            )
            self.adopt(self.store)
        except BaseException:
            if self._store is not None:
                self._store.close()
                self._store = None
            raise

    @contextmanager
    def keeping(self, rows: Rows, *, go_on: bool = True) -> Iterator[None]:
        """Context manager that keeps the states at the cut of a forward pass over `rows`.

        Args:
            rows: The layout that is run, on the host.
            go_on: Let the pass go on to the logits; else it ends there.
        """
        cells = rows.real.flatten().nonzero().squeeze(1)
        where = rows.state_index.flatten()[cells]

        def keep(states: torch.Tensor) -> None:
            if self._store is None:
                self._store = self.new_store(states.shape[-1], states.dtype, states.device)
            self._store.put(where, states.flatten(0, 1)[cells.to(states.device)])

        with self.cut.recording(keep, go_on=go_on):
            yield

    def states(self, rows: Rows) -> torch.Tensor:
        """Returns the states of `rows` (on the host), [R, L, W]; filler cells hold anything."""
        return self.store.get(rows.state_index.clamp(min=0))

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Context manager that begins passes at the cut; the module tree is always restored."""

        def fed() -> torch.Tensor:
            assert self._fed is not None
            return self._fed

        try:
            with self.cut.replaying(fed):
                yield
        finally:
            self._fed = None

    def feed(self, states: torch.Tensor) -> None:
        """Lets the next forward pass begin with `states`, [R, L, W]."""
        self._fed = states

    def zeros(self, states: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Returns what to give the model as `inputs_embeds`, [R, L, D of the embedding].

        Args:
            states: As `states` returns them, [R, L, W].
            device: Where the model takes its input.
        """
        zeros = torch.zeros(1, 1, self._embedding_width, dtype=states.dtype, device=device)
        return zeros.expand(*states.shape[:2], self._embedding_width)
