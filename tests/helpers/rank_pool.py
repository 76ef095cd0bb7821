"""Python processes that start at once: forked from one that has imported everything already.

A new interpreter that imports torch, transformers and the package takes five seconds of a CPU, and
the tests of ranks and of the command line start more than a hundred. Here a server imports them
once; each process that it forks is an ordinary one from there on, with an environment, a folder,
output, signals and an exit status of its own, and nothing is left of it for the next.

    process = start_python(["-m", "locft_easyedit", "edit", "..."], stderr=file)
    done = run_python(["-c", "print(1)"])

Each rank is forked from a server of its own: the hashes of strings, and with them the order of
sets, differ between the processes of a real launch. What is read from the environment while python
starts or imports (`PYTHONHASHSEED`, `TQDM_DISABLE`, `MALLOC_...`) is the server's: a test of that
needs `subprocess`, as do tests of the import itself.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

TESTS = Path(__file__).resolve().parents[1]
_ANSWER_SECONDS = 120.0  # the first answer comes after the imports
_MOST_BYTES = 2**17  # of a request: arguments and an environment
_servers: list["ForkServer"] = []


class ForkServer:
    """A process that forks others; started when it is made, and asked before it is ready."""

    def __init__(self) -> None:
        self._channel, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_ANSWER_SECONDS)
        with served:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), str(served.fileno())],
                env=python_environment(),
                pass_fds=[served.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C on the terminal is for pytest
            )

    def ask(self, request: Mapping[str, object], files: Sequence[int] = ()) -> int | None:
        """Returns what the server answers: a process's number or its status.

        Raises:
            RuntimeError: The server has ended.
        """
        socket.send_fds(self._channel, [json.dumps(request).encode()], files)
        answer = self._channel.recv(_MOST_BYTES)
        if not answer:
            raise RuntimeError(f"the fork server ended with status {self._process.wait()}")
        value: int | None = json.loads(answer)
        return value

    def close(self) -> None:
        """Ends the server; its processes were waited for."""
        self._channel.close()
        self._process.wait()


class ForkedProcess:
    """A process that a server has forked; used as a `subprocess.Popen` is."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; `None` while the process runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300.0) -> int:
        """Returns the exit status once there is one.

        Raises:
            TimeoutExpired: There is none after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process and waits for its end."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def start_python(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: IO[str] | int = subprocess.DEVNULL,
    stderr: IO[str] | int = subprocess.DEVNULL,
    server: int = 0,
) -> ForkedProcess:
    """Returns a process that does what `python ARGUMENTS` does in the current folder.

    Args:
        arguments: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`.
        environment: All of its variables; by default those of this process.
        stdout: Open file for what it prints.
        stderr: Likewise.
        server: Which of the servers forks it.
    """
    start_servers(server + 1)
    request = {
        "arguments": list(arguments),
        "environment": dict(os.environ if environment is None else environment),
        "folder": os.getcwd(),
    }
    with open(os.devnull) as no_input, open(os.devnull, "w") as no_output:
        files = [
            (no_output if file == subprocess.DEVNULL else file).fileno()
            for file in (stdout, stderr)
        ]
        pid = _servers[server].ask(request, [no_input.fileno(), *files])
    assert pid is not None
    return ForkedProcess(_servers[server], pid)


def run_python(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """Returns the end and the output of `start_python`'s process.

    Raises:
        TimeoutExpired: It has not ended after `timeout` seconds; it is killed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start_python(arguments, environment=environment, stdout=out, stderr=err)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), status, out.read(), err.read())


def start_servers(n: int) -> None:
    """Starts servers until there are `n`; they import at the same time."""
    while len(_servers) < n:
        _servers.append(ForkServer())
        atexit.register(_servers[-1].close)


def python_environment() -> dict[str, str]:
    """Returns an environment in which nobody launched anything yet, and each has one thread."""
    from locft_easyedit.distributed.launch import single_process_environment

    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return single_process_environment() | {
        "PYTHONPATH": path.strip(os.pathsep),
        "OMP_NUM_THREADS": "1",  # equal sums want equal threads, and there are few cores
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }


# What follows runs in the server, and in what it forks.


def _serve(channel: socket.socket) -> tuple[dict[str, object], list[int]] | None:
    """Answers until the tests end; in a forked process, returns its request and its files."""
    while True:
        message, files, _, _ = socket.recv_fds(channel, _MOST_BYTES, 3)
        if not message:
            return None
        request = json.loads(message)
        if "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                channel.close()
                return request, files
            os.setpgid(answer, answer)  # before anybody knows its number: to be killed as a group
            for file in files:
                os.close(file)
        channel.sendall(json.dumps(answer).encode())


def _become(request: dict, files: list[int]) -> None:
    """Goes on as the python process that was asked for."""
    import numpy as np

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()  # Python's own generator does so by itself
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, request["folder"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], request["folder"]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _import_everything() -> None:
    """Imports what nearly every process uses."""
    import locft_easyedit.cli.edit
    import locft_easyedit.cli.evaluate
    import locft_easyedit.cli.launched  # noqa: F401
    from helpers import (
        distributed_runs,  # noqa: F401
        sharded_ranks,  # noqa: F401
    )

    # A fork has one thread alone; what another one held would be held for ever.
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"


if __name__ == "__main__":
    _import_everything()
    gc.freeze()  # else the end of every process looks through all that was imported
    with socket.socket(fileno=int(sys.argv[1])) as served:
        asked = _serve(served)
    if asked is not None:
        _become(*asked)
