"""Notices that another process of the world has ended, in a bounded time whatever this one does.

Rank 0 has an open connection to every other rank, on which nothing comes until the end. When a
process dies the system closes its end at once; when a machine vanishes the system's own probes
find out. Both are seen also where the main thread waits for a GPU that waits for the lost one's.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

_GRACE = 5.0  # seconds for the main thread to notice as well, and to end in order
_SEEN_WITHIN = 2.0  # seconds between an operation that fails and the connection that tells why
_LOOK = 0.5  # seconds between two looks whether this process still works by itself
_PATIENCE = 600.0  # seconds for all ranks to connect, once they have found each other
_PROBES = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # a minute of silence
_DONE, _FAILED = b"D", b"F"
_MOST_BYTES = 1024  # of a message
_WITHOUT_A_WORD = (
    "ended before the others: its own messages or the launcher's say why (the system kills a "
    "process without a word when memory runs out)."
)
STATUS = 1  # of a process that ends because another one did


def connections(
    rank: int, size: int, gather: Callable[[Any], Sequence[Any]]
) -> dict[int, socket.socket]:
    """Returns the connections of rank 0 to all others; of another rank, its one to rank 0.

    Args:
        rank: This process.
        size: Number of processes.
        gather: Gives each what all have given.

    Raises:
        OSError: They cannot be made.
    """
    if rank == 0:
        token = secrets.token_hex(16)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
            server.settimeout(_PATIENCE)
            gather((server.getsockname()[1], token))
            return _accepted(server, token, size - 1)
    port, token = gather(None)[0]
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")  # where rank 0 is
    one = socket.create_connection((address, port), timeout=_PATIENCE)
    one.sendall(f"{token} {rank:8d}".encode())
    return {0: _watched(one)}


def _accepted(server: socket.socket, token: str, n: int) -> dict[int, socket.socket]:
    """Returns the connections of `n` other ranks, by rank; whoever does not know us is let go."""
    found: dict[int, socket.socket] = {}
    while len(found) < n:
        one, _ = server.accept()
        one.settimeout(_PATIENCE)
        said = b""
        while len(said) < len(token) + 9 and (more := one.recv(len(token) + 9 - len(said))):
            said += more
        name, _, number = said.partition(b" ")
        if secrets.compare_digest(name, token.encode()):
            found[int(number)] = _watched(one)
        else:
            one.close()
    return found


def _watched(one: socket.socket) -> socket.socket:
    """Returns a connection on which one waits for ever, unless the other machine is gone."""
    one.settimeout(None)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES.items():
        if hasattr(socket, option):
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return one


class Watch:
    """The connections of this rank, a thread for each.

    Args:
        rank: This process.
        names: What each rank is called in messages.
        others: The connections, by rank.

    Attributes:
        advice: What to do when a rank is lost, for the message.
        patient: Let this process go on without a rank that is lost, as long as it works by itself.
    """

    def __init__(
        self, rank: int, names: Sequence[str], others: Mapping[int, socket.socket]
    ) -> None:
        self.rank = rank
        self.names = list(names)
        self.advice = ""
        self.patient = False
        self._lost: dict[int, str] = {}
        self._seen = threading.Event()
        self._over = threading.Event()
        self._others = dict(others)
        self._threads = [
            threading.Thread(target=self._wait_for, args=(other,), daemon=True) for other in others
        ]
        for thread in self._threads:
            thread.start()

    @property
    def over(self) -> bool:
        """Whether this rank has said its last word."""
        return self._over.is_set()

    @property
    def has_told(self) -> bool:
        """Whether the loss of a rank was noticed here, and said where one process says it."""
        return bool(self._lost)

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
        """Tells the others that this rank has come to its end, and ends the watch."""
        uncaught = getattr(sys, "last_value", None)
        self._last_word(_DONE if uncaught is None else _FAILED, repr(uncaught))
        for one in self._others.values():
            with suppress(OSError):
                one.shutdown(socket.SHUT_RD)  # wakes the thread that waits
        for thread in self._threads:
            thread.join()
        for one in self._others.values():
            one.close()

    def fail(self, reason: str) -> None:
        """Tells the others that this rank is about to end, and why."""
        self._last_word(_FAILED, reason)

    def _last_word(self, word: bytes, text: str) -> None:
        self._over.set()
        for one in self._others.values():
            with suppress(OSError):  # it may be gone already
                one.sendall(word + text.encode("utf-8", "replace")[:_MOST_BYTES])
                one.shutdown(socket.SHUT_WR)

    def _wait_for(self, other: int) -> None:
        """Waits for the last word of another rank; ends this process if it has died."""
        said = b""
        with suppress(OSError):
            while more := self._others[other].recv(_MOST_BYTES):
                said += more
        while self.patient and not self._over.wait(_LOOK):
            pass
        if said.startswith(_DONE) or self._over.is_set():
            return
        self._lost[other] = said[1:].decode("utf-8", "replace")
        self._seen.set()
        if not said:
            self._tell()
        # The main thread may have met the same error, or finds out as well: it restores the model
        # and ends the program. It cannot where it waits for a GPU.
        if not self._over.wait(_GRACE):
            if said:
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
