"""The store of hidden states: on the GPU, in the host's memory and on disk, within budgets.

One row of numbers a token, in the order of the tokens. The first tokens lie on the GPU, the next in
the host's memory, the rest in one flat file. States on the host are gathered into pinned buffers,
from which the GPU takes them without waiting.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.packing import Rows
from ..errors import MemoryBudgetError
from ..utils.memory import free_host_memory, free_memory
from .state_file import StateFile

# What a tier takes of the memory that is free when its budget is left open.
_GPU_SHARE = 0.25
_HOST_SHARE = 0.5
_DISK_SHARE = 0.9


@dataclass
class Budget:
    """What the stores of a run may take of each tier together; `None` is a share of what is free.

    Attributes:
        gpu_gib: Of the GPU's memory, in GiB.
        host_gib: Of the host's memory.
        disk_gib: Of the disk that `folder` is on.
        folder: Where files go. The prefix of the edits stays there and is used again by a later
            run on the same model and edits; `None` is the system's folder for temporary files.
        processes: Processes of this machine that share its memory and disk, each with as much.
    """

    gpu_gib: float | None = None
    host_gib: float | None = None
    disk_gib: float | None = None
    folder: str | None = None
    processes: int = 1
    taken: list[int] = field(default_factory=lambda: [0, 0, 0])

    def rows(self, row_bytes: int, device: torch.device) -> tuple[int, int, int]:
        """Returns how many rows of that many bytes each tier can still take: GPU, host, disk."""
        on_gpu = device.type == "cuda"
        free_gpu = free_memory(device) if on_gpu else 0
        n = self.processes
        free = (_GPU_SHARE * free_gpu, _HOST_SHARE * free_host_memory() / n, self._free_disk() / n)
        host, disk = (
            None if given is None else given / n for given in (self.host_gib, self.disk_gib)
        )
        given = (self.gpu_gib if on_gpu else 0.0, host, disk)
        gpu_bytes, host_bytes, disk_bytes = (
            share if budget is None else budget * 2**30 - taken
            for share, budget, taken in zip(free, given, self.taken, strict=True)
        )
        allowed = (gpu_bytes, host_bytes, min(disk_bytes, free[2]))
        return tuple(max(0, int(b // row_bytes)) for b in allowed)  # type: ignore[return-value]

    def _free_disk(self) -> float:
        folder = Path(self.folder or tempfile.gettempdir()).absolute()
        while not folder.exists():
            folder = folder.parent
        return _DISK_SHARE * shutil.disk_usage(folder).free


class StateStore:
    """States of T tokens, [T, W], in tiers.

    Args:
        n_tokens: T.
        width: Numbers a token, W.
        dtype: Their precision.
        device: Where they are used.
        budget: What each tier may take.
        path: Where to make the file of a store that is kept, which then holds all states; the
            other tiers are copies. `None` puts what those cannot hold into a temporary file.
        file: Such a file that is there already: it takes no more of the disk.

    Raises:
        MemoryBudgetError: The budgets cannot hold the states; nothing was written.
        OutputError: The disk is full or cannot be written to.
    """

    def __init__(
        self,
        n_tokens: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: Budget,
        *,
        path: Path | None = None,
        file: StateFile | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.width = width
        self.n_tokens = n_tokens
        row_bytes = width * dtype.itemsize
        gpu, host, disk = budget.rows(row_bytes, device)
        n_gpu = min(n_tokens, gpu)
        n_host = min(n_tokens - n_gpu, host)
        kept = path is not None or file is not None
        n_disk = n_tokens if kept else n_tokens - n_gpu - n_host
        if n_disk > disk and file is None:
            raise MemoryBudgetError(_too_small(n_tokens, row_bytes, (gpu, host, disk)))
        self._ends = (n_gpu, n_gpu + n_host, n_tokens)
        self._file_start = 0 if kept else n_gpu + n_host
        self.file = file
        if path is not None:
            self.file = StateFile.create(path, n_tokens, width, dtype)
        elif n_disk and file is None:
            self.file = StateFile.temporary(n_disk, width, dtype, budget.folder)
        self._gpu = torch.empty(n_gpu, width, dtype=dtype, device=device) if n_gpu else None
        # Written to at once: memory that is only promised still counts as free, and the next
        # store would take its share of it as well.
        self._host = torch.empty(n_host, width, dtype=dtype).zero_() if n_host else None
        self._budget = budget
        self._taken = [n * row_bytes for n in (n_gpu, n_host, n_disk)]
        budget.taken = [a + b for a, b in zip(budget.taken, self._taken, strict=True)]

    @property
    def reads_disk(self) -> bool:
        """Whether some states are read from the file whenever they are asked for."""
        return self._ends[1] < self.n_tokens

    def where(self) -> str:
        """Returns what lies where, for people."""
        n_gpu, host_end, end = self._ends
        parts = [("GPU", n_gpu), ("host memory", host_end - n_gpu), ("disk", end - host_end)]
        row_bytes = self.width * self.dtype.itemsize
        return ", ".join(f"{n * row_bytes / 2**30:.2f} GiB {name}" for name, n in parts if n)

    def put(self, where: torch.Tensor, states: torch.Tensor) -> None:
        """Writes states.

        Args:
            where: Numbers of the tokens on the host, [K].
            states: Their states, [K, W], on any device.
        """
        for tier, start, end in self._tiers():
            chosen = ((where >= start) & (where < end)).nonzero().squeeze(1)
            if len(chosen):
                rows = states[chosen.to(states.device)].to(tier.device)
                tier[(where[chosen] - start).to(tier.device)] = rows
        if self.file is not None:
            chosen = (where >= self._file_start).nonzero().squeeze(1)
            if len(chosen):
                rows = states if len(chosen) == len(where) else states[chosen.to(states.device)]
                self.file.put(where[chosen] - self._file_start, rows.cpu())

    def put_rows(self, rows: Rows, states: torch.Tensor) -> None:
        """Writes the states of `rows` (on the host), [R, L, W]; those of filler cells are left."""
        cells = rows.real.flatten().nonzero().squeeze(1)
        self.put(rows.state_index.flatten()[cells], states.flatten(0, 1)[cells.to(states.device)])

    def get_rows(self, rows: Rows) -> torch.Tensor:
        """Returns the states of `rows` (on the host), [R, L, W]; filler cells hold anything."""
        return self.get(rows.state_index.clamp(min=0))

    def _tiers(self) -> list[tuple[torch.Tensor, int, int]]:
        """Returns the tiers above the file, each with the tokens that it begins and ends at."""
        n_gpu, host_end, _ = self._ends
        tiers = ((self._gpu, 0, n_gpu), (self._host, n_gpu, host_end))
        return [(tier, start, end) for tier, start, end in tiers if tier is not None]

    def get(self, where: torch.Tensor) -> torch.Tensor:
        """Returns the states of tokens, [..., W], on the store's device.

        Args:
            where: Numbers of the tokens on the host, any shape.
        """
        flat = where.reshape(-1)
        n_gpu, _, end = self._ends
        if self._gpu is None:
            found = self._to_device(self._from_host(flat))
        elif n_gpu == end:
            found = self._gpu[self._to_device(flat)]
        else:
            found = torch.empty(len(flat), self.width, dtype=self.dtype, device=self.device)
            on_gpu = flat < n_gpu
            cells, others = (chosen.nonzero().squeeze(1) for chosen in (on_gpu, ~on_gpu))
            found[self._to_device(cells)] = self._gpu[self._to_device(flat[cells])]
            found[self._to_device(others)] = self._to_device(self._from_host(flat[others]))
        return found.view(*where.shape, self.width)

    def _from_host(self, where: torch.Tensor) -> torch.Tensor:
        """Returns rows of the host's memory and the file, [K, W], pinned for a GPU."""
        n_gpu, host_end, end = self._ends
        if host_end == end and self._host is not None and self.device.type == "cpu":
            return self._host[where - n_gpu]
        rows = torch.empty(
            len(where), self.width, dtype=self.dtype, pin_memory=self.device.type == "cuda"
        )
        in_file = (where >= host_end).nonzero().squeeze(1)
        in_host = (where < host_end).nonzero().squeeze(1)
        if self._host is not None:
            if len(in_host) == len(where):
                torch.index_select(self._host, 0, where - n_gpu, out=rows)
            else:
                rows[in_host] = self._host[where[in_host] - n_gpu]
        if len(in_file):
            assert self.file is not None
            rows[in_file] = self.file.get(where[in_file] - self._file_start)
        return rows

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def fill_from_file_(self) -> None:
        """Copies what the tiers above the file hold from it."""
        assert self.file is not None
        for tier, start, end in self._tiers():
            for first in range(start, end, 2**16):
                last = min(first + 2**16, end)
                tier[first - start : last - start] = self.file.get(torch.arange(first, last))

    def close(self) -> None:
        """Gives the memory back, and the file if it was temporary."""
        self._gpu = self._host = None
        if self.file is not None:
            self.file.close()
        taken = zip(self._budget.taken, self._taken, strict=True)
        self._budget.taken = [a - b for a, b in taken]
        self._taken = [0, 0, 0]


def _too_small(n_tokens: int, row_bytes: int, rows: tuple[int, int, int]) -> str:
    gib = [n * row_bytes / 2**30 for n in rows]
    needed = n_tokens * row_bytes / 2**30
    return (
        f"The frozen prefix of {n_tokens} tokens takes {needed:.3g} GiB; the budgets allow "
        f"{gib[0]:.3g} GiB on the GPU, {gib[1]:.3g} GiB of host memory and {gib[2]:.3g} GiB on "
        "disk. Raise `prefix_gpu_gib`, `prefix_host_gib` or `prefix_disk_gib`, point `prefix_dir` "
        "at a larger disk, or set `frozen_prefix: false`."
    )
