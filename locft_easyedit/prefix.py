"""The frozen prefix: what the layers below the place compute is computed once and replayed.

No layer below the first trained one changes, so the hidden states that enter it are constants of
the training. They are recorded in one pass and kept packed, [T, D] for all T tokens. In training
the frozen layers step aside, and the recorded states are put in where the first trained layer
takes its input. Layers keep their numbers, so that masks and types that depend on them stay right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .packing import Rows, lay_out, length_sorted_batches
from .place import LayerList
from .tokens import TokenizedTexts

# A GPU keeps the states itself while they take at most this part of its free memory.
_GPU_SHARE = 0.25


class _Recorded(Exception):
    """Ends a forward pass at the first trained layer; never leaves this module."""


class _PassThrough(nn.Module):
    """Stands in for a frozen layer: gives its input back in the form the layer would."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        # Models read these from the layer to choose a mask; the layer itself must not be a child.
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self.returns_tuple else hidden


class FrozenPrefix:
    """The hidden states of all edits at the input of the first trained layer.

    Args:
        model: The model.
        stack: Its layers.
        first_layer: The first trained layer.
        n_tokens: Tokens of all edits, T.
    """

    def __init__(
        self, model: PreTrainedModel, stack: LayerList, first_layer: int, n_tokens: int
    ) -> None:
        self.model = model
        self.stack = stack
        self.first_layer = first_layer
        self._n_tokens = n_tokens
        self._states: torch.Tensor | None = None  # [T, D] once something is recorded
        self._returns_tuple = False

    @property
    def states(self) -> torch.Tensor:
        """The recorded hidden states, [T, D], in the model's precision."""
        if self._states is None:
            raise RuntimeError("Nothing was recorded yet.")
        return self._states

    def record(
        self,
        texts: TokenizedTexts,
        ids: torch.Tensor,
        *,
        batch_size: int,
        row_tokens: int,
        packed: bool,
        progress: bool,
    ) -> None:
        """Runs the frozen layers over all sequences once and keeps what leaves them.

        Args:
            texts: The sequences.
            ids: Their token ids on the model's device, [T].
            batch_size: Sequences a forward pass.
            row_tokens: As for `lay_out`.
            packed: As for `lay_out`.
            progress: Show a progress bar.
        """
        batches = length_sorted_batches(texts.lengths, batch_size)
        with tqdm(total=len(texts), desc="frozen prefix", unit="edit", disable=not progress) as bar:
            for batch in batches:
                rows = lay_out(texts, batch, row_tokens=row_tokens, packed=packed)
                self._record_rows(rows.to(ids.device), ids)
                bar.update(len(batch))

    @torch.no_grad()
    def _record_rows(self, rows: Rows, ids: torch.Tensor) -> None:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]  # [R, L, D]
            self._keep(hidden, rows)
            raise _Recorded

        def note_form(module: nn.Module, args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)

        hooks = [self._first.register_forward_pre_hook(keep, with_kwargs=True)]
        if self.first_layer > 0:
            hooks.append(self.stack.layers[0].register_forward_hook(note_form))
        try:
            self.model(
                input_ids=ids[rows.gather_index],
                position_ids=rows.position_ids,
                attention_mask=rows.attention_mask,
                use_cache=False,
            )
        except _Recorded:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, hidden: torch.Tensor, rows: Rows) -> None:
        if self._states is None:
            self._states = _empty_store(self._n_tokens, hidden)
        real = rows.real
        where = rows.token_index[real].to(self._states.device)
        self._states[where] = hidden[real.to(hidden.device)].to(self._states.device)

    @property
    def _first(self) -> nn.Module:
        return self.stack.layers[self.first_layer]

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Takes the frozen layers out of the way; the module tree is restored in any case."""
        layers = self.stack.layers
        originals = [layers[i] for i in range(self.first_layer)]
        try:
            for i, layer in enumerate(originals):
                layers[i] = _PassThrough(layer, self._returns_tuple)
            yield
        finally:
            for i, layer in enumerate(originals):
                layers[i] = layer

    @contextmanager
    def put_in(self, rows: Rows, device: torch.device) -> Iterator[torch.Tensor]:
        """Within, the first trained layer receives the recorded states of `rows`.

        Args:
            rows: The layout, on the host.
            device: Where the model takes its input.

        Yields:
            Zeros to give the model as `inputs_embeds`, [R, L, D of the embedding].
        """
        states = self.states
        if states.device.type == "cpu" and device.type == "cuda":
            hidden = states[rows.gather_index].pin_memory().to(device, non_blocking=True)
        else:
            hidden = states[rows.gather_index.to(states.device, non_blocking=True)]  # [R, L, D]

        def substitute(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = args[0] if args else kwargs["hidden_states"]
            states_here = hidden.to(given.device)
            if args:
                return (states_here, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states_here}

        embedding: Any = self.model.get_input_embeddings()
        width = int(embedding.weight.shape[1])
        zeros = torch.zeros(1, 1, width, dtype=hidden.dtype, device=device)
        hook = self._first.register_forward_pre_hook(substitute, with_kwargs=True)
        try:
            yield zeros.expand(*rows.token_index.shape, width)
        finally:
            hook.remove()


def _empty_store(n_tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    """Returns room for [T, D] states: on the GPU while it is small there, else on the host."""
    width, device = hidden.shape[-1], hidden.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if n_tokens * width * hidden.element_size() > _GPU_SHARE * free:
            return torch.empty(n_tokens, width, dtype=hidden.dtype)  # a batch is pinned when used
    return torch.empty(n_tokens, width, dtype=hidden.dtype, device=device)
