"""A ledger's facts as texts, and their states of frozen layers: recorded once, kept in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import distinct_edits
from ..data.tokenization import TokenizedTexts
from ..data.training_texts import TrainingTexts, subjects_of
from ..data.variants import Variants
from ..distributed.world import SINGLE_PROCESS, World
from ..evaluation.predictions import EvalConfig
from ..hparams import LocFTBFHyperParams
from ..modeling.devices import context_length
from ..modeling.places import Place
from ..prefix.frozen_prefix import FrozenPrefix
from ..prefix.joined_store import JoinedStore
from .dealing import joined_partitions
from .facts import Fact
from .recording import Recorded, Recorder
from .recording_together import recorded_together
from .runner import LedgerRunner
from .texts import Numbered, joined_texts, joined_variants


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
        world: The processes that share the work.
        recorder: Records states.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hparams: LocFTBFHyperParams
    place: Place
    folder: Path
    progress: bool = False
    world: World = SINGLE_PROCESS
    recorder: Recorder = field(init=False)
    _groups: dict[tuple[int, ...], tuple[TrainingTexts, Recorded]] = field(
        init=False, default_factory=dict
    )
    _more: Recorded | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.recorder = Recorder(
            self.model, self.hparams, self.place, self.folder, self.world, self.progress
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

    def look_at_(self, group: Sequence[Fact]) -> None:
        """Finds out, with the texts of a group, how the model may be run, unless that is known.

        Raises:
            LocFTError: As for `Recorder.look_at_`.
        """
        self.recorder.look_at_(self.tokenized(group).texts)

    def texts_of(self, groups: Sequence[Sequence[Fact]]) -> Numbered:
        """Returns the texts of groups of facts; nothing is run.

        Raises:
            LocFTError: A text cannot be used.
        """
        known = (self._groups.get(_key(group)) for group in groups)
        pairs = zip(groups, known, strict=True)
        texts = [self.tokenized(group) if there is None else there[0] for group, there in pairs]
        return Numbered(
            joined_texts([one.texts for one in texts]),
            joined_variants([one.variants for one in texts]),
            _edit_of(groups),
            len(texts[0].forms),
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
        if self._more is not None:
            self._more.close()
            self._more = None
        self._record_(groups, more)
        found = [self._groups[_key(group)] for group in groups]
        parts, variants = [g.texts for g, _ in found], [g.variants for g, _ in found]
        recorded = [one for _, one in found]
        if self._more is not None and more is not None:
            parts.append(more)
            variants.append(Variants.own_alone(len(more)))
            recorded.append(self._more)
        texts = joined_texts(parts)
        n_forms = len(found[0][0].forms)
        numbered = Numbered(texts, joined_variants(variants), _edit_of(groups), n_forms)
        return numbered, self._runner(texts, parts, recorded)

    def _record_(self, groups: Sequence[Sequence[Fact]], more: TokenizedTexts | None) -> None:
        """Records, in one pass, the states of groups that are new, and of `more`."""
        texts = {
            _key(group): self.tokenized(group)
            for group in groups
            if _key(group) not in self._groups
        }
        for one in texts.values():
            self.recorder.look_at_(one.texts)
        wanted = [(one.texts, True) for one in texts.values()]
        if more is not None and len(more):
            wanted.append((more, False))
        if self.world.is_distributed:
            recorded = recorded_together(self.recorder, wanted)
        else:
            recorded = self.recorder.recorded(wanted)
        self._groups |= {key: (texts[key], recorded[i]) for i, key in enumerate(texts)}
        if len(recorded) > len(texts):
            self._more = recorded[-1]

    def _runner(
        self,
        texts: TokenizedTexts,
        parts: Sequence[TokenizedTexts],
        recorded: Sequence[Recorded],
    ) -> LedgerRunner:
        found, cut, prefix = self.recorder.shortcuts, self.recorder.cut, None
        assert found is not None
        share, own = joined_partitions([one.share for one in recorded]), texts
        if self.world.is_distributed:
            own = texts.subset(share.own)
        if cut is not None and len(own):
            prefix = FrozenPrefix(self.model, cut, int(own.input_offsets[-1]), self.recorder.budget)
            stores = [one.prefix.store for one in recorded if one.prefix is not None]
            prefix.borrow(JoinedStore(stores))
        return LedgerRunner(
            self.model,
            own,
            row_tokens=self.hparams.row_tokens,
            packed=found.packed,
            prefix=prefix,
            tail=found.tail,
            head=found.head,
            shared=found.shared,
            fused=found.fused,
            share=share,
        )

    def asked(self) -> EvalConfig:
        """Returns how the model is run on texts of which nothing is recorded."""
        recorder, h = self.recorder, self.hparams
        if recorder.stream is None:
            return EvalConfig(h.eval_batch_size, h.row_tokens, progress=self.progress)
        found = recorder.shortcuts
        assert found is not None
        return EvalConfig(
            h.eval_batch_size,
            h.row_tokens,
            found.packed,
            recorder.cut,
            self.progress,
            found.tail,
            recorder.budget,
            recorder.stream,
        )

    def forget_all_but(self, groups: Sequence[Sequence[int]]) -> None:
        """Gives back what the states of other groups take in memory; their files stay.

        Args:
            groups: Numbers of the facts of each group.
        """
        kept = {tuple(group) for group in groups}
        for key in [key for key in self._groups if key not in kept]:
            self._groups.pop(key)[1].close()

    def close(self) -> None:
        """Gives back what recorded states take."""
        self.forget_all_but([])

    def files_of(self, groups: Sequence[tuple[int, ...]]) -> set[str] | None:
        """Returns the names of the files in which the states of groups stay.

        `None` where not all of these groups are in memory: their files are not known.
        """
        known = [self._groups.get(key) for key in groups]
        if any(one is None or one[1].file is None for one in known):
            return None
        return {one[1].file.name for one in known if one is not None and one[1].file is not None}


def _key(facts: Sequence[Fact]) -> tuple[int, ...]:
    return tuple(fact.number for fact in facts)


def _edit_of(groups: Sequence[Sequence[Fact]]) -> dict[int, int]:
    return {fact.number: i for i, fact in enumerate(fact for group in groups for fact in group)}
