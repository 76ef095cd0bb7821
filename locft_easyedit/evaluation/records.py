"""Many records' metrics in little memory: as compressed JSON, a block of records at a time."""

from __future__ import annotations

import json
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ..utils.files import text_output

_BLOCK = 64  # records compressed together: their keys repeat


class LazyRecords(Sequence[dict[str, Any]]):
    """A sequence of dictionaries, each of which is made when it is looked at."""

    @abstractmethod
    def _record(self, index: int) -> dict[str, Any]:
        """Returns the record at an index, which is within 0 and N - 1."""

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._record(index % len(self))


class CompactRecords(LazyRecords):
    """A sequence of dictionaries of what JSON knows, NaN as well, in some 200 bytes each.

    Every look at a record gives a new dictionary: changing it changes nothing here.

    Args:
        records: The records; they are taken one after the other.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self._blocks: list[bytes] = []
        self._last: list[str] = []
        self._open: tuple[int, list[str]] = (-1, [])  # the block that was looked at last
        for record in records:
            self._last.append(json.dumps(record, ensure_ascii=False, separators=(",", ":")))
            if len(self._last) == _BLOCK:
                # JSON escapes line ends: between two of them is one record.
                text = "\n".join(self._last).encode("utf-8", "surrogatepass")
                self._blocks.append(zlib.compress(text, 1))
                self._last = []

    def write(self, path: Path, of: Any) -> None:
        """Writes all records to a file, one JSON text a line, after a line that says of what.

        Raises:
            OutputError: The file cannot be written.
        """
        with text_output(path, errors="surrogatepass") as file:
            file.write(json.dumps({"of": of, "records": len(self)}) + "\n")
            for block in range(len(self._blocks) + 1):
                file.writelines(text + "\n" for text in self._texts(block))

    @classmethod
    def read(cls, path: Path, of: Any) -> CompactRecords | None:
        """Returns the records of a file; `None` if it is none, damaged, or of something else."""
        try:
            with path.open(encoding="utf-8", errors="surrogatepass") as file:
                heading = json.loads(file.readline())
                if heading["of"] != json.loads(json.dumps(of)):
                    return None
                records = cls(json.loads(line) for line in file)
                return records if len(records) == heading["records"] else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK + len(self._last)

    def _record(self, index: int) -> dict[str, Any]:
        block, within = divmod(index, _BLOCK)
        return json.loads(self._texts(block)[within])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for block in range(len(self._blocks) + 1):
            yield from map(json.loads, self._texts(block))

    def _texts(self, block: int) -> list[str]:
        if block == len(self._blocks):
            return self._last
        if self._open[0] != block:
            text = zlib.decompress(self._blocks[block]).decode("utf-8", "surrogatepass")
            self._open = block, text.split("\n")
        return self._open[1]
