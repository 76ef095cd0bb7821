"""Training a ledger's facts: new ones beside old ones, then every fact checked, lost ones again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.requests import distinct_edits
from ..data.tokenization import TokenizedTexts
from ..data.training_texts import TrainingTexts, subjects_of
from ..data.variants import Variants, others_each
from ..distributed.world import SINGLE_PROCESS, Partition
from ..errors import NonFiniteLossError
from ..hparams import LocFTBFHyperParams
from ..modeling.devices import context_length
from ..modeling.modes import only_trainable, with_gradients
from ..modeling.places import Place
from ..prefix.cut import Cut
from ..prefix.fingerprint import prefix_fingerprint
from ..prefix.frozen_prefix import FrozenPrefix, Layout
from ..prefix.joined_store import JoinedStore
from ..prefix.shortcuts import Shortcuts, find_shortcuts
from ..prefix.store import Budget
from ..training.loop import train_breadth_first
from ..training.lora import low_rank_of
from ..training.preserve.confined_change import ConfinedChange
from ..training.preserve.filters import Filters, adam_of
from ..training.progress import LossNotFiniteError, Progress
from ..training.reparametrization import Reparametrization
from ..training.step import TrainingStep
from ..training.trained_weights import TrainedWeights, copies_of, write_
from ..utils.hashing import arrays_sha256, json_sha256
from ..utils.progress import progress_bar
from .facts import Fact
from .moments import begin_with_, moments_of
from .runner import LedgerRunner
from .states import Matrices
from .texts import Numbered, Replayed, joined_texts, joined_variants

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_NO_TEXTS = TokenizedTexts.from_lists([], [])
# Rounds in which what a check has found lost is trained again.
MOST_REPAIRS = 10
# Of the rate: few facts are behind a repair's gradients, and Adam takes steps of one size whatever
# they are. Chosen on the first 200 records of ZsRE. What is taken out may need more: there it is
# twice as much after every two rounds. Where facts are added, that would lose others.
_REPAIR_RATE = 0.25


@dataclass(eq=False)
class Group:
    """Facts whose texts and states were made together.

    Attributes:
        texts: Their texts.
        prefix: Their recorded states; `None` if the whole model runs.
    """

    texts: TrainingTexts
    prefix: FrozenPrefix | None


@dataclass
class Trained:
    """What training and checks came to.

    Attributes:
        epochs: Passes over what was trained, those of repairs included.
        texts: Texts that were trained, each as often as it was.
        repairs: Rounds of repair.
        lost: Numbers of facts that do not hold, or were taken out and are not out, after all
            rounds.
    """

    epochs: int = 0
    texts: int = 0
    repairs: int = 0
    lost: list[int] = field(default_factory=list)

    def add(self, other: Trained) -> None:
        """Adds what came after."""
        self.epochs += other.epochs
        self.texts += other.texts
        self.repairs += other.repairs
        self.lost = other.lost

    def said(self) -> dict[str, Any]:
        """Returns the figures as the log has them."""
        return vars(self).copy()


@dataclass(eq=False)
class Trainer:
    """Trains and checks the facts of a ledger in a model.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        hparams: The settings, with a place and a rate.
        place: What is trained.
        folder: Where recorded states stay.
        progress: Show progress bars.
        filters: What confines the change; `None` without `preserve`.
        moments: Adam's second moments with which the next training begins (see `moments_of`);
            `None` to begin anew. New ones after each training that is no repair.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hparams: LocFTBFHyperParams
    place: Place
    folder: Path
    progress: bool = False
    filters: Filters | None = None
    moments: Matrices | None = None
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

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context manager in which only the place can be trained; then the model is as before."""
        with only_trainable(self.model, self.place.parameters.values()), with_gradients():
            yield

    # Texts and states

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

    # Training

    def settle_(
        self,
        numbered: Numbered,
        runner: LedgerRunner,
        new: np.ndarray,
        pool: np.ndarray,
        not_right: Callable[[], np.ndarray],
        more: Mapping[int, int] | None = None,
    ) -> Trained:
        """Trains `new` beside others, in place, and what checks find not to be right again.

        Where all rounds do not suffice, that with the fewest wrong ones counts.

        Args:
            numbered: The texts of all edits.
            runner: What runs them.
            new: Edits to train, [N].
            pool: Edits that are replayed beside them.
            not_right: Checks all edits, and returns those that are not as they should be.
            more: The fact's number of edits that `numbered` has no fact for.
        """
        everything = np.union1d(new, pool)
        found, before = Trained(), runner.n_trained
        found.epochs = self._fit_(runner, numbered.variants, new, pool)
        wrong = fewest = not_right()
        best = copies_of(self.place.parameters) if len(wrong) else {}
        while len(wrong) and found.repairs < MOST_REPAIRS:
            found.repairs += 1
            rest = np.setdiff1d(everything, wrong)
            rate = _REPAIR_RATE * (2 ** ((found.repairs - 1) // 2) if more else 1)
            found.epochs += self._fit_(
                runner, numbered.variants, wrong, rest, found.repairs, min(1.0, rate)
            )
            wrong = not_right()
            if len(wrong) < len(fewest):
                best, fewest = copies_of(self.place.parameters), wrong
        if len(fewest) < len(wrong):
            write_(self.place.parameters, best)
            wrong = fewest
        found.texts = runner.n_trained - before
        number_of = {edit: number for number, edit in numbered.edit_of.items()} | dict(more or {})
        found.lost = sorted({number_of[edit] for edit in wrong.tolist()})
        return found

    def lost(
        self, numbered: Numbered, runner: LedgerRunner, edits: np.ndarray, *, clearly: bool = True
    ) -> np.ndarray:
        """Returns those of these edits that the model does not answer, ascending.

        Args:
            numbered: The texts.
            runner: What runs them.
            edits: The edits, [N].
            clearly: As for `LedgerRunner.wrong`.
        """
        texts = numbered.checked(edits)
        wrong = runner.wrong(texts, self.hparams.eval_batch_size, clearly=clearly)
        return numbered.edits_of(wrong)

    def _fit_(
        self,
        runner: LedgerRunner,
        variants: Variants,
        new: np.ndarray,
        pool: np.ndarray,
        repair: int = 0,
        rate: float = 1.0,
    ) -> int:
        """Trains `new` beside others, in place; returns the epochs that it took.

        Args:
            runner: What runs the texts.
            variants: Which stand for an edit.
            new: Edits to train, [N].
            pool: Edits that are replayed beside them.
            repair: Which round of repair this is; 0 for none.
            rate: What the learning rate is multiplied by.

        Raises:
            NonFiniteLossError: Training diverged; to restore the weights is up to the caller.
        """
        h, parameters = self.hparams, self.place.parameters
        if repair:
            # A mean below the thresholds may hide what is still wrong: they are lowered each time.
            h = replace(
                h,
                lr=h.lr * rate,
                batch_loss_threshold=h.batch_loss_threshold * 10.0**-repair,
                epoch_loss_threshold=h.epoch_loss_threshold * 10.0**-repair,
            )
        texts = Replayed.of(variants, others_each(h.forms_per_epoch, len(new)), pool, h.seed)
        change: Reparametrization | None = low_rank_of(self.model, parameters, h)
        lasting = change is None  # a low-rank change is another one at each training
        adam = None
        if self.filters is not None:
            change = ConfinedChange(self.model, parameters, self.filters.of)
            adam = adam_of(len(new), h) if self.filters.damps else None
        weights = TrainedWeights(parameters) if change is None else change.weights
        share = Partition.of_rank(SINGLE_PROCESS, runner.texts.input_lengths)
        step = TrainingStep(
            runner, weights, h, share,
            texts_per_edit=texts.most, adam=adam, target_tokens=runner.texts.target_lengths,
        )  # fmt: skip
        if lasting and self.moments is not None:
            begin_with_(step.optimizer, weights.named_masters(), self.moments)
        done = Progress.start(h.seed, step.micro_batch.size)
        n_batches = -(-len(new) // h.batch_size)
        try:
            with (
                nullcontext() if change is None else change.in_force(),
                runner.running(),
                closing(train_breadth_first(step, new, h, done, texts)) as steps,
                progress_bar(
                    total=h.num_steps * n_batches,
                    desc="breadth-first",
                    unit="step",
                    show=self.progress,
                ) as bar,
            ):
                for _ in steps:
                    bar.update()
        except LossNotFiniteError as error:
            raise NonFiniteLossError(
                f"{error}. The model is as it was before. Make another ledger with a lower "
                f"`lr` than {h.lr:g}."
            ) from None
        finally:
            weights.clear_gradients_()
        if change is not None:
            change.merge_()
        if lasting and not repair:
            self.moments = moments_of(step.optimizer, weights.named_masters()) or self.moments
        return done.epoch


def _key(facts: Sequence[Fact]) -> tuple[int, ...]:
    return tuple(fact.number for fact in facts)
