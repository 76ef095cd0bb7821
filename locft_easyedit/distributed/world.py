"""The processes that work on one edit together: the one place that knows about ranks.

`accelerate launch` or `torchrun` starts the same program several times. Each process is a rank of
the world, holds the model, and does its share of the edits and of the records that are measured.
What the others need to know goes through here; with one process every method does nothing, and
nothing of torch.distributed is set up.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..errors import HyperParamsError, LocFTError, LostRankError, RankError
from ..utils.memory import is_out_of_memory
from .launch import LAUNCHED, is_launched
from .meeting import TIMEOUT, collective_time, launcher_store

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WARN_SECONDS = 600.0  # that a rank waits for the others before it says so


def share_of_gpus(n_gpus: int, local_rank: int, local_size: int) -> list[int]:
    """Returns the numbers of the GPUs that one of several processes on a machine may use.

    Shares are disjoint, of neighbours, and differ by one GPU at most.

    Raises:
        HyperParamsError: There are fewer GPUs than processes.
    """
    if 0 < n_gpus < local_size:
        raise HyperParamsError(
            f"{local_size} processes on a machine with {n_gpus} GPUs: each needs one at least. "
            f"Launch {n_gpus} processes or fewer."
        )
    return list(range(n_gpus * local_rank // local_size, n_gpus * (local_rank + 1) // local_size))


@dataclass(eq=False)
class World:
    """The processes of one program; by default one alone.

    All methods but `partition` and `advise` are collective: every rank has to call them, in
    the same order. They raise a `LostRankError` if another rank has ended, or cannot be reached.

    Attributes:
        rank: This process, counted from 0. Rank 0 writes, reports, and is asked where one decides.
        size: Number of processes.
        local_rank: This process among those of its machine.
        local_size: Their number.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _hosts: Any = None  # the group of what the hosts tell each other
    _owned: bool = False  # whether the processes were brought together here
    _home: torch.device | None = None  # this process's GPU, or the first of them
    _advice: str = ""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def partition(self, sizes: np.ndarray, first: int = 0) -> np.ndarray:
        """Returns which of N items are this rank's, ascending; every item is one rank's.

        Args:
            sizes: The work of each item, [N]: this is dealt out evenly.
            first: Which rank gets the largest item, counted on and on from rank 0.
        """
        order = np.argsort(-sizes, kind="stable")
        return np.sort(order[(self.rank - first) % self.size :: self.size])

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all ranks: the same bits on all of them."""
        # A GPU goes on by itself; the host does not wait.
        self._exchange("all_reduce", tensors, dist.all_reduce)

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by that of rank 0."""
        self._exchange("broadcast", tensors, functools.partial(dist.broadcast, src=0))

    def all_max(self, values: Sequence[int]) -> list[int]:
        """Returns the largest of each number over all ranks, on the host."""
        if not self.is_distributed:
            return list(values)
        found = torch.tensor(values)
        with self._waiting_for_others("all_reduce"):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._hosts)
        return [int(value) for value in found]

    def all_gather(self, value: T) -> list[T]:
        """Returns what each rank has given, in their order, to all of them."""
        if not self.is_distributed:
            return [value]
        found: list[Any] = [None] * self.size
        with self._waiting_for_others("all_gather"):
            dist.all_gather_object(found, value, group=self._hosts)
        return found

    def broadcast_from_main(self, find: Callable[[], T]) -> T:
        """Returns what `find` gives on rank 0, where alone it is called, to all ranks.

        Raises:
            Exception: What it raised there, on all ranks.
        """
        if not self.is_distributed:
            return find()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_main_process:
            try:
                told[0] = find()
            except Exception as raised:  # the others wait for an answer, whatever went wrong
                error = raised
                told[1] = raised
                if not isinstance(raised, LocFTError):
                    told[1] = RankError(f"Rank 0 of {self.size} failed: {brief(raised)}")
        with self._waiting_for_others("broadcast"):
            dist.broadcast_object_list(told, src=0, group=self._hosts)
        found, failure = told
        if failure is not None:
            raise failure if error is None else error
        return found

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Context manager for what each rank does by itself; an error in one ends all of them.

        Raises:
            RankError: Another rank has failed.
        """
        if not self.is_distributed:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except LostRankError:
            raise
        except Exception as raised:  # the others would wait for this one
            error = raised
        self.share_error(error)

    def share_error(self, error: Exception | None) -> None:
        """Tells all ranks what went wrong in each, and ends what they do together.

        Raises:
            Exception: What went wrong here.
            RankError: Another rank has failed.
        """
        failures = self.all_gather(None if error is None else brief(error))
        if error is not None:
            raise error
        failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
        if failed:
            rank, failure = failed[0]
            raise RankError(f"Rank {rank} of {self.size} failed: {failure}")

    def close(self) -> None:
        """Waits for all ranks, and leaves them."""
        self.all_gather(None)
        self._leave()

    def _leave(self) -> None:
        """Ends the threads of the process group: those that are still there crash Python's end."""
        if self._owned and dist.is_initialized():
            dist.destroy_process_group()

    def advise(self, advice: str) -> None:
        """Notes what a message about a lost rank should say of how to go on."""
        self._advice = advice

    def _exchange(
        self,
        collective: str,
        tensors: Iterable[torch.Tensor],
        operation: Callable[..., Any],
    ) -> None:
        """Runs a collective operation on each tensor, in place."""
        if not self.is_distributed:
            return
        with self._waiting_for_others(collective):
            for tensor in tensors:
                given = tensor.detach()
                if given.device.type == "cpu":
                    moved, group = given, self._hosts
                else:
                    # NCCL wants the GPUs in pairs, and spread models are not split alike.
                    moved, group = given.to(self._home), None
                operation(moved, group=group)
                if moved is not given:
                    given.copy_(moved)

    @contextmanager
    def _waiting_for_others(self, collective: str) -> Iterator[None]:
        """Context manager that runs a collective operation, and warns once if it takes long.

        Raises:
            LostRankError: It has failed: another rank has ended, or cannot be reached.
        """
        try:
            with self.warning_of_waits(collective):
                yield
        except RuntimeError as error:  # torch.distributed's own errors as well
            if is_out_of_memory(error):
                raise
            raise LostRankError(
                f"Rank {self.rank} of {self.size} has lost the other ranks in {collective} "
                f"({brief(error)}): one of them has ended, or cannot be reached. Its own messages "
                "or the launcher's say why (the system kills a process without a word when memory "
                f"runs out). {self._advice}".strip()
            ) from error

    @contextmanager
    def warning_of_waits(self, what: str) -> Iterator[None]:
        """Context manager that warns once if it takes long and there are other ranks.

        For a collective operation of GPUs it belongs around what waits for the GPU: the operation
        itself returns at once.

        Args:
            what: What is waited for.
        """
        if not self.is_distributed:
            yield
            return
        # A rank that hangs keeps its connections: nothing fails, and nothing else would tell.
        timer = threading.Timer(
            _WARN_SECONDS,
            logger.warning,
            (
                "Rank %d of %d is still waiting for the other ranks in %s, after %.0f s. A rank "
                "that does not say so has more to do, or hangs: look there. %s ends such waits.",
                self.rank,
                self.size,
                what,
                _WARN_SECONDS,
                TIMEOUT,
            ),
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


SINGLE_PROCESS = World()
_world: World | None = None


def existing_world() -> World:
    """Returns the world of this process as far as it is set up, without waiting."""
    return _world or SINGLE_PROCESS


def get_world() -> World:
    """Returns the world that this process is part of, set up when it is first asked for.

    Raises:
        HyperParamsError: `LOCFT_TIMEOUT_MINUTES` is no time.
        RankError: The launcher's processes do not find each other.
    """
    global _world
    if _world is None:
        _world = _launched_world() if is_launched() else SINGLE_PROCESS
    return _world


@contextmanager
def single_process() -> Iterator[None]:
    """Context manager that lets this process, and those that it starts, work by themselves."""
    global _world
    world = _world
    launcher = {key: os.environ.pop(key) for key in LAUNCHED if key in os.environ}
    try:
        _world = SINGLE_PROCESS
        yield
    finally:
        os.environ.update(launcher)
        _world = world


def _launched_world() -> World:
    """Returns the world of the launcher's processes."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpu, home = n_gpus >= local_size, None
    timeout = collective_time()
    owned = not dist.is_initialized()  # else the program has done so
    try:
        if on_gpu:
            home = torch.device("cuda", share_of_gpus(n_gpus, local_rank, local_size)[0])
            torch.cuda.set_device(home)
        if owned:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=launcher_store(rank, size),
                rank=rank,
                world_size=size,
                timeout=timeout,
                # NCCL connects at once, before anything is loaded, and knows which GPU is whose.
                device_id=home,
            )
        hosts = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise RankError(
            f"The {size} processes of the launcher do not find each other: {brief(error)}. Check "
            "its addresses, ports and network interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), "
            "and that all machines run the same versions."
        ) from error
    world = World(rank, size, local_rank, local_size, hosts, _owned=owned, _home=home)
    # A program that is through may end before another one that is not.
    atexit.register(world._leave)
    return world


def brief(error: BaseException) -> str:
    """Returns an error in words; of those that are not ours, the first line."""
    if isinstance(error, LocFTError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@dataclass(eq=False)
class Partition:
    """A rank's part of the edits.

    Attributes:
        world: Whose.
        own: Indices of its edits, ascending.
        position: Where each of all edits is among `own`; -1 if it is another rank's, [N].
    """

    world: World
    own: np.ndarray
    position: np.ndarray

    @classmethod
    def of_rank(cls, world: World, sizes: np.ndarray, first: int = 0) -> Partition:
        """Returns this rank's part of edits of these sizes, [N]; `first` as for `partition`."""
        return cls.of(world, world.partition(sizes, first), len(sizes))

    @classmethod
    def of(cls, world: World, own: np.ndarray, n: int) -> Partition:
        """Returns the part of `n` edits that are a rank's `own`, ascending."""
        position = np.full(n, -1, np.int64)
        position[own] = np.arange(len(own))
        return cls(world, own, position)

    def positions_of(self, batch: np.ndarray) -> np.ndarray:
        """Returns which of the own edits are in a mini-batch of all, in its order."""
        positions = self.position[batch]
        return positions[positions >= 0]
