"""A batch of texts through the model: what is frozen left out, the rest run where it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..data.packing import Rows
from ..data.tokenization import TokenizedTexts
from ..modeling.compiled_layers import CompiledLayers
from ..modeling.cross_entropy import Head
from ..modeling.devices import input_device
from ..modeling.forward import mean_by_owner, run_rows, run_to_head
from ..modeling.fused_linears import FusedLinears
from ..modeling.last_layer import Tail, select
from .frozen_prefix import FrozenPrefix, Layout
from .prefetch import SideStreams


@dataclass
class Prepared:
    """A batch of texts, laid out and on its way to the device.

    Attributes:
        batch: The texts, B indices.
        rows: The layout on the model's device.
        on_host: The layout on the host.
        states: Recorded hidden states, [R, L, W]; `None` if the whole model runs.
    """

    batch: np.ndarray
    rows: Rows
    on_host: Rows
    states: torch.Tensor | None

    @property
    def n_texts(self) -> int:
        """Texts in the batch, B."""
        return len(self.batch)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields what lies on the device."""
        yield from self.rows.tensors()
        if self.states is not None:
            yield self.states


class TextRunner:
    """Runs batches of texts through the model: edits in training, prompts in evaluation.

    Args:
        model: The model.
        texts: All texts as tokens.
        row_tokens: Length of packed rows.
        packed: Whether rows are packed.
        prefix: The frozen prefix, or `None` for full forward passes. As long as it is not complete,
            passes are full and recorded.
        first_position: As for `lay_out`.
        tail: Lets the end of the model run at scored positions alone; `None` runs it everywhere.
        head: The output head, for losses in chunks; `None` takes the model's own logits.
        fixed: Cells of the fixed shapes that rows have, in which a text's logits depend on no other
            text; 0 for none.
        shared: Whether beginnings that texts of a packed row have in common run once.
        fused: Frozen matrices that are given the same tensor run as one, laid out for it; `None`
            runs each for itself.
        compiled: Layers whose passes with gradients are compiled; `None` runs all as they are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: TokenizedTexts,
        *,
        row_tokens: int,
        packed: bool,
        prefix: FrozenPrefix | None,
        first_position: np.ndarray | None = None,
        tail: Tail | None = None,
        head: Head | None = None,
        fixed: int = 0,
        shared: bool = False,
        fused: FusedLinears | None = None,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self.model = model
        self.texts = texts
        self.layout = Layout(texts, row_tokens, packed, first_position, fixed)
        self.shared = shared and packed
        self.packed = packed
        self.prefix = prefix
        self.tail = tail
        self.head = head
        self.fused = fused
        self.compiled = compiled
        self.device = input_device(model)
        self.ids = torch.from_numpy(texts.ids).to(self.device)
        self._now: Prepared | None = None
        self._running = False
        self._sides = SideStreams()

    @property
    def sides(self) -> list[torch.cuda.Stream]:
        """The streams on which batches are prepared, of each GPU that they lie on."""
        prefix = [] if self.prefix is None else [self.prefix.device]
        return self._sides.of([self.device, *prefix])

    @property
    def replays(self) -> bool:
        """Whether recorded states take the place of the frozen layers."""
        return self.prefix is not None and self.prefix.complete

    @property
    def prefetch_in_thread(self) -> bool:
        """Whether preparing a batch waits for a GPU or a disk, so that a thread pays."""
        on_disk = self.prefix is not None and self.replays and self.prefix.store.file is not None
        return self.device.type == "cuda" or on_disk

    @property
    def _above_attention(self) -> bool:
        """Whether scored positions are all that runs."""
        return self.prefix is not None and self.replays and self.prefix.cut.above_attention

    @property
    def narrowed(self) -> bool:
        """Whether the last layer gives hidden states at the scored positions alone."""
        # A pass that is recorded keeps all positions, those inside the last layer as well.
        return self._above_attention or (self.tail is not None and not self._records)

    @property
    def _records(self) -> bool:
        """Whether passes are full, and their states are kept."""
        return self.prefix is not None and not self.replays

    @contextmanager
    def running(self) -> Iterator[TextRunner]:
        """Context manager in which batches can be run; afterwards the module tree is as before.

        Within it another one changes nothing.
        """
        if self._running:
            yield self
            return
        if self.prefix is not None:
            self.prefix.ensure()
        with ExitStack() as stack:
            if self.prefix is not None and self.replays:
                stack.enter_context(self.prefix.replaying())
            if self.tail is not None and self.narrowed and not self._above_attention:
                stack.enter_context(self.tail.narrowed(self._scored))
            # What is recorded is the same to the bit with and without.
            if self.fused is not None and not self._records:
                stack.enter_context(self.fused.running())
            if self.compiled is not None and not self._records:
                stack.enter_context(self.compiled.running())
            self._running = True
            stack.callback(setattr, self, "_running", False)
            yield self

    def _scored(self) -> torch.Tensor:
        assert self._now is not None
        return self._now.rows.scored

    def prepare(self, batch: np.ndarray, *, whole: bool = False) -> Prepared:
        """Lays a batch out and fetches its states; touches nothing that a running step uses.

        Args:
            batch: The texts, [B].
            whole: Each text runs from its beginning, whatever it has in common with others.
        """
        shared = self.shared and not (whole or self._records or self._above_attention)
        on_host = replace(self.layout, shared=shared).rows(self.model, batch)
        replayed = self.prefix if self.replays else None
        states = None if replayed is None else replayed.store.get_rows(on_host)
        return Prepared(batch, on_host.to(self.device), on_host, states)

    def logits(self, batch: np.ndarray | Prepared) -> tuple[torch.Tensor, Rows]:
        """Returns the logits that predict the batch's target tokens, [S, V], and the layout."""
        now = batch if isinstance(batch, Prepared) else self.prepare(batch)
        with self._inputs(now) as inputs:
            logits = run_rows(self.model, now.rows, narrowed=self.narrowed, **inputs)
        return logits, now.rows

    def edit_losses(self, batch: np.ndarray | Prepared) -> torch.Tensor:
        """Returns each edit's loss, [B] float32: the mean cross-entropy of its target tokens."""
        now = batch if isinstance(batch, Prepared) else self.prepare(batch)
        labels = self.ids[now.rows.label_index]
        if self.head is None:
            logits, _ = self.logits(now)
            losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
        else:
            with self._inputs(now) as inputs, self._attention():
                hidden = run_to_head(self.model, now.rows, narrowed=self.narrowed, **inputs)
            losses = self.head.token_losses(hidden, labels)  # [S]
        return mean_by_owner(losses, now.rows.owner.to(losses.device), now.n_texts)

    def _attention(self) -> AbstractContextManager[None]:
        """Returns what makes attention choose the kernel that is fast for packed short rows.

        PyTorch chooses well but for one: a CPU's fused backward pass in the half precisions takes
        five times as long as plain matrix products.
        """
        slow = self.device.type == "cpu" and self.model.dtype != torch.float32
        return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()

    @contextmanager
    def _inputs(self, now: Prepared) -> Iterator[dict[str, torch.Tensor]]:
        """Yields what the model is given for a batch."""
        self._now = now
        try:
            if now.states is not None:
                assert self.prefix is not None
                inputs = self.prefix.inputs(now.states, now.rows, self.ids)
                alone = self._above_attention
                self.prefix.feed(select(now.states, now.rows.scored) if alone else now.states)
                yield inputs
                return
            with self.prefix.keeping(now.on_host) if self.prefix else nullcontext():
                yield {"input_ids": self.ids[now.rows.gather_index]}
        finally:
            self._now = None
