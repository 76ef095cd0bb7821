"""Notices that another process of the world has ended, in a bounded time whatever this one does.

Rank 0 has an open connection to every other rank, on which nothing comes until the end. When a
process dies the system closes its end, also where the main thread waits for a GPU that waits for
the dead one's GPU. Gloo's connections are used, so that no address has to be known.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

_GRACE = 5.0  # seconds for the main thread to notice as well, and to end in order
_SEEN_WITHIN = 2.0  # seconds between an operation that fails and the connection that tells why
_DONE, _FAILED = 1, 2
_MOST_BYTES = 1024  # of a message
_WITHOUT_A_WORD = (
    "ended before the others: its own messages or the launcher's say why (the system kills a "
    "process without a word when memory runs out)."
)
STATUS = 1  # of a process that ends because another one did


class Watch:
    """The connections of this rank, a thread for each.

    Args:
        rank: This process.
        names: What each rank is called in messages.
        group: A group of gloo for nothing but this.

    Attributes:
        advice: What to do when a rank is lost, for the message.
    """

    def __init__(self, rank: int, names: Sequence[str], group: Any) -> None:
        self.rank = rank
        self.names = list(names)
        self.advice = ""
        self._group = group
        self._lost: dict[int, str] = {}
        self._seen = threading.Event()
        self._over = threading.Event()
        self._others = range(1, len(names)) if rank == 0 else range(1)
        self._threads = [
            threading.Thread(target=self._wait_for, args=(other,), daemon=True)
            for other in self._others
        ]
        for thread in self._threads:
            thread.start()

    @property
    def over(self) -> bool:
        """Whether this rank has said its last word."""
        return self._over.is_set()

    def explained(self, symptom: str) -> str:
        """Returns in words why something that all ranks do together has failed.

        Args:
            symptom: What this process has seen of it.
        """
        self._seen.wait(_SEEN_WITHIN)
        if self._lost:
            return self._message()
        return f"The {len(self.names)} processes lost each other ({symptom}). {self.advice}".strip()

    def close(self) -> None:
        """Tells the others that this rank has come to its end, and waits for theirs.

        A thread that still waited would bring the program down while it ends.
        """
        uncaught = getattr(sys, "last_value", None)
        self._last_word(_DONE if uncaught is None else _FAILED, repr(uncaught))
        for thread in self._threads:
            thread.join()

    def fail(self, reason: str) -> None:
        """Tells the others that this rank is about to end, and why."""
        self._last_word(_FAILED, reason)

    def _last_word(self, word: int, text: str) -> None:
        self._over.set()
        with suppress(RuntimeError):  # they may be gone already
            self._send(word, text)

    def _send(self, word: int, text: str) -> None:
        message = torch.zeros(1 + _MOST_BYTES, dtype=torch.uint8)
        written = text.encode()[:_MOST_BYTES]
        message[: 1 + len(written)] = torch.tensor([word, *written], dtype=torch.uint8)
        for other in self._others:
            dist.send(message, dst=other, group=self._group)

    def _wait_for(self, other: int) -> None:
        """Waits for the last word of another rank; ends this process if it has died."""
        message = torch.zeros(1 + _MOST_BYTES, dtype=torch.uint8)
        try:
            dist.recv(message, src=other, group=self._group)
        except RuntimeError:
            message.zero_()
        word, reason = int(message[0]), bytes(message[1:].tolist()).rstrip(b"\0")
        if word == _DONE or self._over.is_set():
            return
        self._lost[other] = reason.decode(errors="replace")
        self._seen.set()
        if word != _FAILED:
            self._tell()
        # The main thread may have met the same error, or finds out as well: it restores the model
        # and ends the program. It cannot where it waits for a GPU.
        if not self._over.wait(_GRACE):
            if word == _FAILED:
                self._tell()
            os._exit(STATUS)

    def _tell(self) -> None:
        # One for all: the lowest rank that is left.
        if self.rank == 0 or (self.rank == 1 and 0 in self._lost):
            sys.stderr.write(f"\n{self._message()}\n")
            sys.stderr.flush()

    def _message(self) -> str:
        parts = []
        for other, reason in sorted(self._lost.items()):
            why = f"failed: {reason}" if reason else _WITHOUT_A_WORD
            parts.append(f"{self.names[other]} of {len(self.names)} {why}")
        return " ".join([*parts, self.advice]).strip()
