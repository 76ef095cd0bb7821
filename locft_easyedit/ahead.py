"""The next mini-batch is fetched while the present one trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(
    make: Callable[[Item], Made],
    items: Iterable[Item],
    device: torch.device,
    *,
    move: Callable[[Made], Iterable[torch.Tensor]],
    in_thread: bool,
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
    """
    if not in_thread:
        yield from map(make, items)
        return
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def made(item: Item) -> tuple[Made, torch.cuda.Event | None]:
        if side is None:
            return make(item), None
        with torch.cuda.device(device), torch.cuda.stream(side):
            result = make(item)
            return result, side.record_event()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        waiting: Future[tuple[Made, torch.cuda.Event | None]] | None = None
        iterator = iter(items)
        for item in iterator:
            following = pool.submit(made, item)
            if waiting is not None:
                yield _arrived(waiting, device, move)
            waiting = following
        if waiting is not None:
            yield _arrived(waiting, device, move)


def _arrived(
    waiting: Future[tuple[Made, torch.cuda.Event | None]],
    device: torch.device,
    move: Callable[[Made], Iterable[torch.Tensor]],
) -> Made:
    result, event = waiting.result()
    if event is not None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(event)
        for tensor in move(result):
            if tensor.is_cuda:
                tensor.record_stream(stream)  # its memory is not free before this stream is done
    return result
