"""Several processes for a test, as a launcher starts them; all are ended when time is up.

They are forked from processes that have imported everything (see `rank_pool`), except under a real
launcher and where an environment is given.

[zero, one] = launch(2, "some_module:function", 3, "text")  # modules below `tests`
zero.value  # what the function gave on rank 0, through JSON

done = launch(2, ["-m", "locft_easyedit", "edit", "..."], check=False)
done[1].returncode, done[1].stderr

launch(2, "some_module:function", through="torchrun")  # or "accelerate": the real launchers
"""

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.rank_pool import ForkedProcess, python_environment, start_python, start_servers

_LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node={n}"],
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",  # with `--cpu` it would start one; without a GPU this is several on the CPU
        "--num_processes={n}",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port={port}",
    ],
}
_Process = subprocess.Popen[str] | ForkedProcess
_GRACE = 20.0  # seconds that the others have to end by themselves once one has failed


@dataclass
class Rank:
    """What became of a process.

    Attributes:
        value: What the function gave, once through JSON; `None` for a command.
        stdout: What it printed; under a launcher that of all of them, here as in every other.
        stderr: Likewise.
        returncode: Its exit status; under a launcher the launcher's.
    """

    value: Any
    stdout: str
    stderr: str
    returncode: int


def launch(
    n: int,
    what: str | Sequence[str],
    *arguments: Any,
    timeout: float = 120,
    through: str | None = None,
    machines: int = 1,
    check: bool = True,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[list[_Process]], None] | None = None,
) -> list[Rank]:
    """Returns what `n` processes on this machine gave that work together, by their ranks.

    Args:
        n: Processes.
        what: `module:function`, the module one that tests can import; or python's arguments.
        arguments: The function's, through JSON.
        timeout: Seconds until all are killed; a deadlock is a failure, not a wait.
        through: A real launcher, `torchrun` or `accelerate`, with options of its own. By default
            the processes get the environment that these would give them, which is quicker and
            keeps them apart.
        machines: How many they believe to be on, as many on each.
        check: Fail if one has failed.
        environment: Variables on top of this process's own, for new interpreters: some are read at
            their start.
        meanwhile: Called with the processes once they run: to kill one, say.

    Raises:
        AssertionError: Time was up, or one has failed; with the end of each one's stderr.
    """
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        out = Path(folder)
        command = _python_arguments(what, arguments, out, through, n)
        if through is not None and not isinstance(what, str):
            raise ValueError("a launcher is given a function: let the function run the command")
        shared = python_environment() | dict(environment or {})
        if through is None:
            port = str(free_port())
            mine = [shared | _rank_environment(rank, n, port, machines) for rank in range(n)]
        else:
            mine = [shared]
        files = [
            ((out / f"{i}.out").open("w"), (out / f"{i}.err").open("w")) for i in range(len(mine))
        ]
        forked = through is None and environment is None
        processes = (_fork if forked else _start)(command, mine, files)
        try:
            if meanwhile is not None:
                meanwhile(processes)
            in_time = _wait(processes, timeout)
        finally:
            for process in processes:
                _kill(process)
            for file in (file for pair in files for file in pair):
                file.close()
        ranks = []
        for rank in range(n):
            i = rank if through is None else 0
            value = out / f"value-{rank}.json"
            ranks.append(
                Rank(
                    json.loads(value.read_text()) if value.exists() else None,
                    (out / f"{i}.out").read_text(errors="replace"),
                    (out / f"{i}.err").read_text(errors="replace"),
                    processes[i].returncode,
                )
            )
    failed = [i for i, rank in enumerate(ranks) if rank.returncode != 0]
    if not in_time or (check and failed):
        why = f"ranks {failed} failed" if in_time else f"not done after {timeout} s"
        tails = "\n".join(
            f"--- rank {i}, status {rank.returncode}:\n{rank.stderr[-4000:]}"
            for i, rank in enumerate(ranks)
        )
        raise AssertionError(f"{n} processes of {what}: {why}\n{tails}")
    return ranks


def _fork(command: Sequence[str], environments: Sequence[dict], files: Sequence) -> list[_Process]:
    """Returns a forked process for each environment."""
    start_servers(len(environments))
    return [
        start_python(command, environment=environment, stdout=stdout, stderr=stderr, server=rank)
        for rank, (environment, (stdout, stderr)) in enumerate(
            zip(environments, files, strict=True)
        )
    ]


def _start(command: Sequence[str], environments: Sequence[dict], files: Sequence) -> list[_Process]:
    """Returns a new interpreter for each environment."""
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            cwd=os.getcwd(),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,  # to be ended with all that it starts
        )
        for environment, (stdout, stderr) in zip(environments, files, strict=True)
    ]


def free_port() -> int:
    """Returns a port of this machine that nobody listens on.

    It is none of those that the system gives to connections by itself (32768 and up on Linux):
    one of these may be gone before the launched processes come to listen there.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return port


def _python_arguments(
    what: str | Sequence[str], arguments: Sequence[Any], out: Path, through: str | None, n: int
) -> list[str]:
    if not isinstance(what, str):
        return [*what, *map(str, arguments)]
    call = [str(Path(__file__).resolve()), what, str(out), json.dumps(arguments)]
    if through is None:
        return call
    name, *more = through.split()
    module, *options = _LAUNCHERS[name]
    port = free_port()
    return ["-m", module, *(option.format(n=n, port=port) for option in options), *more, *call]


def _rank_environment(rank: int, n: int, port: str, machines: int) -> dict[str, str]:
    """Returns what a launcher tells a process."""
    on_each = n // machines
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % on_each),
        "GROUP_RANK": str(rank // on_each),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(on_each),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _wait(processes: Sequence[_Process], timeout: float) -> bool:
    """Waits until all have ended, or until those that are left had time to after a failure.

    Returns whether that was in time.
    """
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        states = [process.poll() for process in processes]
        if None not in states:
            return True
        if any(state is not None and state != 0 for state in states):
            end = min(end, time.monotonic() + _GRACE)
            while time.monotonic() < end:
                if all(process.poll() is not None for process in processes):
                    return True
                time.sleep(0.05)
            return False
        time.sleep(0.05)
    return False


def _kill(process: _Process) -> None:
    """Ends a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _call() -> None:
    """Calls a function as a rank; leaves what it gives where `launch` looks for it."""
    what, out, arguments = sys.argv[1:]
    module, _, function = what.partition(":")
    value = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    path = Path(out) / f"value-{os.environ['RANK']}.json"
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    _call()
