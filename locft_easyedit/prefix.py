"""The frozen prefix: what the layers below the place compute is computed once and replayed.

No layer below the first trained one changes, so the hidden states that enter it are constants of
the training. They are recorded in one pass and kept packed, [T, D] for all T tokens. In training
the frozen layers step aside, and the recorded states are put in where the first trained layer
takes its input. Layers keep their numbers, so that masks and types that depend on them stay right.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .batches import in_batches
from .packing import Rows, lay_out
from .place import LayerList
from .tokens import TokenizedTexts

logger = logging.getLogger(__name__)

# A GPU keeps the states itself while they take at most this part of its free memory.
_GPU_SHARE = 0.25
# States that merely save time in evaluation take at most this part of the host's free memory.
_HOST_SHARE = 0.25


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


@dataclass(frozen=True)
class FrozenLayers:
    """The layers that an edit leaves alone: those of `stack` below `first_layer`."""

    stack: LayerList
    first_layer: int


class FrozenPrefix:
    """The hidden states of all sequences at the input of the first trained layer.

    Args:
        model: The model.
        frozen: Its frozen layers.
        n_tokens: Tokens of all sequences, T.

    Attributes:
        complete: Whether every sequence was recorded, so that they can be replayed.
    """

    def __init__(self, model: PreTrainedModel, frozen: FrozenLayers, n_tokens: int) -> None:
        self.model = model
        self.frozen = frozen
        self.complete = False
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
        """Runs the frozen layers, and no others, over all sequences and keeps what leaves them.

        Args:
            texts: The sequences.
            ids: Their token ids on the model's device, [T].
            batch_size: Sequences a forward pass.
            row_tokens: As for `lay_out`.
            packed: As for `lay_out`.
            progress: Show a progress bar.
        """

        def run(batch: np.ndarray) -> None:
            rows = lay_out(texts, batch, row_tokens=row_tokens, packed=packed).to(ids.device)
            with self.keeping(rows, go_on=False), torch.no_grad():
                self.model(
                    input_ids=ids[rows.gather_index],
                    position_ids=rows.position_ids,
                    attention_mask=rows.attention_mask,
                    use_cache=False,
                )

        in_batches(
            texts.lengths,
            batch_size,
            run,
            description="frozen prefix",
            unit="edit",
            progress=progress,
        )
        self.complete = True

    @contextmanager
    def keeping(self, rows: Rows, *, go_on: bool = True) -> Iterator[None]:
        """Within, a forward pass over `rows` leaves its states at the first trained layer here.

        Args:
            rows: The layout that is run, on the model's device.
            go_on: Let the pass go on to the logits; else it ends there.
        """

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]  # [R, L, D]
            self._keep(hidden.detach(), rows)
            if not go_on:
                raise _Recorded

        def note_form(module: nn.Module, args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)

        hooks = [self._first.register_forward_pre_hook(keep, with_kwargs=True)]
        if self.frozen.first_layer > 0:
            hooks.append(self.frozen.stack.layers[0].register_forward_hook(note_form))
        try:
            yield
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
        return self.frozen.stack.layers[self.frozen.first_layer]

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Takes the frozen layers out of the way; the module tree is restored in any case."""
        layers = self.frozen.stack.layers
        originals = [layers[i] for i in range(self.frozen.first_layer)]
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


def fits_in_memory(model: PreTrainedModel, n_tokens: int) -> bool:
    """Returns whether the states of `n_tokens` tokens leave the host most of its free memory."""
    embedding: Any = model.get_input_embeddings()
    needed = n_tokens * int(embedding.weight.shape[1]) * embedding.weight.element_size()
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return True  # this system does not tell
    if needed > _HOST_SHARE * free:
        logger.warning(
            "The frozen prefix of the evaluation prompts would take %.1f of %.1f GiB of free "
            "memory: all layers run in every measurement instead.",
            needed / 2**30,
            free / 2**30,
        )
    return needed <= _HOST_SHARE * free


def _empty_store(n_tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    """Returns room for [T, D] states: on the GPU while it is small there, else on the host."""
    width, device = hidden.shape[-1], hidden.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if n_tokens * width * hidden.element_size() > _GPU_SHARE * free:
            return torch.empty(n_tokens, width, dtype=hidden.dtype)  # a batch is pinned when used
    return torch.empty(n_tokens, width, dtype=hidden.dtype, device=device)
