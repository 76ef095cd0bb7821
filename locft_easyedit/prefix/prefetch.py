"""The next mini-batch is fetched while the present one trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")
_Events = list["torch.cuda.Event"]


class SideStreams:
    """Streams beside the main ones, one for each GPU, for as long as a run lasts.

    PyTorch keeps memory that is given back for the stream that it was taken on: each new stream
    would leave behind as much as is fetched ahead.
    """

    def __init__(self) -> None:
        self._made: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, devices: Iterable[torch.device]) -> list[torch.cuda.Stream]:
        """Returns a stream for each GPU among `devices`, the same ones at every call."""
        gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        for gpu in gpus:
            if gpu not in self._made:
                self._made[gpu] = torch.cuda.Stream(gpu)
        return [self._made[gpu] for gpu in gpus]


def prefetch(
    make: Callable[[Item], Made],
    items: Iterable[Item],
    *,
    move: Callable[[Made], Iterable[torch.Tensor]],
    in_thread: bool,
    sides: Sequence[torch.cuda.Stream] = (),
) -> Iterator[Made]:
    """Yields `make(item)` for each item, each made while the caller works on the one before.

    On a GPU, copies run on a stream of their own; the caller's stream waits for them, not the
    host. What was yielded is the caller's alone.

    Args:
        make: Called once for each item, in order. On GPUs it may use what the caller's streams have
            been given to do before the first item is asked for.
        items: The items.
        move: Gives the tensors of a result.
        in_thread: Whether `make` waits for a disk or a GPU; else a thread would only cost.
        sides: A stream of each GPU on which parts of the results lie (see `SideStreams`).
    """
    if not in_thread:
        yield from map(make, items)
        return
    for side in sides:
        side.wait_stream(torch.cuda.current_stream(side.device))

    def made(item: Item) -> tuple[Made, _Events]:
        with ExitStack() as stack:
            # Entering a stream makes its GPU the current one: the first comes last.
            for side in reversed(sides):
                stack.enter_context(torch.cuda.stream(side))
            return make(item), [side.record_event() for side in sides]

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        # Nothing here holds what the caller has: a future would keep its result alive.
        waiting: deque[Future[tuple[Made, _Events]]] = deque()
        for item in items:
            waiting.append(pool.submit(made, item))
            if len(waiting) > 1:
                yield _arrived(waiting.popleft(), sides, move)
        if waiting:
            yield _arrived(waiting.popleft(), sides, move)


def _arrived(
    waiting: Future[tuple[Made, _Events]],
    sides: Sequence[torch.cuda.Stream],
    move: Callable[[Made], Iterable[torch.Tensor]],
) -> Made:
    result, events = waiting.result()
    for side, event in zip(sides, events, strict=True):
        torch.cuda.current_stream(side.device).wait_event(event)
    for tensor in move(result) if events else ():
        if tensor.is_cuda:
            # Its memory is not free before this stream is done.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return result
