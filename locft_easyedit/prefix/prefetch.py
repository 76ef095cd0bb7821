"""The next mini-batch is fetched while the present one trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")
_Events = list["torch.cuda.Event"]


def prefetch(
    make: Callable[[Item], Made],
    items: Iterable[Item],
    device: torch.device,
    *,
    move: Callable[[Made], Iterable[torch.Tensor]],
    in_thread: bool,
    also: Iterable[torch.device] = (),
) -> Iterator[Made]:
    """Yields `make(item)` for each item, each made while the caller works on the one before.

    On a GPU, copies run on a stream of their own; the caller's stream waits for them, not the
    host.

    Args:
        make: Called once for each item, in order.
        items: The items.
        device: Where the results lie.
        move: Gives the tensors of a result.
        in_thread: Whether `make` waits for a disk or a GPU; else a thread would only cost.
        also: Other devices on which parts of the results lie.
    """
    if not in_thread:
        yield from map(make, items)
        return
    gpus = [one for one in {device: None, **dict.fromkeys(also)} if one.type == "cuda"]
    sides = [torch.cuda.Stream(gpu) for gpu in gpus]

    def made(item: Item) -> tuple[Made, _Events]:
        with ExitStack() as stack:
            # Entering a stream makes its GPU the current one: the first comes last.
            for side in reversed(sides):
                stack.enter_context(torch.cuda.stream(side))
            return make(item), [side.record_event() for side in sides]

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        waiting: Future[tuple[Made, _Events]] | None = None
        iterator = iter(items)
        for item in iterator:
            following = pool.submit(made, item)
            if waiting is not None:
                yield _arrived(waiting, gpus, move)
            waiting = following
        if waiting is not None:
            yield _arrived(waiting, gpus, move)


def _arrived(
    waiting: Future[tuple[Made, _Events]],
    gpus: Sequence[torch.device],
    move: Callable[[Made], Iterable[torch.Tensor]],
) -> Made:
    result, events = waiting.result()
    for gpu, event in zip(gpus, events, strict=True):
        torch.cuda.current_stream(gpu).wait_event(event)
    for tensor in move(result) if events else ():
        if tensor.is_cuda:
            # Its memory is not free before this stream is done.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return result
