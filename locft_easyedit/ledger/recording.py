"""The states of a ledger's texts where the trained part begins: from a file that stayed, or made.

Frozen layers that lie on disk are read once for all texts. With several processes see
`recording_together`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.tokenization import TokenizedTexts
from ..distributed.world import Partition, World
from ..errors import LedgerError
from ..hparams import LocFTBFHyperParams
from ..modeling.places import Place
from ..prefix.cut import Cut
from ..prefix.fingerprint import prefix_fingerprint
from ..prefix.frozen_prefix import FrozenPrefix, Layout
from ..prefix.shortcuts import Shortcuts, shortcuts_beside
from ..prefix.store import Budget
from ..prefix.streaming import FrozenStream, stream_of
from ..utils.hashing import arrays_sha256, json_sha256
from .binding import check_agreed

_CPU = torch.device("cpu")
_NO_TEXTS = TokenizedTexts.from_lists([], [])


@dataclass(frozen=True, eq=False)
class Recorded:
    """Texts whose states are there.

    Attributes:
        share: Which of them this process runs.
        prefix: The states of these; `None` if the whole model runs.
        file: Where those of all lie, or would lie; `None` where they do not stay.
    """

    share: Partition
    prefix: FrozenPrefix | None
    file: Path | None

    def close(self) -> None:
        """Gives back what the states take in memory; the file stays."""
        if self.prefix is not None:
            self.prefix.close()


@dataclass(eq=False)
class Recorder:
    """Records the states of texts.

    Attributes:
        model: The model.
        hparams: The settings, with a place and a rate.
        place: What is trained.
        folder: Where states stay.
        world: The processes that share the work.
        progress: Show progress bars.
        stream: What reads frozen layers from disk, while `ready`; `None` if all are resident.
        shortcuts: What leaves the model's logits as they are; once `looked_at`.
    """

    model: PreTrainedModel
    hparams: LocFTBFHyperParams
    place: Place
    folder: Path
    world: World
    progress: bool = False
    stream: FrozenStream | None = field(init=False, default=None)
    shortcuts: Shortcuts | None = field(init=False, default=None)
    budget: Budget = field(init=False)
    _frozen: str = field(init=False, default="")
    _undo: ExitStack | None = field(init=False, default=None)  # what `ready` ends with

    def __post_init__(self) -> None:
        h = self.hparams
        self.budget = Budget(
            h.prefix_gpu_gib, h.prefix_host_gib, h.prefix_disk_gib, str(self.folder),
            self.world.local_size,
        )  # fmt: skip

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Context manager in which states can be recorded, also where frozen layers are on disk.

        What runs as one product is laid out for it meanwhile.
        """
        with ExitStack() as undo:
            stream = stream_of(self.model, self.place.first_layer, progress=self.progress)
            if stream is not None:
                undo.enter_context(stream)
            self.stream, self._undo = stream, undo
            try:
                self._lay_out_()
                yield
            finally:
                self.stream = self._undo = None

    def _lay_out_(self) -> None:
        fused = None if self.shortcuts is None else self.shortcuts.fused
        if fused is not None and self._undo is not None:
            self._undo.enter_context(fused.laid_out())

    def look_at_(self, texts: TokenizedTexts) -> None:
        """Finds out, with some texts, how the model may be run, unless that is known.

        Raises:
            ModelError: It is not causal, or cannot be split above frozen layers that are on disk.
            LedgerError: The processes do not agree on it.
        """
        if self.shortcuts is not None:
            return
        with self.world.sharing_errors():
            found = shortcuts_beside(self.stream, self.model, texts, self.place, self.hparams)
            self.shortcuts = found
        remedy = "Start them on machines of one kind, with the same versions."
        try:
            check_agreed(self.world, "ways to run the model", self.how_it_runs(), remedy)
        except LedgerError:
            self.shortcuts = None
            raise
        self._lay_out_()

    @property
    def cut(self) -> Cut | None:
        """Where the frozen prefix ends: at the fewest numbers a token, for they stay on the disk.

        A wider cut saves a part of one layer. What the change is confined with is not folded in: it
        would make the states depend on the trained matrices.
        """
        assert self.shortcuts is not None
        cuts = self.shortcuts.cuts
        wanted = [cut for cut in cuts if cut.kind == self.hparams.prefix_cut]
        return min(wanted or cuts, key=lambda cut: cut.width, default=None)

    def how_it_runs(self) -> dict[str, Any]:
        """Returns what moves the last bits of a training, and is found by looking at the model."""
        assert self.shortcuts is not None
        cut = self.cut
        how = {"cut": None if cut is None else cut.kind, "packed": self.shortcuts.packed}
        return how if self.shortcuts.fused is None else how | {"fused": True}

    def recorded(self, wanted: Sequence[tuple[TokenizedTexts, bool]]) -> list[Recorded]:
        """Returns some sets of texts with their states, all that are new recorded in one pass.

        Where the disk's budget holds no more, they do not stay, and are recorded whenever needed.

        Args:
            wanted: Each set, and whether its states are to stay in a file.

        Raises:
            LocFTError: There is no room for states, or files cannot be written.
        """
        found, cut = [], self.cut
        for texts, keep in wanted:
            prefix = file = None
            if cut is not None:
                file = self.file_of(texts, cut) if keep else None
                prefix = self._prefix_of(texts, cut, file)
            path = None if file is None else file[0]
            found.append(Recorded(self.share_of(texts), prefix, path))
        if self.stream is not None:
            self.stream.run()
        return found

    def _prefix_of(
        self, texts: TokenizedTexts, cut: Cut, file: tuple[Path, str] | None
    ) -> FrozenPrefix:
        n_tokens = int(texts.input_offsets[-1])
        if file is not None and not file[0].is_file():
            row_bytes = cut.width * self.model.dtype.itemsize
            _, _, on_disk = self.file_budget(file[0]).rows(row_bytes, _CPU)
            file = file if n_tokens <= on_disk else None
        prefix = FrozenPrefix(self.model, cut, n_tokens, self.budget, file)
        if not prefix.reuse():
            self.record_(prefix, texts)
        return prefix

    def file_budget(self, path: Path) -> Budget:
        """Returns what a new file of states that stays may take of the disk."""
        files = self.folder.glob("prefix-*.safetensors")
        taken = sum(file.stat().st_size for file in files if file != path)
        budget = Budget(0.0, 0.0, self.hparams.prefix_disk_gib, str(self.folder))
        budget.taken = [0, 0, max(taken, self.budget.taken[2])]  # a run's temporary files count too
        return budget

    def share_of(self, texts: TokenizedTexts) -> Partition:
        """Returns which of some texts this process runs."""
        # Of commits of one fact each, every process gets some: whichever the text says.
        first = int(arrays_sha256(texts.ids, texts.offsets)[:8], 16)
        return Partition.of_rank(self.world, texts.input_lengths, first)

    def record_(self, prefix: FrozenPrefix, texts: TokenizedTexts) -> None:
        """Records the states of some texts, or lets the stream do it with its next pass.

        Raises:
            LocFTError: As for `recorded`.
        """
        layout = Layout(texts, self.hparams.row_tokens, self._packed)
        if self.stream is not None:
            self.stream.record(prefix, layout)
        else:
            prefix.record(layout, self.hparams.eval_batch_size, progress=self.progress)

    @property
    def _packed(self) -> bool:
        assert self.shortcuts is not None
        return self.shortcuts.packed

    def file_of(self, texts: TokenizedTexts, cut: Cut) -> tuple[Path, str]:
        """Returns the file of some texts' states, and a hash of what these depend on."""
        if not self._frozen:  # every bit of the frozen weights counts: once, not for each group
            weights_of = None if self.stream is None else self.stream.weights_of
            self._frozen = prefix_fingerprint(
                self.model, cut, self.place.parameters, _NO_TEXTS, self._packed, weights_of
            )
        content = arrays_sha256(texts.ids, texts.offsets)
        settings = [self.hparams.row_tokens, self.hparams.eval_batch_size]
        if self.stream is not None and self.world.is_distributed:
            settings.append(self.world.size)  # a stream divides up all that a process records
        fingerprint = json_sha256([self._frozen, content, *settings])
        return self.folder / f"prefix-{fingerprint[:16]}.safetensors", fingerprint
