"""What a command says and returns when Ctrl-C or SIGTERM ends it."""

from __future__ import annotations

import signal
import sys

from ..errors import EditInterrupted
from ..world import existing_world

_RESUMABLE = ("edit", "compare", "locate")


def say_interrupted(command: str, error: KeyboardInterrupt) -> int:
    """Prints one message; returns the exit status that shells know for such an end.

    Args:
        command: Which command was running.
        error: What ended it.
    """
    number = signal.SIGINT
    message = "Interrupted."
    if isinstance(error, EditInterrupted):
        number, message = error.number, str(error)
    if command in _RESUMABLE:
        message += " The same command goes on."
    if existing_world().is_main_process:
        sys.stderr.write(f"\nlocft {command}: {message}\n")
    return 128 + number
