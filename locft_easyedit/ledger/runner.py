"""The runner of a ledger's texts: facts are to be answered, and what was retracted to be as before.

Of a fact the loss is the mean cross-entropy of its target, as everywhere. Of a text that is to be
as in the base model it is the mean KL divergence from the base's next-token distribution, at each
of its scored positions, in nats.

Where several processes share the work, each runs its own texts. Losses are those of own texts, by
their numbers among these, as a training step asks for them; checks are asked of all texts, by their
numbers among all, and answer the same in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..data.packing import spanned
from ..data.tokenization import TokenizedTexts
from ..distributed.world import Partition
from ..modeling.forward import Stop, mean_by_owner, run_layout, run_to_head
from ..modeling.module_inputs import module_inputs
from ..prefix.runner import Prepared, TextRunner
from ..training.preserve.input_moments import add_moment_, input_width, no_moment
from ..training.repair import run_in_batches

_TOKENS_AT_ONCE = 64  # whose distributions over the vocabulary are held together


@dataclass(frozen=True, eq=False)
class BaseOutputs:
    """What the base model gave at the scored positions of texts that are to be as in it.

    Attributes:
        first_text: The texts from this one on are, of this process's.
        offsets: Where each one's positions begin, [number of these texts + 1].
        outputs: What enters the output head at each, [S, D]; the logits, [S, V], of a model whose
            head is not known to be frozen.
    """

    first_text: int
    offsets: np.ndarray
    outputs: torch.Tensor


class LedgerRunner(TextRunner):
    """Runs texts of which some are to be as in the base model.

    Args:
        model: As for `TextRunner`, like all that is not named here.
        texts: This process's texts.
        share: Which of all texts they are.
        options: The rest.

    Attributes:
        base: What the base model gave for those; `None` without any.
        n_trained: Texts that this process trained, each as often as it was.
    """

    base: BaseOutputs | None = None
    n_trained: int = 0

    def __init__(
        self, model: PreTrainedModel, texts: TokenizedTexts, *, share: Partition, **options: Any
    ) -> None:
        super().__init__(model, texts, **options)
        self.share = share

    @property
    def n_trained_by_all(self) -> int:
        """Texts that all processes have trained, each as often as it was."""
        return sum(self.share.world.all_gather(self.n_trained))

    def edit_losses(self, batch: np.ndarray | Prepared) -> torch.Tensor:
        """Returns each text's loss, [B] float32: cross-entropy, or divergence from the base."""
        now = batch if isinstance(batch, Prepared) else self.prepare(batch)
        self.n_trained += now.n_texts
        if self.base is None or not (now.batch >= self.base.first_text).any():
            return super().edit_losses(now)
        outputs = self._outputs(now)  # [S, D]
        back = torch.from_numpy(now.batch >= self.base.first_text)
        owner = now.rows.owner.to(outputs.device)  # [S]
        is_back = back.to(outputs.device)[owner]
        losses = torch.zeros(len(owner), dtype=torch.float32, device=outputs.device)
        answers, positions = (~is_back).nonzero().squeeze(1), is_back.nonzero().squeeze(1)
        if len(answers):
            labels = self.ids[now.rows.label_index].to(outputs.device)[answers]
            losses = losses.index_put((answers,), self._cross_entropy(outputs[answers], labels))
        divergences = self._divergences(outputs[positions], self._base_of(now).to(outputs.device))
        losses = losses.index_put((positions,), divergences)
        return mean_by_owner(losses, owner, now.n_texts)

    def _outputs(self, now: Prepared) -> torch.Tensor:
        if self.head is None:
            return self.logits(now)[0]
        with self._inputs(now) as inputs, self._attention():
            return run_to_head(self.model, now.rows, narrowed=self.narrowed, **inputs)

    def _cross_entropy(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            return F.cross_entropy(outputs.float(), labels, reduction="none")
        return self.head.token_losses(outputs, labels)

    def _divergences(self, outputs: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        parts = [
            checkpoint(self._divergence, *pair, use_reentrant=False)
            for pair in zip(
                outputs.split(_TOKENS_AT_ONCE), base.split(_TOKENS_AT_ONCE), strict=True
            )
        ]
        return torch.cat(parts)

    def _divergence(self, outputs: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Returns KL(base || model) of each position, [S], of the outputs of both, [S, D]."""
        then, now = (F.log_softmax(self._logits_of(x), dim=-1) for x in (base, outputs))
        return F.kl_div(now, then, reduction="none", log_target=True).sum(-1)

    def _logits_of(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.float() if self.head is None else self.head.logits(outputs)

    def _base_of(self, now: Prepared) -> torch.Tensor:
        """Returns the base's outputs at the scored positions of a batch, in their order."""
        assert self.base is not None
        texts = now.batch[now.batch >= self.base.first_text] - self.base.first_text
        starts, counts = self.base.offsets[texts], np.diff(self.base.offsets)[texts]
        return self.base.outputs[torch.from_numpy(spanned(starts, counts))]

    def remember_base_(self, first_text: int, batch_size: int) -> None:
        """Keeps what the model, which now holds the base's matrices, gives for the texts from one.

        Args:
            first_text: These are to be as in the base from here on, of all texts.
            batch_size: Texts a forward pass.

        Raises:
            RankError: Another process has failed.
        """
        first_text = int(np.searchsorted(self.share.own, first_text))
        texts = np.arange(first_text, len(self.texts))
        counts = (self.texts.lengths - self.texts.target_start)[texts]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        kept: list[torch.Tensor] = []

        def keep(batch: np.ndarray) -> None:
            now = self.prepare(batch)
            outputs = self._outputs(now)
            if not kept:
                kept.append(outputs.new_empty(int(offsets[-1]), outputs.shape[-1]))
            which = batch - first_text
            kept[0][torch.from_numpy(spanned(offsets[which], counts[which]))] = outputs

        run_in_batches(self, self.share, texts, keep, batch_size)
        outputs = kept[0].cpu() if kept else torch.zeros(0, 0)  # another process may have all
        self.base = BaseOutputs(first_text, offsets, outputs)

    def input_moments(
        self, texts: np.ndarray, modules: Mapping[str, nn.Module], scored: float, batch_size: int
    ) -> dict[str, torch.Tensor] | None:
        """Returns the sum of x x^T over what enters linear modules, [in, in] by name.

        `None` if a module gets some of the tokens alone, as an expert does: which they are is not
        known.

        Args:
            texts: The texts, [B].
            modules: The modules by name.
            scored: What a token counts that is scored; others count 1.
            batch_size: Texts a forward pass.

        Raises:
            RankError: Another process has failed.
        """
        sums: dict[str, torch.Tensor] = {}
        known = True

        def add(batch: np.ndarray) -> None:
            nonlocal known
            now = self.prepare(batch, whole=True)  # what texts share counts for each
            weights = now.rows.real.float().flatten()  # [R * L]
            weights[now.rows.scored] = scored
            # Where the last layer is narrowed, a module gets the scored tokens alone.
            alone = torch.full((len(now.rows.scored),), scored, device=weights.device)

            def take(name: str, x: torch.Tensor) -> None:
                weight = next((w for w in (weights, alone) if len(w) == len(x)), None)
                if weight is None:
                    raise Stop
                add_moment_(sums, name, x.float() * weight.to(x.device).sqrt().unsqueeze(1))

            with self._inputs(now) as inputs, module_inputs(modules, take) as seen:
                run_layout(self.model, now.rows, **inputs)
            known &= len(seen) == len(modules)

        run_in_batches(self, self.share, self.share.positions_of(texts), add, batch_size)
        if not all(self.share.world.all_gather(known)):
            return None
        for name, module in modules.items():  # this process may have no texts
            if name not in sums:
                sums[name] = no_moment(input_width(module), self.device)
        self.share.world.sum_(sums[name] for name in modules)
        return sums

    def away(self, texts: np.ndarray, batch_size: int, near: float) -> tuple[Any, Any]:
        """Returns how far texts that are to be as in the base are from it.

        Args:
            texts: The texts, ascending, [B].
            batch_size: Texts a forward pass.
            near: Tokens to which the base gives log-probabilities this close to that of its own
                choice, in nats, count as its choice: there it is undecided itself.

        Returns:
            Whether the model chooses another token than the base somewhere, [B] bool, and the mean
            divergence of each text in nats, [B].

        Raises:
            RankError: Another process has failed.
        """
        own = self.share.positions_of(texts)
        wrong, divergence = np.zeros(len(own), bool), np.zeros(len(own))

        def note(batch: np.ndarray) -> None:
            now = self.prepare(batch)
            outputs = self._outputs(now)
            base = self._base_of(now).to(outputs.device)
            found = self._divergences(outputs, base)
            owner = now.rows.owner.to(found.device)
            where = np.searchsorted(own, batch)
            divergence[where] = mean_by_owner(found, owner, now.n_texts).cpu().numpy()
            labels = self.ids[now.rows.label_index].to(outputs.device)
            for part in torch.arange(len(labels), device=outputs.device).split(_TOKENS_AT_ONCE):
                choices = self._logits_of(outputs[part]).argmax(-1)
                given = F.log_softmax(self._logits_of(base[part]), dim=-1)
                ahead = given.gather(1, torch.stack([labels[part], choices], dim=1))  # [C, 2]
                bad = ahead[:, 0] - ahead[:, 1] > near
                wrong[where[np.unique(owner[part][bad].cpu().numpy())]] = True

        run_in_batches(self, self.share, own, note, batch_size)
        shares = self.share.world.all_gather((self.share.own[own], wrong, divergence))
        numbers, wrong, divergence = (
            np.concatenate(column) for column in zip(*shares, strict=True)
        )
        order = np.argsort(numbers)
        return wrong[order], divergence[order]
