"""The frozen prefix: what no step of the training changes is computed once and replayed.

Nothing below the first trained parameter changes, so the hidden states that enter it are constants
of the training. They are recorded in one pass and kept in a store. In training the frozen part
steps aside, and the recorded states are put in where the trained part takes its input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from ..data.batching import fixed_batches, in_batches, length_sorted_batches, sequences_a_pass
from ..data.packing import Rows, lay_out
from ..data.sharing import lay_out_shared
from ..data.tokenization import TokenizedTexts
from ..modeling.devices import input_device, row_length
from ..modeling.forward import run_layout, with_masks
from ..utils.hashing import arrays_sha256, json_sha256
from .cut import Cut
from .state_file import StateFile
from .store import Budget, StateStore

logger = logging.getLogger(__name__)

_FEWER = 0.95  # of the cells: a mask of one's own is to pay


@dataclass(frozen=True, eq=False)
class Layout:
    """Texts, and how they are laid out in rows.

    Attributes:
        texts: The sequences.
        row_tokens: As for `lay_out`, like those below.
        packed: Whether rows hold several sequences.
        first_position: Position of each sequence's first token, [N]; `None` for 0.
        fixed: Cells of the fixed shapes that rows have; 0 for none.
        shared: Whether beginnings that texts of a packed row have in common are there once, where
            that makes rows notably fewer. Such rows can be run, but not recorded: not every token
            of each text is in them.
    """

    texts: TokenizedTexts
    row_tokens: int
    packed: bool
    first_position: np.ndarray | None = None
    fixed: int = 0
    shared: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences that are run: the last of each is not."""
        return int(self.texts.input_offsets[-1])

    def rows(self, model: PreTrainedModel, batch: np.ndarray) -> Rows:
        """Returns the rows, on the host, in which a model runs the sequences `batch`, [B]."""
        row_tokens = row_length(model, self.row_tokens)
        rows = lay_out(
            self.texts,
            batch,
            row_tokens=row_tokens,
            packed=self.packed,
            first_position=self.first_position,
            fixed=self.fixed,
        )
        if self.shared:
            at_most = _FEWER * rows.token_index.numel()
            fewer = lay_out_shared(self.texts, batch, row_tokens=row_tokens, at_most=at_most)
            rows = rows if fewer is None else fewer
        return with_masks(model, rows)

    def batches(self, batch_size: int, only: np.ndarray | None = None) -> list[np.ndarray]:
        """Returns the sequences, or those of `only`, in batches, those of most cells first.

        Args:
            batch_size: Sequences a batch; where rows have fixed shapes these say how many.
            only: Indices of sequences.
        """
        indices = np.arange(len(self.texts)) if only is None else only
        if not self.fixed:
            batches = length_sorted_batches(self.texts.lengths[indices], batch_size)
        else:
            n_scored = (self.texts.lengths - self.texts.target_start)[indices]
            batches = fixed_batches(self.texts.input_lengths[indices], n_scored, self.fixed)
        return [indices[batch] for batch in batches]

    def recorded_at_once(self, device: torch.device, batch_size: int) -> int:
        """Returns how many sequences a pass takes that records their states.

        Args:
            device: A GPU takes more, which fewer would leave idle.
            batch_size: How many elsewhere.
        """
        mean = float(self.texts.input_lengths.mean())
        return max(batch_size, sequences_a_pass(mean)) if device.type == "cuda" else batch_size

    def key(self) -> str:
        """Returns what tells these texts in these rows from all others.

        The rows count as well: they move the last bits of a state, and what a place finds must not
        depend on which place came first.
        """
        first = np.zeros(0) if self.first_position is None else self.first_position
        tokens = arrays_sha256(self.texts.ids, self.texts.offsets, first)
        return json_sha256([self.row_tokens, self.packed, self.fixed, tokens])


class PrefixRecorder(Protocol):
    """States of frozen layers that are there already, for several prefixes."""

    def fill(self, prefix: FrozenPrefix, layout: Layout, batch_size: int) -> bool:
        """Returns whether `prefix` now has the states of these texts."""


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
        source: Records the states of all prefixes that wait for it, if frozen layers are not
            resident.
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
        self.source: Callable[[], None] | None = None
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
            self.source()

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
        layout: Layout,
        batch_size: int,
        *,
        below: StateStore | None = None,
        progress: bool = False,
    ) -> None:
        """Runs what is frozen, and nothing else, over all sequences and keeps what leaves it.

        Args:
            layout: The sequences.
            batch_size: Sequences a forward pass.
            below: The states that enter the first trained layer, [T, D]: what is below it does
                not run. `None` runs it.
            progress: Show a progress bar.

        Raises:
            MemoryBudgetError: The budgets cannot hold the states.
            OutputError: The disk is full or cannot be written to.
        """
        ids = torch.from_numpy(layout.texts.ids).to(input_device(self.model))
        entry = replace(self.cut, kind="layer")

        def run(batch: np.ndarray) -> None:
            rows = layout.rows(self.model, batch)
            self.run(rows, ids, self.keeping(rows, go_on=False), entry, below)

        try:
            in_batches(
                layout.batches(batch_size),
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

    @torch.no_grad()
    def run(
        self,
        on_host: Rows,
        ids: torch.Tensor,
        keeping: AbstractContextManager[None],
        entry: Cut | None = None,
        below: StateStore | None = None,
    ) -> None:
        """Runs the model over some rows: all of it, or from the states `below` that enter `entry`.

        Args:
            on_host: The layout, on the host.
            ids: All token ids, on the device that the model takes its input on.
            keeping: Context manager that keeps states of the pass.
            entry: Where the pass begins.
            below: The states there.
        """
        rows = on_host.to(ids.device)
        if entry is None or below is None:
            with keeping:
                run_layout(self.model, rows, input_ids=ids[rows.gather_index])
            return
        states = below.get_rows(on_host)  # [R, L, D]
        # What keeps states comes last, and sees those that are put in.
        with entry.replaying(lambda: states), keeping:
            run_layout(self.model, rows, **self.inputs(states, rows, ids))

    @contextmanager
    def keeping(self, rows: Rows, *, go_on: bool = True) -> Iterator[None]:
        """Context manager that keeps the states at the cut of a forward pass over `rows`.

        Args:
            rows: The layout that is run, on the host.
            go_on: Let the pass go on to the logits; else it ends there.
        """

        def keep(states: torch.Tensor) -> None:
            if self._store is None:
                self._store = self.new_store(states.shape[-1], states.dtype, states.device)
            self._store.put_rows(rows, states)

        with self.cut.recording(keep, go_on=go_on):
            yield

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

    def inputs(
        self, states: torch.Tensor, rows: Rows, ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns what to give the model where `states` are put in: the tokens, or zeros.

        Args:
            states: The states that are put in, [R, L, W].
            rows: The layout, on the model's device.
            ids: All token ids, where the model takes its input.
        """
        if self.cut.reads_tokens:
            return {"input_ids": ids[rows.gather_index]}
        shape = (*states.shape[:2], self._embedding_width)
        # Whole, since some models write into what they are given.
        return {"inputs_embeds": torch.zeros(shape, dtype=states.dtype, device=ids.device)}
