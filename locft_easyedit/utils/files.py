"""Writing files so that they are there whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import glob
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import OutputError

LOCK = ".lock"
_TEMPORARY = ".{name}.{by}.tmp"
_OF_A_PROCESS = re.compile(r"(?P<host>.+)-(?P<process>\d+)-[0-9a-f]{8}\.tmp")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file that takes the place of `path` when the context ends well.

    It does so once its content is on the disk; until then, and after any failure, `path` holds
    what it held, and no temporary file is left. The folder must exist. What is no regular file (a
    device, a pipe) cannot be replaced and is itself what is yielded. Of a symbolic link, what it
    leads to is replaced.

    Raises:
        OSError: The content cannot be made safe or put in place.
    """
    target = Path(path)
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    temporary = _beside(target)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        os.unlink(temporary)  # who writes nothing must not leave an empty file in place of the old
        yield temporary
        # safetensors makes files that only their owner may read, whatever the user's umask says.
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        # An error here would hide the one that led here.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync(target.parent)


def _beside(target: Path) -> Path:
    """Returns a name for a temporary file beside `target` that no other process gives."""
    # Processes of several machines may share a folder, and a number.
    by = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(_TEMPORARY.format(name=target.name, by=by))


def _host() -> str:
    """Returns this machine's name, as it may stand in a file's."""
    return re.sub(r"[^\w.]", "_", platform.node()) or "host"


def _remove_leftovers(target: Path) -> None:
    """Removes what processes of this machine that were killed have left beside `target`."""
    for leftover in target.parent.glob(_TEMPORARY.format(name=glob.escape(target.name), by="*")):
        found = _OF_A_PROCESS.fullmatch(leftover.name.removeprefix(f".{target.name}."))
        if found and found["host"] == _host() and not psutil.pid_exists(int(found["process"])):
            shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file that holds all of `content` or what it held before; see `replacing`.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` when the context ends well.

    It does so once everything in it is on the disk; after any failure nothing is left of it, and
    what a process left that was killed is removed by the next one. Folders above it are made.

    Raises:
        OutputError: `path` holds something.
        OSError: The content cannot be made safe or put in place.
    """
    target = Path(path)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"`{path}` is there already. Choose a folder that is new or empty.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target = target.resolve()
    _remove_leftovers(target)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise OutputError(
                f"`{path}` has been written by another run meanwhile. Choose another folder."
            ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


@contextmanager
def output_errors(
    path: str | Path, otherwise: str = "choose another place that you may write to"
) -> Iterator[None]:
    """Context manager that turns an error of the disk into one that says what to do about `path`.

    Raises:
        OutputError: Something could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The system's reason alone: its full text names the temporary file.
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{path} cannot be written: {reason}. Free some space, or {otherwise}."
        ) from error


@contextmanager
def text_output(path: str | Path, errors: str = "strict") -> Iterator[TextIO]:
    """Context manager that gives a UTF-8 file to write; see `replacing`, and `open` for `errors`.

    Raises:
        OutputError: The file cannot be written.
    """
    with (
        output_errors(path),
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors=errors) as file,
    ):
        yield file


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Context manager that keeps other runs from writing into `folder`, which is made if need be.

    The system ends the lock with the process, however that ends.

    Raises:
        OutputError: Another run holds it, or the folder cannot be made or written to.
    """
    path = Path(folder)
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"{path} is in use: another run is writing there. Wait for its end, or choose "
                "another folder."
            ) from error
    try:
        for leftover in path.glob(_TEMPORARY.format(name="*", by="*")):
            # Of a run that was killed.
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _sync(path: Path) -> None:
    """Waits until a file is on the disk; not every system can do this with a folder."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
