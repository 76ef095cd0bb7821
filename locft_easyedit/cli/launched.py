"""The command line as one of several processes that a launcher has started.

`accelerate launch -m locft_easyedit edit ...` and `torchrun -m locft_easyedit edit ...` run the
same command in every process. Rank 0 alone speaks to the user.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

import torch
from transformers.utils import logging as transformers_logging

from ..distributed.world import World, get_world, single_process

Command = Callable[[Sequence[str]], int]

# Commands whose work the processes share.
_SHARED = ("edit", "evaluate", "ledger", "run")
# Commands that start processes of their own, one for each device: a launch tells which devices.
_BY_DEVICE = ("locate", "compare")


def run_in_world(command: str, run: Command, arguments: list[str]) -> int:
    """Runs a command, which is `run` with its arguments, as one of several processes.

    Returns:
        The exit status.
    """
    if command not in (*_SHARED, *_BY_DEVICE):  # one process is enough, and need not wait
        first = os.environ["RANK"] == "0"
        with single_process():
            return run(arguments) if first else 0
    world = get_world()
    with _spoken_by_one(world):
        if command in _BY_DEVICE:
            status = _by_device(command, world, run, arguments)
        else:
            status = run(arguments)
    sys.stdout.flush()
    if status == 0:
        world.close()
    return status


def end(status: int) -> None:
    """Ends a process that has failed: others may still be waiting for it, and hold its exit up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _spoken_by_one(world: World) -> Iterator[None]:
    """Context manager that silences every rank but the main one, errors of their own excepted."""
    if world.is_main_process:
        yield
        return
    logging.getLogger("locft_easyedit").setLevel(logging.ERROR)
    # Which ranks wait tells which one hangs.
    logging.getLogger(World.__module__).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _by_device(command: str, world: World, run: Command, arguments: list[str]) -> int:
    """Lets one process of each machine run a command on all devices that were launched there."""
    given = any(argument.startswith("devices=") for argument in arguments)
    if not given:
        on_gpu = torch.cuda.is_available()
        devices = (str(i) if on_gpu else "cpu" for i in range(world.local_size))
        arguments = [*arguments, f"devices=[{','.join(devices)}]"]
    # A study's folder may be worked on from several machines; a comparison's may not.
    works = world.local_rank == 0 and (command == "locate" or world.is_main_process)
    with single_process():
        status = run(arguments) if works else 0
        statuses = world.all_gather((works, status))
        if world.is_main_process and sum(worked for worked, _ in statuses) > 1:
            status = run(arguments)  # nothing is left to do but to show what all have found
    return max([status, *(other for _, other in statuses)])
