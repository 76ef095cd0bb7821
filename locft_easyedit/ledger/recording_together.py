"""The states of a ledger's texts, recorded by several processes.

Each computes whole batches of the one pass that a single process would make, so that states are the
same, bit for bit, whatever the number of processes. Then they give each other what each needs.
Rank 0 alone reads and writes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from ..data.tokenization import TokenizedTexts
from ..distributed.world import World
from ..prefix.cut import Cut
from ..prefix.frozen_prefix import FrozenPrefix
from ..prefix.state_file import StateFile
from ..prefix.store import StateStore
from .dealing import tokens_of, whole_batches
from .recording import Recorded, Recorder

_CPU = torch.device("cpu")
_EXCHANGED = 2**26  # bytes of states at a time


def recorded_together(
    recorder: Recorder, wanted: Sequence[tuple[TokenizedTexts, bool]]
) -> list[Recorded]:
    """Returns what `Recorder.recorded` does, of each set of texts this process's share.

    Raises:
        LocFTError: As for `Recorder.recorded`, here or in another process.
    """
    cut = recorder.cut
    if cut is None:
        return [Recorded(recorder.share_of(texts), None, None) for texts, _ in wanted]
    world, h = recorder.world, recorder.hparams
    parts = [_Part(recorder, cut, texts, keep) for texts, keep in wanted]
    there = world.broadcast_from_main(lambda: [part.opened() for part in parts])
    with world.sharing_errors():
        for part, found in zip(parts, there, strict=True):
            if not found:
                part.record_(whole_batches(world, part.texts.lengths, h.eval_batch_size))
        if recorder.stream is not None:
            recorder.stream.run()
    return [part.dealt() for part in parts]


class _Part:
    """A set of texts, and as much of their states as this process has.

    Args:
        recorder: Records them.
        cut: Where states are taken.
        texts: The texts.
        keep: Whether the states of all are to stay in a file.
    """

    def __init__(self, recorder: Recorder, cut: Cut, texts: TokenizedTexts, keep: bool) -> None:
        self.texts = texts
        self._recorder, self._cut, self._keep = recorder, cut, keep
        self._n_tokens = int(texts.input_offsets[-1])
        self._held = np.zeros(0, np.int64)  # the tokens whose states are here, ascending
        self._file: StateFile | None = None
        self._computed: FrozenPrefix | None = None

    def opened(self) -> bool:
        """Returns, on rank 0, whether a file has the states of all; then rank 0 has them."""
        if self._keep:
            path, fingerprint = self._recorder.file_of(self.texts, self._cut)
            dtype = self._recorder.model.dtype
            self._file, _ = StateFile.open_whole(
                path, fingerprint, self._n_tokens, self._cut.width, dtype
            )
        if self._file is not None:
            self._held = np.arange(self._n_tokens)
        return self._file is not None

    def record_(self, some: np.ndarray) -> None:
        """Records the states of some texts, or lets the stream do so.

        Raises:
            LocFTError: As for `Recorder.recorded`.
        """
        if len(some):
            self._held = tokens_of(self.texts, some)
            self._computed = self._prefix(len(self._held))
            self._recorder.record_(self._computed, self.texts.subset(some))

    def _prefix(self, n_tokens: int) -> FrozenPrefix:
        return FrozenPrefix(self._recorder.model, self._cut, n_tokens, self._recorder.budget)

    def _get(self, where: torch.Tensor) -> torch.Tensor:
        """Returns the states of some of the tokens that are held, by where they are among these."""
        if self._file is not None:
            return self._file.get(where)
        assert self._computed is not None
        return self._computed.store.get(where)

    def dealt(self) -> Recorded:
        """Returns the states of this process's share; rank 0 writes those of all, if they stay.

        Raises:
            LocFTError: There is no room for them, or the file cannot be written.
        """
        recorder, world = self._recorder, self._recorder.world
        share = recorder.share_of(self.texts)
        mine = tokens_of(self.texts, share.own)
        prefix = self._prefix(len(mine))
        with ExitStack() as done:
            for one in (self._computed, self._file):
                if one is not None:
                    done.callback(one.close)
            width, dtype = self._kind()
            path = new = None
            with world.sharing_errors():
                store = prefix.new_store(width, dtype, prefix.device)
                if self._keep and world.is_main_process:
                    path, fingerprint = recorder.file_of(self.texts, self._cut)
                    new = None if self._file is not None else self._new_file(width, dtype)
            if new is not None:
                done.callback(new.close)

            def keep(first: int, states: torch.Tensor) -> None:
                a, b = np.searchsorted(mine, [first, first + len(states)])
                store.put(torch.arange(a, b), states[torch.from_numpy(mine[a:b] - first)])
                if new is not None:
                    new.put(torch.arange(first, first + len(states)), states)

            exchange_states(world, self._n_tokens, (width, dtype), self._held, self._get, keep)
            with world.sharing_errors():
                if new is not None and new.file is not None:
                    new.file.seal(fingerprint)
        prefix.adopt(store)
        return Recorded(share, prefix, path)

    def _kind(self) -> tuple[int, torch.dtype]:
        """Returns the numbers of a state, and their precision, as those have it that computed."""
        store = None if self._computed is None else self._computed.store
        kind = None if store is None else (store.width, store.dtype)
        kinds = [one for one in self._recorder.world.all_gather(kind) if one is not None]
        return kinds[0] if kinds else (self._cut.width, self._recorder.model.dtype)

    def _new_file(self, width: int, dtype: torch.dtype) -> StateStore | None:
        """Returns a store in a file that will stay; `None` if the disk's budget has no room."""
        recorder = self._recorder
        path, _ = recorder.file_of(self.texts, self._cut)
        budget = recorder.file_budget(path)
        if self._n_tokens > budget.rows(width * dtype.itemsize, _CPU)[2]:
            return None
        return StateStore(self._n_tokens, width, dtype, _CPU, budget, path=path)


def exchange_states(
    world: World,
    n_tokens: int,
    kind: tuple[int, torch.dtype],
    held: np.ndarray,
    get: Callable[[torch.Tensor], torch.Tensor],
    keep: Callable[[int, torch.Tensor], None],
) -> None:
    """Gives every process the states of all tokens, a part after the other.

    Args:
        world: The processes.
        n_tokens: Number of tokens.
        kind: Numbers of a token's state, and their precision.
        held: The tokens whose states this process has, ascending; every token is one process's.
        get: Returns those of some tokens, by where these are in `held`.
        keep: Takes the states, [C, W] on the host, of the tokens from a number on.

    Raises:
        Exception: What went wrong here.
        RankError: Another process has failed.
    """
    width, dtype = kind
    step = max(1, _EXCHANGED // (width * dtype.itemsize))
    error: Exception | None = None
    for first in range(0, n_tokens, step):
        part = torch.zeros(min(step, n_tokens - first), width, dtype=dtype)
        a, b = np.searchsorted(held, [first, first + len(part)])
        try:
            if b > a:
                part[torch.from_numpy(held[a:b] - first)] = get(torch.arange(a, b)).cpu()
        except Exception as raised:  # the others wait for this one's part
            error = error or raised
        world.sum_([part.view(torch.uint8)])  # as numbers, a zero would lose its sign
        try:
            keep(first, part)
        except Exception as raised:
            error = error or raised
    world.share_error(error)
