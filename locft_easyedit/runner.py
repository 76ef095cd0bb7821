"""How a batch of texts is run: the fastest way that gives this model's own logits.

Packing and the frozen prefix change nothing in the result for the architectures of transformers
that follow its conventions. Whether a model does is measured, not assumed: before training, a few
edits are run both ways.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .forward import mean_by_owner, run_rows
from .packing import Rows, lay_out
from .place import Place
from .prefix import FrozenLayers, FrozenPrefix
from .tokens import TokenizedTexts

logger = logging.getLogger(__name__)

# Relative error ||a - b|| / ||b|| of the logits. Rounding gives about 1e-6 in float32 and 1e-2 in
# the half precisions; a wrong mask, position or layer gives 0.1 and more.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 4e-2
_MOST_TOLERATED = 0.1
_N_PROBES = 4


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
    ) -> None:
        self.model = model
        self.texts = texts
        self.row_tokens = row_tokens
        self.packed = packed
        self.prefix = prefix
        self.first_position = first_position
        self.device = input_device(model)
        self.ids = torch.from_numpy(texts.ids).to(self.device)

    @contextmanager
    def ready(self) -> Iterator[TextRunner]:
        """Within, batches can be run; the model's module tree is as it was afterwards."""
        replay = self.prefix is not None and self.prefix.complete
        with self.prefix.replaying() if self.prefix and replay else nullcontext():
            yield self

    def logits(self, batch: np.ndarray) -> tuple[torch.Tensor, Rows]:
        """Returns the logits that predict the batch's target tokens, [S, V], and the layout."""
        on_host = lay_out(
            self.texts,
            batch,
            row_tokens=self.row_tokens,
            packed=self.packed,
            first_position=self.first_position,
        )
        rows = on_host.to(self.device)
        if self.prefix is not None and self.prefix.complete:
            with self.prefix.put_in(on_host, self.device) as zeros:
                return run_rows(self.model, rows, inputs_embeds=zeros), rows
        with self.prefix.keeping(rows) if self.prefix else nullcontext():
            return run_rows(self.model, rows, input_ids=self.ids[rows.gather_index]), rows

    def edit_losses(self, batch: np.ndarray) -> torch.Tensor:
        """Returns each edit's loss, [B] float32: the mean cross-entropy of its target tokens."""
        logits, rows = self.logits(batch)
        labels = self.ids[rows.label_index].to(logits.device)
        token_losses = F.cross_entropy(logits.float(), labels, reduction="none")  # [S]
        return mean_by_owner(token_losses, rows.owner.to(logits.device), len(batch))


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that takes the model's token ids."""
    embedding: Any = model.get_input_embeddings()
    hook: Any = getattr(embedding, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:  # offloaded by accelerate
        return torch.device(hook.execution_device)
    device: torch.device = embedding.weight.device
    return device


def context_length(model: PreTrainedModel) -> int | None:
    """Returns the model's context in tokens, if its configuration names one."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text_config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def can_pack(model: PreTrainedModel, texts: TokenizedTexts) -> bool:
    """Returns whether packed rows give the model's own logits; warns if they do not."""
    probes = _probes(texts)
    reference = _plain_logits(model, probes)
    return _packs(model, probes, reference, _tolerance(model, probes, reference))


def choose_runner(
    model: PreTrainedModel,
    texts: TokenizedTexts,
    place: Place,
    *,
    row_tokens: int,
    batch_size: int,
    packing: bool = True,
    frozen_prefix: bool = True,
    progress: bool = False,
) -> TextRunner:
    """Returns the fastest runner that gives the model's own logits, with its prefix recorded.

    Args:
        model: The model, in evaluation mode.
        texts: All edits as tokens.
        place: What is trained.
        row_tokens: Length of packed rows.
        batch_size: Sequences a forward pass while the prefix is recorded.
        packing: Allow packed rows.
        frozen_prefix: Allow the frozen prefix.
        progress: Show a progress bar.
    """
    probes = _probes(texts)
    reference = _plain_logits(model, probes)
    tolerance = _tolerance(model, probes, reference)

    packed = packing and _packs(model, probes, reference, tolerance)
    why_not = "it is turned off" if not frozen_prefix else _why_no_prefix(place)
    if why_not is None:
        try:
            # Recorded in other rows than it is replayed in: a layer that keeps something of an
            # earlier pass for a later layer must not find it by luck.
            prefix = _recorded(model, place, probes, packed=packed, row_tokens=1)
            error = _error_of(_probe_runner(model, probes, packed=packed, prefix=prefix), reference)
            if error > tolerance:
                why_not = f"replaying it changes the logits (relative error {error:.1e})"
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            KeyError,
            IndexError,
        ) as failure:
            # Unknown architectures may refuse in any way that Python code can; an edit is still
            # possible without the prefix, and the warning says what happened.
            why_not = f"its layers cannot be split ({type(failure).__name__}: {failure})"
    if why_not is not None:
        if frozen_prefix:
            logger.warning(
                "No frozen prefix for %s: %s. Every step runs the full model.",
                type(model).__name__,
                why_not,
            )
        return TextRunner(model, texts, row_tokens=row_tokens, packed=packed, prefix=None)
    prefix = _recorded(
        model,
        place,
        texts,
        packed=packed,
        row_tokens=row_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return TextRunner(model, texts, row_tokens=row_tokens, packed=packed, prefix=prefix)


def _tolerance(
    model: PreTrainedModel, probes: TokenizedTexts, reference: list[torch.Tensor]
) -> float:
    """Returns the relative error that counts as rounding."""
    dtype = reference[0].dtype
    if dtype == torch.float32:
        return _TOLERANCE
    # Rounding adds up with depth in the half precisions: ordinary padding shows how much.
    padded = _error_of(_probe_runner(model, probes, packed=False, prefix=None), reference)
    return min(max(_HALF_TOLERANCE, 3 * padded), _MOST_TOLERATED)


def _packs(
    model: PreTrainedModel, probes: TokenizedTexts, reference: list[torch.Tensor], tolerance: float
) -> bool:
    error = _error_of(_probe_runner(model, probes, packed=True, prefix=None), reference)
    if error > tolerance:
        logger.warning(
            "Packed rows change the logits of %s (relative error %.1e, allowed %.0e): rows are "
            "padded instead, which costs more time.",
            type(model).__name__,
            error,
            tolerance,
        )
    return error <= tolerance


def _why_no_prefix(place: Place) -> str | None:
    if place.stack is None:
        return "no list of layers as long as `config.num_hidden_layers` was found in it"
    if place.first_layer is None:
        return "a trained parameter lies outside its layers"
    return None


def _recorded(
    model: PreTrainedModel,
    place: Place,
    texts: TokenizedTexts,
    *,
    packed: bool,
    row_tokens: int,
    batch_size: int = _N_PROBES,
    progress: bool = False,
) -> FrozenPrefix:
    assert place.stack is not None
    assert place.first_layer is not None
    frozen = FrozenLayers(place.stack, place.first_layer)
    prefix = FrozenPrefix(model, frozen, len(texts.ids))
    prefix.record(
        texts,
        torch.from_numpy(texts.ids).to(input_device(model)),
        batch_size=batch_size,
        row_tokens=row_tokens,
        packed=packed,
        progress=progress,
    )
    return prefix


def _probes(texts: TokenizedTexts) -> TokenizedTexts:
    """Returns the longest, the shortest and a few edits between as texts of their own."""
    order = np.argsort(texts.lengths, kind="stable")
    chosen = sorted({int(i) for i in np.linspace(0, len(order) - 1, _N_PROBES)})
    sequences = [texts.ids[texts.offsets[i] : texts.offsets[i + 1]].tolist() for i in order[chosen]]
    return TokenizedTexts.from_lists(sequences, texts.target_start[order[chosen]].tolist())


def _probe_row(probes: TokenizedTexts) -> int:
    """Returns a row length that makes several rows, some of them with several probes."""
    return int(probes.lengths.max() + probes.lengths.min())


def _probe_runner(
    model: PreTrainedModel, probes: TokenizedTexts, *, packed: bool, prefix: FrozenPrefix | None
) -> TextRunner:
    return TextRunner(model, probes, row_tokens=_probe_row(probes), packed=packed, prefix=prefix)


@torch.no_grad()
def _plain_logits(model: PreTrainedModel, probes: TokenizedTexts) -> list[torch.Tensor]:
    """Returns the logits of each probe run alone, nothing of ours in between, each [S, V]."""
    device = input_device(model)
    parts: list[torch.Tensor] = []
    for i in range(len(probes)):
        ids = torch.from_numpy(probes.ids[probes.offsets[i] : probes.offsets[i + 1]]).to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]  # [L, V]
        parts.append(logits[int(probes.target_start[i]) - 1 : -1])
    return parts


@torch.no_grad()
def _error_of(runner: TextRunner, reference: list[torch.Tensor]) -> float:
    """Returns the relative error of the logits, with the probes in the opposite order."""
    batch = np.arange(len(runner.texts))[::-1]
    with runner.ready():
        logits, _ = runner.logits(batch)
    expected = torch.cat([reference[i] for i in batch]).float()
    difference = (logits.float() - expected).norm() / expected.norm()
    return float(difference) if torch.isfinite(difference) else float("inf")
