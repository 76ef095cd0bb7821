"""The hidden states that enter each layer: recorded in one pass, lent to the prefix of every place.

The frozen part of a place in layer 20 begins with that of a place in layer 12. One pass over a set
of texts keeps what enters each layer that a study visits; no place, and no learning rate, runs the
layers below again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.batching import in_batches
from ..data.packing import Rows
from ..errors import MemoryBudgetError, OutputError, PlaceError
from ..modeling.devices import input_device
from ..modeling.forward import run_layout
from ..modeling.modes import evaluation_mode
from ..modeling.places import LayerList, find_layers
from ..utils.hashing import sample_digest
from .cut import layer_cut
from .frozen_prefix import FrozenPrefix, Layout
from .store import Budget, StateStore

logger = logging.getLogger(__name__)


class SharedStates:
    """What enters some layers of a model, for every set of texts that is asked for.

    A context manager; leaving it gives all states back. Made before any edit. A set of texts is
    recorded when the first prefix over it is filled; a changed model is noticed by a sample of its
    weights, and only layers below which nothing has changed are recorded or lent.

    Args:
        model: The model, not edited yet.
        layers: The layers that places will be in.
        budget: Where the states may lie, all of them together. What prefixes inside a layer take
            is counted by their own budgets, on top.
        progress: Show progress bars.

    Attributes:
        n_passes: Passes over a set of texts so far.

    Raises:
        PlaceError: The model has no such layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Iterable[int],
        budget: Budget | None = None,
        *,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.layers = tuple(sorted(set(layers)))
        self.progress = progress
        self.n_passes = 0
        self._stack = find_layers(model)
        n_layers = len(self._stack.layers) if self._stack is not None else 0
        outside = [layer for layer in self.layers if not 0 <= layer < n_layers]
        if self._stack is not None and outside:
            raise PlaceError(
                f"`layers={outside}` is out of range; the model has {n_layers} layers (0 to "
                f"{n_layers - 1}). Choose among them."
            )
        self._given = budget or Budget()
        self._budget: Budget | None = None
        self._stores: dict[tuple[int, str], dict[int, StateStore]] = {}
        self._refused: set[tuple[int, str]] = set()
        self._unchanged: UnchangedLayers | None = None
        if self._stack is not None and self.layers:
            self._unchanged = UnchangedLayers(model, self._stack, self.layers[-1])

    def __enter__(self) -> SharedStates:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives all states back; prefixes that borrowed some cannot be replayed any more."""
        for stores in self._stores.values():
            for store in stores.values():
                store.close()
        self._stores = {}

    def fill(self, prefix: FrozenPrefix, layout: Layout, batch_size: int) -> bool:
        """Returns whether `prefix` is complete now; if not, it is as it was.

        Where it ends at the input of a layer it borrows the states; where it ends inside one, that
        layer alone runs, up to the cut, from what was recorded.

        Args:
            prefix: An empty prefix of this model, which can begin at the input of its layer.
            layout: The sequences.
            batch_size: Sequences a forward pass.
        """
        # What is recorded outlives this call, and a caller's inference mode with it.
        with evaluation_mode(self.model), torch.inference_mode(False), torch.no_grad():
            store = self._store_of(layout, batch_size, prefix)
            if store is None:
                return False
            if prefix.cut.kind == "layer":
                prefix.borrow(store)
                return True
            try:
                prefix.record(layout, batch_size, below=store, progress=self.progress)
            except (MemoryBudgetError, OutputError) as error:
                logger.debug("Not from the shared states: %s", error)
                return False
            return True

    def _store_of(self, layout: Layout, batch_size: int, prefix: FrozenPrefix) -> StateStore | None:
        """Returns what enters the layer of `prefix`, recorded now if need be; `None` if not."""
        layer, key = prefix.cut.first_layer, (batch_size, layout.key())
        ours = prefix.model is self.model and layer in self.layers and layout.n_tokens > 0
        if not ours or self._stack is None or self._unchanged is None:
            return None
        intact = self._unchanged.highest_unchanged_layer()
        if layer > intact:
            return None
        stores = self._stores.get(key, {})
        if layer not in stores:
            if key in self._refused:
                return None
            missing = [i for i in self.layers if i <= intact and i not in stores]
            try:
                recorded = self._recorded(self._stack, layout, batch_size, missing)
            except (MemoryBudgetError, OutputError) as error:
                if not self._refused:
                    logger.warning(
                        "The states that enter %d layers cannot be kept for %d tokens, so that "
                        "each place computes its own: %s",
                        len(missing),
                        layout.n_tokens,
                        error,
                    )
                self._refused.add(key)
                return None
            self._stores[key] = stores | recorded
        return self._stores[key][layer]

    def _recorded(
        self, stack: LayerList, layout: Layout, batch_size: int, layers: Sequence[int]
    ) -> dict[int, StateStore]:
        """Runs the model once over all texts, up to the last of `layers`; returns what enters each.

        Raises:
            MemoryBudgetError: The budget cannot hold the states.
            OutputError: The disk is full or cannot be written to.
        """
        stores: dict[int, StateStore] = {}
        device = input_device(self.model)
        ids = torch.from_numpy(layout.texts.ids).to(device)

        def keep(layer: int, rows: Rows, states: torch.Tensor) -> None:
            if layer not in stores:
                budget = self._resolved(device)
                n_tokens, width = layout.n_tokens, states.shape[-1]
                stores[layer] = StateStore(n_tokens, width, states.dtype, states.device, budget)
            stores[layer].put_rows(rows, states)

        def run(batch: np.ndarray) -> None:
            on_host = layout.rows(self.model, batch)
            rows = on_host.to(device)
            with ExitStack() as hooks:
                for layer in layers:
                    kept = partial(keep, layer, on_host)
                    recording = layer_cut(stack, layer).recording(kept, go_on=layer != layers[-1])
                    hooks.enter_context(recording)
                run_layout(self.model, rows, input_ids=ids[rows.gather_index])

        self.n_passes += 1
        try:
            in_batches(
                layout.batches(batch_size),
                run,
                description=f"hidden states of {len(layers)} layers",
                unit="text",
                progress=self.progress,
            )
        except BaseException:
            for store in stores.values():
                store.close()
            raise
        return stores

    def _resolved(self, device: torch.device) -> Budget:
        """Returns the budget with a size for each tier.

        A share of what is free, taken anew for each layer, would leave nothing free in the end.
        """
        if self._budget is None:
            gpu, host, disk = (n_bytes / 2**30 for n_bytes in self._given.rows(1, device))
            self._budget = Budget(gpu, host, disk, self._given.folder)
        return self._budget


class UnchangedLayers:
    """A sample of a model's weights below the layer `highest`, to be compared with later ones.

    An edit of a matrix changes nearly all of its numbers, so that a thousand of them tell it.
    """

    def __init__(self, model: nn.Module, stack: LayerList, highest: int) -> None:
        self.model = model
        self.stack = stack
        self.highest = highest
        self._original = self._samples()

    def highest_unchanged_layer(self) -> int:
        """Returns the highest layer, `highest` at most, whose input is what it was; -1 if none."""
        pairs = zip(self._original, self._samples(), strict=True)
        changed = (number - 1 for number, (before, now) in enumerate(pairs) if before != now)
        return next(changed, self.highest)

    def _samples(self) -> list[str]:
        """Returns a digest of what lies outside the layers, then one of each layer."""
        inside = f"{self.stack.path}."
        hashes = [hashlib.sha256() for _ in range(1 + self.highest)]
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                continue
            number = 1 + int(name[len(inside) :].split(".")[0]) if name.startswith(inside) else 0
            if number < len(hashes):
                hashes[number].update(f"{name} {sample_digest(parameter)} ".encode())
        return [sha.hexdigest() for sha in hashes]
