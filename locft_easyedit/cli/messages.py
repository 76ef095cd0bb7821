"""What a user sees of an error: one message, and with `--debug` where it comes from."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from ..distributed.launch import is_launched
from ..errors import EditInterrupted, LostRankError

OPTION = "--debug"
_debug: ContextVar[bool] = ContextVar("debug", default=False)

_RESUMABLE = ("edit", "compare", "locate")


def take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Returns the arguments without `--debug`, and whether it was among them.

    What follows the script of `locft run` is the script's own.
    """
    rest = list(arguments)
    end = len(rest)
    plain = [i for i, argument in enumerate(rest) if argument != OPTION]
    if len(plain) > 1 and rest[plain[0]] == "run":
        end = plain[1]
    ours = [argument for argument in rest[:end] if argument != OPTION]
    return ours + rest[end:], len(ours) < end


@contextmanager
def debugging(on: bool) -> Iterator[None]:
    """Context manager in which `tell` shows where errors come from, if `on`."""
    token = _debug.set(on)
    try:
        yield
    finally:
        _debug.reset(token)


def tell(command: str, error: BaseException) -> int:
    """Writes an error to the terminal: its message, after its traceback with `--debug`.

    Of several processes the first one does, whichever it was that met the error. That a rank is
    lost is told by the second one as well: it may have been the first.

    Returns:
        The exit status.
    """
    rank = _rank()
    if _debug.get():
        traceback.print_exception(error)
    lost = isinstance(error, LostRankError)
    if rank == 0 or (lost and rank == 1):
        sys.stderr.write(f"locft {command}: {error}\n")
    return 1 if lost else 2


def say_interrupted(command: str, error: KeyboardInterrupt) -> int:
    """Prints one message; returns the exit status that shells know for such an end."""
    number = signal.SIGINT
    message = "Interrupted."
    if isinstance(error, EditInterrupted):
        number, message = error.number, str(error)
    if command in _RESUMABLE:
        message += " The same command goes on."
    if _rank() == 0:
        sys.stderr.write(f"\nlocft {command}: {message}\n")
    return 128 + number


def _rank() -> int:
    """Returns this process's number among those of a launch, as far as they have met."""
    if not is_launched():
        return 0
    from ..distributed.world import existing_world  # needs torch, which takes seconds

    return existing_world().rank
