"""The log of a ledger: one JSON line an event, chained by hashes, appended whole or not at all.

Each line begins with a hash of itself and of the hash of the line before, so that no line can be
changed, left out or moved without those after it telling. A second file holds the same lines: where
one of the two is damaged, the other mends it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import LedgerError
from ..utils.files import output_errors, write_atomically
from ..utils.parsing import json_of, shown

logger = logging.getLogger(__name__)

FORMAT = 2
LOG, COPY = "log.jsonl", "log.copy.jsonl"
INIT, ADD, RETRACT = KINDS = ("init", "add", "retract")
_HEAD = re.compile(rb'\{"hash":"([0-9a-f]{64})",')
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@dataclass(frozen=True)
class Event:
    """A line of the log.

    Attributes:
        number: Its number, from 0.
        time: When it was written, UTC: `2030-01-31T12:00:00Z`.
        kind: `init`, `add` or `retract`.
        said: What else it says.
        hash: Hash of the line and of all lines before it.
    """

    number: int
    time: str
    kind: str
    said: Mapping[str, Any]
    hash: str


@dataclass
class Log:
    """The events of a ledger.

    Attributes:
        folder: The ledger's folder.
        events: The events in order.
        damage: A line for each thing that was found to be wrong, and is mended with the next event.
    """

    folder: Path
    events: list[Event] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    _lines: list[bytes] = field(default_factory=list, repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> Log:
        """Returns the log of a ledger.

        Raises:
            LedgerError: There is no ledger, it is of a newer version, or it is damaged and its copy
                as well.
        """
        log = cls(Path(folder))
        found = [_content(log.folder / name) for name in (LOG, COPY)]
        if all(content is None for content in found):
            raise LedgerError(
                f"`{folder}` is no ledger: it holds no {LOG}. Make one with `locft ledger init`."
            )
        log._take(*((content or b"").split(b"\n") for content in found))
        mended = log._text()
        if found[0] != mended and not log.damage:
            log.damage.append(f"{LOG} is not whole; its copy is.")
        return log

    def _take(self, *files: list[bytes]) -> None:
        """Takes the longest chain that the lines of the two files make.

        Args:
            files: Their lines; the last of each is what no line end follows.
        """
        _refuse_newer(files)
        complete = [lines[:-1] for lines in files]
        while True:
            n = len(self.events)
            candidates = [lines[n] if n < len(lines) else None for lines in complete]
            chained = [None if line is None else self._chained(line) for line in candidates]
            event = chained[0] or chained[1]
            if event is None:
                break
            if chained[0] is None and candidates[0] is not None:
                self.damage.append(f"line {n + 1} of {LOG} is damaged; its copy is whole.")
            self.events.append(event)
            self._lines.append(candidates[0] if chained[0] else candidates[1])  # type: ignore[arg-type]
        n = len(self.events)
        rest = [line for lines in files for line in lines[n:] if line]
        if not rest:
            return
        if n == 0 or any(len(lines) > n + 1 for lines in complete):
            until = f"{n} events before it are" if n else "nothing is"
            raise LedgerError(
                f"Line {n + 1} of `{self.folder / LOG}` is damaged, and so is the copy beside it: "
                f"{until} whole. Put one of the two back from a backup, or remove line {n + 1} and "
                "all after it from both to go on from there."
            )
        self.damage.append(f"line {n + 1} of {LOG} was not written to its end; it does not count.")

    def _chained(self, line: bytes) -> Event | None:
        """Returns the event of a line that follows those before it, or `None`."""
        head = _HEAD.match(line)
        if head is None or head[1].decode() != self._hash(b"{" + line[head.end() :]):
            return None
        said = json_of(line.decode("utf-8"))
        number, time, kind = (said.pop(key, None) for key in ("number", "time", "kind"))
        if kind not in KINDS:
            raise LedgerError(
                f"Line {len(self.events) + 1} of `{self.folder / LOG}` is of the kind "
                f"{shown(kind, 50)}, which this version does not know. Update locft_easyedit."
            )
        if number != len(self.events) or not re.fullmatch(_TIME, str(time)):
            return None
        return Event(number, time, kind, said, said.pop("hash"))

    def _hash(self, body: bytes) -> str:
        before = self.events[-1].hash if self.events else ""
        return hashlib.sha256(before.encode() + body).hexdigest()

    def append(self, kind: str, said: Mapping[str, Any]) -> Event:
        """Writes an event: once this returns it is on the disk, and before that it is not there.

        Args:
            kind: One of `KINDS`.
            said: What the event says, of JSON's own kinds.

        Raises:
            OutputError: It cannot be written; the log is as before.
        """
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        values = {"number": len(self.events), "time": now, "kind": kind, **said}
        body = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        event = Event(len(self.events), now, kind, dict(said), self._hash(body.encode()))
        line = f'{{"hash":"{event.hash}",{body[1:]}'.encode()
        self.mend_()
        with output_errors(self.folder):
            _append(self.folder / LOG, line + b"\n")
        self.events.append(event)
        self._lines.append(line)
        # It is committed. A copy that lags behind is brought up with the next event.
        with suppress(OSError):
            _append(self.folder / COPY, line + b"\n")
        return event

    def know_(self, event: Event) -> None:
        """Takes an event that another process has written, unless this one has."""
        if event.number == len(self.events):
            self.events.append(event)

    def mend_(self) -> None:
        """Writes both files anew where they do not hold the events and nothing else.

        Raises:
            OutputError: They cannot be written.
        """
        for name in (LOG, COPY):
            path = self.folder / name
            with output_errors(path):
                if not path.exists() or path.stat().st_size != self._size or self.damage:
                    write_atomically(path, self._text())
        self.damage.clear()

    def changed(self) -> bool:
        """Returns whether another process has written an event since this log was read."""
        path = self.folder / LOG
        return path.exists() and path.stat().st_size != self._size

    @property
    def _size(self) -> int:
        return sum(len(line) + 1 for line in self._lines)

    def _text(self) -> bytes:
        return b"".join(line + b"\n" for line in self._lines)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(
            f"`{path}` cannot be read: {error.strerror}. Give a folder that you may read."
        ) from error


def _append(path: Path, line: bytes) -> None:
    """Appends a line to a file; where that fails, the file is as before."""
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def _refuse_newer(files: tuple[list[bytes], ...]) -> None:
    """Refuses a log of a newer version, whose hashes may be made in another way."""
    for lines in files:
        number = None
        with suppress(ValueError, KeyError, TypeError, IndexError):
            number = json_of(lines[0].decode("utf-8"))["format"]
        if type(number) is int and number > FORMAT:
            raise LedgerError(
                f"The ledger is of format {number}; this version reads format {FORMAT}. "
                "Update locft_easyedit."
            )
