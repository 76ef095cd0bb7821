"""A ledger's facts as texts, and their states of frozen layers: recorded once, kept in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import distinct_edits
from ..data.tokenization import TokenizedTexts
from ..data.training_texts import TrainingTexts, subjects_of
from ..data.variants import Variants
from ..hparams import LocFTBFHyperParams
from ..modeling.devices import context_length
from ..modeling.places import Place
from ..prefix.cut import Cut
from ..prefix.fingerprint import prefix_fingerprint
from ..prefix.frozen_prefix import FrozenPrefix, Layout
from ..prefix.joined_store import JoinedStore
from ..prefix.shortcuts import Shortcuts, find_shortcuts
from ..prefix.store import Budget
from ..utils.hashing import arrays_sha256, json_sha256
from .facts import Fact
from .runner import LedgerRunner
from .texts import Numbered, joined_texts, joined_variants

_CPU = torch.device("cpu")
_NO_TEXTS = TokenizedTexts.from_lists([], [])


@dataclass(eq=False)
class Group:
    """Facts whose texts and states were made together.

    Attributes:
        texts: Their texts.
        prefix: Their recorded states; `None` if the whole model runs.
    """

    texts: TrainingTexts
    prefix: FrozenPrefix | None


@dataclass(eq=False)
class RecordedFacts:
    """The texts of groups of facts, and what runs them without the frozen layers.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        hparams: The settings, with a place and a rate.
        place: What is trained.
        folder: Where recorded states stay.
        progress: Show progress bars.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hparams: LocFTBFHyperParams
    place: Place
    folder: Path
    progress: bool = False
    _budget: Budget = field(init=False)
    _shortcuts: Shortcuts | None = field(init=False, default=None)
    _frozen: str = field(init=False, default="")
    _groups: dict[tuple[int, ...], Group] = field(init=False, default_factory=dict)
    _more: FrozenPrefix | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        h = self.hparams
        self._budget = Budget(
            h.prefix_gpu_gib, h.prefix_host_gib, h.prefix_disk_gib, str(self.folder)
        )

    def tokenized(self, facts: Sequence[Fact]) -> TrainingTexts:
        """Returns the texts of some facts.

        Raises:
            LocFTError: As for `TrainingTexts.tokenize`.
        """
        requests = [dict(fact.request) for fact in facts]
        edits = distinct_edits(requests, None)
        return TrainingTexts.tokenize(
            self.tokenizer,
            edits.edits,
            subjects_of(requests, edits, self.hparams),
            self.hparams,
            max_positions=context_length(self.model),
        )

    def numbered(
        self, groups: Sequence[Sequence[Fact]], more: TokenizedTexts | None = None
    ) -> tuple[Numbered, LedgerRunner]:
        """Returns the texts of groups of facts, and what runs them, with all states recorded.

        Args:
            groups: The groups; there is at least one.
            more: Texts that come after theirs, each an edit of its own; their states do not stay.

        Raises:
            LocFTError: A text cannot be used, or there is no room for states.
        """
        self._forget_all_but({_key(group) for group in groups})
        if self._more is not None:
            self._more.close()
            self._more = None
        found = [self._group(group) for group in groups]
        parts, variants = [g.texts.texts for g in found], [g.texts.variants for g in found]
        prefixes = [group.prefix for group in found]
        if more is not None and len(more):
            parts.append(more)
            variants.append(Variants.own_alone(len(more)))
            self._more = self._recorded(more, keep=False)
            prefixes.append(self._more)
        texts = joined_texts(parts)
        order = [fact.number for group in groups for fact in group]
        numbered = Numbered(
            texts,
            joined_variants(variants),
            {n: i for i, n in enumerate(order)},
            len(found[0].texts.forms),
        )
        return numbered, self._runner(texts, prefixes)

    def _runner(
        self, texts: TokenizedTexts, prefixes: Sequence[FrozenPrefix | None]
    ) -> LedgerRunner:
        assert self._shortcuts is not None
        prefix, cut = None, self._cut
        if cut is not None:
            prefix = FrozenPrefix(self.model, cut, int(texts.input_offsets[-1]), self._budget)
            prefix.borrow(JoinedStore([one.store for one in prefixes if one is not None]))
        return LedgerRunner(
            self.model,
            texts,
            row_tokens=self.hparams.row_tokens,
            packed=self._shortcuts.packed,
            prefix=prefix,
            tail=self._shortcuts.tail,
            head=self._shortcuts.head,
            shared=self._shortcuts.shared,
        )

    def _group(self, facts: Sequence[Fact]) -> Group:
        key = _key(facts)
        if key not in self._groups:
            texts = self.tokenized(facts)
            self._find_shortcuts(texts.texts)
            self._groups[key] = Group(texts, self._recorded(texts.texts, keep=True))
        return self._groups[key]

    def _forget_all_but(self, keys: set[tuple[int, ...]]) -> None:
        """Gives back what the states of other groups take in memory; their files stay."""
        for key in [key for key in self._groups if key not in keys]:
            prefix = self._groups.pop(key).prefix
            if prefix is not None:
                prefix.close()

    def close(self) -> None:
        """Gives back what recorded states take."""
        self._forget_all_but(set())

    def _find_shortcuts(self, texts: TokenizedTexts) -> None:
        if self._shortcuts is None:
            h = self.hparams
            self._shortcuts = find_shortcuts(
                self.model, texts, self.place, packing=h.packing, frozen_prefix=h.frozen_prefix
            )

    @property
    def _cut(self) -> Cut | None:
        """Where the frozen prefix ends: at the fewest numbers a token, for they stay on the disk.

        A wider cut saves a part of one layer. What the change is confined with is not folded in: it
        would make the states depend on the trained matrices.
        """
        assert self._shortcuts is not None
        cuts = self._shortcuts.cuts
        wanted = [cut for cut in cuts if cut.kind == self.hparams.prefix_cut]
        return min(wanted or cuts, key=lambda cut: cut.width, default=None)

    def how_it_runs(self) -> dict[str, Any]:
        """Returns what moves the last bits of a training, and is found by looking at the model."""
        assert self._shortcuts is not None
        cut = self._cut
        return {"cut": None if cut is None else cut.kind, "packed": self._shortcuts.packed}

    def _recorded(self, texts: TokenizedTexts, *, keep: bool) -> FrozenPrefix | None:
        """Returns the states of some texts: those of a file that stayed, or recorded anew.

        Where the disk's budget holds no more, they do not stay, and are recorded whenever needed.
        """
        cut = self._cut
        if cut is None:
            return None
        n_tokens = int(texts.input_offsets[-1])
        file = None
        if keep:
            path, fingerprint = self._file_of(texts, cut)
            _, _, on_disk = self._budget.rows(cut.width * self.model.dtype.itemsize, _CPU)
            if path.is_file() or n_tokens <= on_disk:
                file = path, fingerprint
        prefix = FrozenPrefix(self.model, cut, n_tokens, self._budget, file)
        if not prefix.reuse():
            layout = Layout(texts, self.hparams.row_tokens, self._packed)
            prefix.record(layout, self.hparams.eval_batch_size, progress=self.progress)
        return prefix

    @property
    def _packed(self) -> bool:
        assert self._shortcuts is not None
        return self._shortcuts.packed

    def _file_of(self, texts: TokenizedTexts, cut: Cut) -> tuple[Path, str]:
        if not self._frozen:  # every bit of the frozen weights counts: once, not for each group
            self._frozen = prefix_fingerprint(
                self.model, cut, self.place.parameters, _NO_TEXTS, self._packed
            )
        content = arrays_sha256(texts.ids, texts.offsets)
        fingerprint = json_sha256(
            [self._frozen, content, self.hparams.row_tokens, self.hparams.eval_batch_size]
        )
        return self.folder / f"prefix-{fingerprint[:16]}.safetensors", fingerprint

    def files_of(self, groups: Sequence[tuple[int, ...]]) -> set[str] | None:
        """Returns the names of the files in which the states of groups stay.

        `None` where not all of these groups are in memory: their files are not known.
        """
        if not groups:
            return set()
        known = [self._groups.get(key) for key in groups]
        cut = None if self._shortcuts is None else self._cut
        if cut is None or None in known:
            return None
        return {self._file_of(g.texts.texts, cut)[0].name for g in known if g is not None}


def _key(facts: Sequence[Fact]) -> tuple[int, ...]:
    return tuple(fact.number for fact in facts)
