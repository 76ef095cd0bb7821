"""Ctrl-C and SIGTERM: noted until a training step ends, or passed on to other processes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NOTED = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """What has asked the training to stop.

    Args:
        patience: Seconds after the first signal in which another one is taken for the same.

    Attributes:
        received: The signal, or `None`.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.received: signal.Signals | None = None
        self._patience = patience
        self._since = 0.0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Context manager that notes the first Ctrl-C or SIGTERM; a second one acts at once.

        SIGTERM is what schedulers of clusters send before they kill. Only a program's main thread
        gets signals: in any other thread nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in _NOTED}

        def note(number: int, frame: FrameType | None) -> None:
            if self.received is None:
                self.received, self._since = signal.Signals(number), time.monotonic()
                if self._patience:
                    return
            elif time.monotonic() - self._since < self._patience:
                return
            for noted, handler in former.items():
                signal.signal(noted, handler)
            if self._patience:
                signal.raise_signal(number)

        # A program that ignores a signal goes on ignoring it; `None` is a handler not of Python's.
        taken = [n for n, handler in former.items() if handler not in (signal.SIG_IGN, None)]
        try:
            for number in taken:
                signal.signal(number, note)
            yield
        finally:
            for number in taken:
                signal.signal(number, former[number])


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Context manager that raises SIGTERM as an exception: processes that were started end too."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
