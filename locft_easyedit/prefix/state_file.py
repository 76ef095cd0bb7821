"""A flat file of hidden states: safetensors, read row by row, with checksums beside it.

The file is an ordinary safetensors file with one tensor `states`, [T, W]. What makes it whole is a
JSON file beside it, written last: the fingerprint of what the states were made from, and a checksum
of each block. Without that file, or with another fingerprint or checksum, the states are not used.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..utils.files import output_errors, write_atomically
from ..utils.progress import progress_bar

_FORMAT = 1
_ALIGNMENT = 4096  # a page: the data can be mapped without the rest of the file
_BLOCK = 64 * 2**20  # bytes a checksum
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class StateFile:
    """States of T tokens in a file, [T, W].

    Use `create`, `open_whole` or `temporary`.
    """

    def __init__(
        self, file: BinaryIO, path: Path, n_tokens: int, width: int, dtype: torch.dtype
    ) -> None:
        self.path = path
        self.n_tokens = n_tokens
        self.width = width
        self.dtype = dtype
        self._whole = False
        self._row_bytes = width * dtype.itemsize
        self._header = _header(n_tokens, width, dtype)
        self._file = file

    @classmethod
    def temporary(
        cls, n_tokens: int, width: int, dtype: torch.dtype, folder: str | None = None
    ) -> StateFile:
        """Returns a new file that is removed on `close`.

        Raises:
            OutputError: The disk has no room or cannot be written to.
        """
        with _disk_errors(Path(folder or tempfile.gettempdir())):
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".states", prefix="locft-", dir=folder)
        os.close(handle)
        return cls.create(Path(name), n_tokens, width, dtype, nameless=True)

    @classmethod
    def create(
        cls, path: Path, n_tokens: int, width: int, dtype: torch.dtype, *, nameless: bool = False
    ) -> StateFile:
        """Returns a new file, its room on the disk reserved; it is not whole yet (see `seal`).

        Raises:
            OutputError: The disk has no room or cannot be written to.
        """
        header = _header(n_tokens, width, dtype)
        size = len(header) + n_tokens * width * dtype.itemsize
        with _disk_errors(path), ExitStack() as undo:
            path.parent.mkdir(parents=True, exist_ok=True)
            _seal_path(path).unlink(missing_ok=True)
            file = open(path, "w+b")  # noqa: SIM115
            undo.callback(_give_up, file, path)
            if nameless and os.name == "posix":
                path.unlink()  # nothing stays, whatever ends this process
            file.write(header)
            file.flush()
            _reserve(file.fileno(), size)
            undo.pop_all()
        return cls(file, path, n_tokens, width, dtype)

    @classmethod
    def open_whole(
        cls,
        path: Path,
        fingerprint: str,
        n_tokens: int,
        width: int,
        dtype: torch.dtype,
        *,
        progress: bool = False,
    ) -> tuple[StateFile | None, str]:
        """Returns a file that is whole and was made from the same things, or why there is none."""
        if not path.is_file() or not _seal_path(path).is_file():
            return None, "there is none"
        try:
            seal = json.loads(_seal_path(path).read_text(encoding="utf-8"))
            sums = [int(value) for value in seal["crc32"]]
            if seal["format"] != _FORMAT or seal["fingerprint"] != fingerprint:
                return None, "it was made from another model, text or setting"
            header = _header(n_tokens, width, dtype)
            size = len(header) + n_tokens * width * dtype.itemsize
            with ExitStack() as undo:
                file = undo.enter_context(open(path, "r+b"))
                if file.read(len(header)) != header:
                    return None, "its header is another one"
                found = cls(file, path, n_tokens, width, dtype)
                if path.stat().st_size != size or found._checksums(progress) != sums:
                    return None, "it is damaged: its size or its checksums differ"
                undo.pop_all()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            return None, f"it cannot be read ({type(error).__name__}: {error})"
        found._whole = True
        return found, ""

    def seal(self, fingerprint: str) -> None:
        """Declares the file whole: from now on it can be opened again.

        Raises:
            OutputError: The disk is full or cannot be written to.
        """
        value = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "states": [self.n_tokens, self.width],
            "block_bytes": _BLOCK,
            "crc32": self._checksums(progress=False),
        }
        with _disk_errors(self.path):
            os.fsync(self._file.fileno())
            write_atomically(_seal_path(self.path), json.dumps(value).encode())
        self._whole = True

    def put(self, where: torch.Tensor, states: torch.Tensor) -> None:
        """Writes states, [K, W] on the host, of the tokens `where`, [K].

        Raises:
            OutputError: The disk is full or cannot be written to.
        """
        if states.dtype != self.dtype or states.shape != (len(where), self.width):
            raise ValueError(  # its bytes would land in other tokens' rows
                f"States {list(states.shape)} of {states.dtype} are no rows of {self.width} "
                f"{self.dtype} for {len(where)} tokens."
            )
        if not len(where):
            return
        data = states.contiguous().view(torch.uint8).numpy()
        with _disk_errors(self.path):
            for first, last, offset in self._runs(where):
                view, done = memoryview(data[first:last].tobytes()), 0
                while done < len(view):
                    done += os.pwrite(self._file.fileno(), view[done:], offset + done)

    def get(self, where: torch.Tensor) -> torch.Tensor:
        """Returns the states of the tokens `where`, [K, W].

        Read, not mapped: the system maps the neighbours of each page as well, and these would
        count as this process's memory, many times what is asked for.
        """
        rows = torch.empty(len(where), self.width, dtype=self.dtype)
        if not len(where):
            return rows
        data = rows.view(torch.uint8).numpy().data
        with _disk_errors(self.path):
            for first, last, offset in self._runs(where):
                self._fill(data[first:last].cast("B"), offset)
        return rows

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            n_read = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not n_read:
                raise OSError(f"it ends at byte {offset + done}")
            done += n_read

    def _runs(self, where: torch.Tensor) -> Iterator[tuple[int, int, int]]:
        """Yields where neighbours in `where` begin and end, and at which byte they lie."""
        numbers = where.numpy()
        breaks = (numbers[1:] != numbers[:-1] + 1).nonzero()[0] + 1
        for first, last in pairwise([0, *breaks.tolist(), len(numbers)]):
            yield first, last, len(self._header) + int(numbers[first]) * self._row_bytes

    def close(self) -> None:
        """Closes the file; one that was not sealed is of no use to anybody and is removed."""
        open_ = not self._file.closed
        self._file.close()
        if open_ and not self._whole:
            self.path.unlink(missing_ok=True)

    def _checksums(self, progress: bool) -> list[int]:
        size = self.n_tokens * self._row_bytes
        sums = []
        with progress_bar(
            total=size, desc="checksums", unit="B", unit_scale=True, show=progress
        ) as bar:
            for start in range(0, size, _BLOCK):
                length = min(_BLOCK, size - start)
                block = os.pread(self._file.fileno(), length, len(self._header) + start)
                sums.append(zlib.crc32(block))
                bar.update(length)
        return sums


def _header(n_tokens: int, width: int, dtype: torch.dtype) -> bytes:
    """Returns the beginning of a safetensors file: the header's length, and the header."""
    size = n_tokens * width * dtype.itemsize
    states = {"dtype": _NAMES[dtype], "shape": [n_tokens, width], "data_offsets": [0, size]}
    described: dict[str, Any] = {"states": states}
    text = json.dumps(described).encode()
    padding = -(8 + len(text)) % _ALIGNMENT
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding


def _give_up(file: BinaryIO, path: Path) -> None:
    """Closes and removes a file that could not be made; the error that led here is what counts."""
    with suppress(OSError):
        file.close()  # which writes what is still buffered, and fails as well
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _seal_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _reserve(descriptor: int, size: int) -> None:
    """Gives the file its size, on the disk where the system can: a full disk shows now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _disk_errors(path: Path) -> AbstractContextManager[None]:
    """Context manager that makes an error of the disk an `OutputError` with what to do."""
    return output_errors(path, "point `prefix_dir` at a larger disk, or lower `prefix_disk_gib`")
