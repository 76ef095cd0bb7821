"""Trials of shortcuts on the model at hand: a few texts with and without each.

What changes the logits is not used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.tokenization import TokenizedTexts
from ..modeling.cross_entropy import Head, find_head
from ..modeling.devices import input_device, one_long_row
from ..modeling.forward import give_masks, mean_by_owner
from ..modeling.last_layer import Tail, find_tail
from ..modeling.places import Place
from .cut import Cut, find_cuts, layer_cut
from .frozen_prefix import FrozenPrefix, Layout
from .runner import TextRunner
from .store import Budget

logger = logging.getLogger(__name__)

# Relative error ||a - b|| / ||b|| of the logits. Rounding gives about 1e-6 in float32 and 1e-2 in
# the half precisions; a wrong mask, position or layer gives 0.1 and more.
TOLERANCE = 1e-4
_HALF_TOLERANCE = 4e-2
MOST_TOLERATED = 0.1
_N_PROBES = 4
# Unknown architectures may refuse in any way that Python code can.
REFUSALS = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    StopIteration,
)


class Probes:
    """A few texts and the logits that the untouched model gives for each alone.

    Args:
        model: The model, in evaluation mode.
        texts: All texts; the longest, the shortest and a few between are taken.
    """

    def __init__(self, model: PreTrainedModel, texts: TokenizedTexts) -> None:
        self.model = model
        order = np.argsort(texts.lengths, kind="stable")
        chosen = sorted({int(i) for i in np.linspace(0, len(order) - 1, _N_PROBES)})
        sequences = [
            texts.ids[texts.offsets[i] : texts.offsets[i + 1]].tolist() for i in order[chosen]
        ]
        starts = texts.target_start[order[chosen]].tolist()
        self.texts = TokenizedTexts.from_lists(sequences, starts)
        self.reference = self._plain_logits()
        self.tolerance = self._rounding()

    def packing(self) -> bool:
        """Returns whether packed rows are right; warns if not.

        Where they are right with masks that the model is given, it gets them from now on.
        """
        error = self._error_with_masks()
        if error > self.tolerance:
            error = min(error, self._error(self.runner(packed=True)))
        if error > self.tolerance:
            logger.warning(
                "Packed rows change the logits of %s (relative error %.1e, allowed %.0e): rows are "
                "padded instead, which costs more time.",
                type(self.model).__name__,
                error,
                self.tolerance,
            )
        return error <= self.tolerance

    def _error_with_masks(self) -> float:
        """Returns the error of packed rows whose masks the model is given, which it keeps if right.

        Infinity for a model that cannot take them. FlashAttention takes none.
        """
        error = math.inf
        if one_long_row(self.model):
            return error
        give_masks(self.model)
        with no_refusal():
            error = self._error(self.runner(packed=True))
        give_masks(self.model, error <= self.tolerance)
        return error

    def packing_anywhere(self) -> bool:
        """Returns whether packed rows are right where positions do not begin at 0.

        FlashAttention is told of the texts in a row by their zeros: a text that begins at another
        position would be taken for the end of the one before. Padded rows are right.
        """
        starts = np.array([3, 0, 4, 2])[: len(self.texts)]
        with torch.no_grad():
            expected = self._logits(self.runner(packed=False, first_position=starts))
        error = self._error(self.runner(packed=True, first_position=starts), expected)
        if error > self.tolerance:
            logger.debug("Texts that begin at other positions are not packed: %.1e off.", error)
        return error <= self.tolerance

    def sharing(self) -> bool:
        """Returns whether texts may share the beginning that they have in common in a row.

        Tried on two branches and more, a text within another, and one of its own.
        """
        if one_long_row(self.model):  # FlashAttention takes no mask of one's own
            return False
        texts = self.with_a_common_beginning()
        row_tokens, every = int(self.texts.lengths[-1]), np.arange(len(texts))
        runners = [
            TextRunner(self.model, texts, row_tokens=row_tokens, packed=shared, prefix=None,
                       shared=shared)
            for shared in (False, True)
        ]  # fmt: skip
        error = math.inf
        with no_refusal(), torch.no_grad():
            expected, found = (runner.logits(every)[0].float() for runner in runners)
            error = relative_error(found, expected)
        if error > self.tolerance:
            logger.debug("Beginnings that texts share run for each: %.1e off.", error)
        return error <= self.tolerance

    def with_a_common_beginning(self) -> TokenizedTexts:
        """Returns texts that begin like the longest one and go on like others."""
        longest = self.texts.ids[self.texts.offsets[-2] :].tolist()
        half = max(len(longest) // 2, 1)
        others = [self.texts.ids[a:b].tolist() for a, b in pairwise(self.texts.offsets.tolist())]
        branches = [longest[:half] + other[-half:] for other in others[:-1]]
        sequences = [longest, *branches, longest[: half + 1], others[0]]
        return TokenizedTexts.from_lists(
            sequences, [max(len(sequence) - half, 1) for sequence in sequences]
        )

    def tail(self, place: Place, packed: bool) -> Tail | None:
        """Returns the end of the model, if it may run at scored positions alone."""
        if place.stack is None:
            return None
        with no_refusal():
            tail = find_tail(place.stack, self.run_one)
            if tail and self._error(self.runner(packed=packed, tail=tail)) <= self.tolerance:
                return tail
        return None

    def head(self, place: Place, packed: bool) -> Head | None:
        """Returns the output head, if its losses are those of the model's own logits."""
        if place.stack is None or place.first_layer is None:
            return None  # the head may be what is trained
        with no_refusal():
            head = find_head(self.model)
            if head is not None and self._loss_error(head, packed) <= self.tolerance:
                return head
        return None

    def cuts(
        self, place: Place, packed: bool, *, on_disk: bool = False
    ) -> tuple[tuple[Cut, ...], str]:
        """Returns the cuts at which recorded states can be put in, and why there is none.

        Where there is none in the first trained layer, because layers share something on their way
        (keys, say), the highest layer below is taken that can be begun at.

        Args:
            place: What is trained.
            packed: Whether rows are packed.
            on_disk: The layers below the first trained one are not resident.
        """
        if place.stack is None:
            return (), "no list of layers as long as `config.num_hidden_layers` was found in it"
        if place.first_layer is None:
            return (), "a trained parameter lies outside its layers"
        candidates = [layer_cut(place.stack, place.first_layer)]
        with no_refusal():
            candidates = find_cuts(place, self.run_one)
        right: list[Cut] = []
        for cut in candidates:
            found, why_not = self._first_right(cut, packed, on_disk)
            right += [found] if found is not None else []
        below = range(place.first_layer - 1, 0, -1) if not (right or on_disk) else ()
        for layer in below:
            lower = replace(candidates[-1], first_layer=layer)  # of the kind that every layer has
            found, _ = self._first_right(lower, packed, on_disk)
            if found is not None:
                return (found,), ""
        return tuple(right), why_not

    def _first_right(self, cut: Cut, packed: bool, on_disk: bool) -> tuple[Cut | None, str]:
        """Returns the form of the cut that leaves most out, or why none is right."""
        if on_disk and cut.copies_first:
            return None, "its frozen layers cannot be read from a disk one by one"
        forms = [cut]
        if cut.above_attention:  # some models fix the number of positions
            forms.append(replace(cut, narrows=False))
        if not on_disk:
            forms.append(replace(forms[-1], reads_tokens=True))
        for form in forms:
            found, why_not = self._checked(form, packed)
            if found is not None:
                break
        return found, why_not

    def _checked(self, cut: Cut, packed: bool) -> tuple[Cut | None, str]:
        """Returns the cut with its width, or why it does not leave the logits as they are."""
        try:
            prefix = self._recorded(cut, packed)
            error = self._error(self.runner(packed=packed, prefix=prefix))
        except REFUSALS as failure:
            # An edit is still possible without it, and the warning says what happened.
            return None, f"its layers cannot be split ({type(failure).__name__}: {failure})"
        if error > self.tolerance:
            return None, f"replaying it changes the logits (relative error {error:.1e})"
        return replace(cut, width=prefix.store.width), ""

    def _recorded(self, cut: Cut, packed: bool) -> FrozenPrefix:
        prefix = FrozenPrefix(self.model, cut, int(self.texts.input_offsets[-1]), Budget())
        # Recorded in other rows than it is replayed in: a layer that keeps something of an
        # earlier pass for a later layer must not find it by luck.
        prefix.record(Layout(self.texts, 1, packed), _N_PROBES)
        return prefix

    def runner(self, texts: TokenizedTexts | None = None, **shortcuts: Any) -> TextRunner:
        """Returns a runner of the texts, or of others, with some shortcuts."""
        texts = self.texts if texts is None else texts
        # Rows of a length that makes several, some of them with several texts.
        row_tokens = int(texts.lengths.max() + texts.lengths.min())
        return TextRunner(self.model, texts, row_tokens=row_tokens, **{"prefix": None, **shortcuts})

    @torch.no_grad()
    def run_one(self) -> None:
        """Runs the untouched model on one text."""
        ids = torch.from_numpy(self.texts.ids[: self.texts.offsets[1]])
        self.model(input_ids=ids[None].to(input_device(self.model)), use_cache=False)

    @torch.no_grad()
    def _plain_logits(self) -> list[torch.Tensor]:
        """Returns the logits of each text run alone, nothing of ours in between, each [S, V]."""
        device = input_device(self.model)
        parts: list[torch.Tensor] = []
        for i in range(len(self.texts)):
            ids = self.texts.ids[self.texts.offsets[i] : self.texts.offsets[i + 1]]
            inputs = torch.from_numpy(ids).to(device)[None]
            logits = self.model(input_ids=inputs, use_cache=False).logits[0]  # [L, V]
            parts.append(logits[int(self.texts.target_start[i]) - 1 : -1])
        return parts

    def _rounding(self) -> float:
        """Returns the relative error that counts as rounding."""
        quantized = getattr(self.model, "is_quantized", False)
        if self.reference[0].dtype == torch.float32 and not quantized:
            return TOLERANCE
        # Rounding adds up with depth in low precision: ordinary padding shows how much.
        padded = self._error(self.runner(packed=False))
        return min(max(_HALF_TOLERANCE, 3 * padded), MOST_TOLERATED)

    @torch.no_grad()
    def _error(self, runner: TextRunner, expected: torch.Tensor | None = None) -> float:
        """Returns the relative error of the logits; those of each text alone are expected."""
        if expected is None:
            expected = torch.cat(self.reference[::-1])
        return relative_error(self._logits(runner), expected.float())

    def _logits(self, runner: TextRunner) -> torch.Tensor:
        """Returns the logits, [S, V] float32, with the texts in the opposite order."""
        with runner.running():
            return runner.logits(np.arange(len(self.texts))[::-1])[0].float()

    @torch.no_grad()
    def _loss_error(self, head: Head, packed: bool) -> float:
        runner = self.runner(packed=packed, head=head)
        with runner.running():
            losses = runner.edit_losses(np.arange(len(self.texts)))
        logits = torch.cat(self.reference).float()
        rows = runner.prepare(np.arange(len(self.texts))).rows
        labels = runner.ids[rows.label_index].to(logits.device)
        token_losses = F.cross_entropy(logits, labels, reduction="none")
        expected = mean_by_owner(token_losses, rows.owner.to(logits.device), len(self.texts))
        return relative_error(losses, expected.to(losses.device))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ||found - expected|| / ||expected||; infinity if it is no number."""
    difference = (found - expected).norm() / expected.norm()
    return float(difference.detach()) if torch.isfinite(difference) else float("inf")


@contextmanager
def no_refusal() -> Iterator[None]:
    """A model that cannot be asked is run the plain way."""
    try:
        yield
    except REFUSALS as failure:
        logger.debug("A shortcut cannot be used: %s: %s", type(failure).__name__, failure)
