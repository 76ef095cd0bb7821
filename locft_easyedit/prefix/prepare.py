"""The runner of a training: where the prefix ends is chosen by what there is room for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from ..data.tokenization import TokenizedTexts
from ..distributed.world import World
from ..modeling.devices import input_device
from .cut import Cut
from .fingerprint import prefix_fingerprint
from .frozen_prefix import FrozenPrefix, Layout, PrefixRecorder
from .runner import TextRunner
from .shortcuts import Shortcuts
from .store import Budget
from .streaming import FrozenStream

logger = logging.getLogger(__name__)


def prepare_runner(
    model: PreTrainedModel,
    texts: TokenizedTexts,
    shortcuts: Shortcuts,
    *,
    row_tokens: int,
    batch_size: int,
    budget: Budget,
    cut: str | None = None,
    kept: tuple[str, Iterable[str]] | None = None,
    stream: FrozenStream | None = None,
    states: PrefixRecorder | None = None,
    progress: bool = False,
) -> TextRunner:
    """Returns the fastest runner that gives the model's own logits, with its prefix recorded.

    Args:
        model: The model, in evaluation mode.
        texts: All edits as tokens.
        shortcuts: What leaves its logits as they are.
        row_tokens: Length of packed rows.
        batch_size: Sequences a forward pass while the prefix is recorded; more on a GPU.
        budget: Where the recorded states may lie.
        cut: The kind of cut to use, if this model has it; `None` chooses by the budget.
        kept: A folder where the prefix stays for a later run, and the names of what is trained.
        stream: What records the prefix, at the next pass, if the frozen layers are on disk.
        states: What may have recorded the frozen layers' states already. What is borrowed from it
            leaves no file.
        progress: Show a progress bar.

    Raises:
        MemoryBudgetError: The budgets cannot hold the states.
        OutputError: The disk is full or cannot be written to.
    """
    prefix = None
    cuts = shortcuts.cuts
    chosen = _affordable(model, texts, cuts, budget, cut) if cuts else None
    if chosen is not None and len(texts):
        file = kept_file(kept, model, chosen, texts, shortcuts.packed, stream)
        prefix = FrozenPrefix(model, chosen, int(texts.input_offsets[-1]), budget, file)
        layout = Layout(texts, row_tokens, shortcuts.packed)
        batch_size = layout.recorded_at_once(input_device(model), batch_size)
        there = prefix.reuse(progress=progress) or (
            states is not None and states.fill(prefix, layout, batch_size)
        )
        if not there and stream is not None:
            stream.record(prefix, layout)
        elif not there:
            prefix.record(layout, batch_size, progress=progress)
        where = prefix.store.where() if prefix.complete else "computed with the next pass"
        logger.info(
            "The frozen prefix ends at the %s in layer %d where training begins: %d tokens, %s.",
            chosen.kind,
            chosen.first_layer,
            prefix.n_tokens,
            where,
        )
    return TextRunner(
        model,
        texts,
        row_tokens=row_tokens,
        packed=shortcuts.packed,
        prefix=prefix,
        tail=shortcuts.tail,
        head=shortcuts.head,
        shared=shortcuts.shared,
        fused=shortcuts.fused,
        compiled=shortcuts.compiled,
    )


def kept_in(
    folder: str | None, trained: Iterable[str], world: World
) -> tuple[str, Iterable[str]] | None:
    """Returns where this process's prefixes stay for a later run, as `prepare_runner` takes it.

    They lie in `folder` (`None` keeps none) and do not depend on what is `trained`.
    """
    if folder and world.is_distributed:
        # The health check's text is the same on all ranks, and so would be its file.
        folder = str(Path(folder, f"rank-{world.rank}-of-{world.size}"))
    return (folder, trained) if folder else None


def kept_file(
    kept: tuple[str, Iterable[str]] | None,
    model: PreTrainedModel,
    cut: Cut,
    texts: TokenizedTexts,
    packed: bool,
    stream: FrozenStream | None,
) -> tuple[Path, str] | None:
    """Returns the file in which a prefix stays, and the fingerprint of all it depends on.

    `None` where it is not `kept`; arguments are as for `prepare_runner`.
    """
    if kept is None:
        return None
    folder, trained = kept
    weights_of = None if stream is None else stream.weights_of
    fingerprint = prefix_fingerprint(model, cut, trained, texts, packed, weights_of)
    return Path(folder) / f"prefix-{fingerprint[:16]}.safetensors", fingerprint


def _affordable(
    model: PreTrainedModel,
    texts: TokenizedTexts,
    cuts: tuple[Cut, ...],
    budget: Budget,
    kind: str | None,
) -> Cut:
    """Returns the cut that leaves least to run and needs no disk, or else the narrowest.

    Reading states from a disk in every epoch costs more than the little that a wider cut saves.
    """
    wanted = [cut for cut in cuts if cut.kind == kind]
    if kind is not None and not wanted:
        kinds = ", ".join(cut.kind for cut in cuts)
        logger.warning("`prefix_cut=%s` does not suit this model and place: %s do.", kind, kinds)
    if wanted:
        return wanted[0]
    n_tokens, dtype = int(texts.input_offsets[-1]), model.dtype
    for cut in cuts:
        where = cut.device or input_device(model)
        gpu, host, _ = budget.rows(cut.width * dtype.itemsize, where)
        if n_tokens <= gpu + host:
            return cut
    return min(cuts, key=lambda cut: cut.width)
