"""What is made ahead: in order, one at a time, and with an end."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch
from helpers.two_devices import two_devices

from locft_easyedit.prefix.prefetch import SideStreams, prefetch


def fetch(make, items, in_thread=True, sides=()):
    return prefetch(make, items, move=lambda made: (), in_thread=in_thread, sides=sides)


def n_threads():
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("in_thread", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_everything_comes_once_and_in_order(n, in_thread):
    made = []

    def make(item):
        time.sleep(0.002 * (item % 3))
        made.append(item)
        return item * item

    assert list(fetch(make, iter(range(n)), in_thread)) == [i * i for i in range(n)]
    assert made == list(range(n))
    assert n_threads() == 0


def test_the_next_one_is_made_meanwhile_and_no_more():
    made, second = [], threading.Event()

    def make(item):
        made.append((item, threading.current_thread() is threading.main_thread()))
        if item == 1:
            second.set()
        return item

    arriving = fetch(make, range(5))
    assert next(arriving) == 0
    assert second.wait(10)  # while the caller has the first
    time.sleep(0.05)
    assert made == [(0, False), (1, False)]
    arriving.close()


def test_without_a_thread_nothing_is_made_ahead():
    made = []
    arriving = fetch(lambda item: made.append(item) or item, range(5), in_thread=False)
    assert next(arriving) == 0
    assert made == [0]


@pytest.mark.parametrize("in_thread", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 4])
def test_an_error_arrives_in_its_place(bad, in_thread):
    def make(item):
        if item == bad:
            raise OSError(f"item {item} cannot be read")
        return item

    arrived = []

    def consume():
        for item in fetch(make, range(5), in_thread):
            arrived.append(item)

    with pytest.raises(OSError, match=f"item {bad} cannot be read"):
        consume()
    assert arrived == list(range(bad))
    assert n_threads() == 0


def test_an_error_in_the_items_arrives():
    def items():
        yield 1
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(fetch(lambda item: item, items()))
    assert n_threads() == 0


def test_a_caller_that_stops_early_waits_for_nothing():
    made = []
    for item in fetch(lambda item: made.append(item) or item, range(10**9)):
        if item == 3:
            break
    deadline = time.time() + 10
    while n_threads() and time.time() < deadline:
        time.sleep(0.01)
    assert n_threads() == 0
    assert len(made) <= 6


def test_an_interrupted_caller_leaves_no_thread():
    def interrupted():
        for _ in fetch(lambda item: item, range(100)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert n_threads() == 0


@pytest.mark.parametrize("in_thread", [True, False])
def test_only_two_results_are_alive(in_thread):
    import weakref

    alive = weakref.WeakSet()
    most = []

    def make(item):
        most.append(len(alive) + 1)
        made = torch.zeros(3)
        alive.add(made)
        return made

    arriving = fetch(make, range(20), in_thread)
    for made in arriving:
        time.sleep(0.002)
        del made
    assert max(most) <= 2
    assert len(most) == 20


def test_what_the_caller_lets_go_is_gone():
    """Also while the next one is made: a future would keep it."""
    import weakref

    refs, gone = [], []
    arriving = fetch(lambda _: torch.zeros(3), range(6))
    for made in arriving:
        refs.append(weakref.ref(made))
        del made
        gone.append(refs[-1]() is None)
    assert gone == [True] * 6


# Streams


class Stream:
    """A stream that notes what it is told."""

    def __init__(self, name, log):
        self.device, self._name, self._log = torch.device("cuda", 0), name, log

    def __getattr__(self, told):
        def note(*args):
            self._log.append((self._name, told))
            return f"event of {self._name}"

        return note


def test_what_is_fetched_waits_for_the_callers_stream_and_is_waited_for(monkeypatch):
    log = []
    main, side = Stream("main", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    arriving = fetch(lambda item: log.append(("made", item)) or item, range(2), sides=[side])
    assert log == []
    assert list(arriving) == [0, 1]
    assert log[0] == ("side", "wait_stream")  # before anything is made
    assert log.index(("made", 0)) < log.index(("side", "record_event"))
    assert log.index(("side", "record_event")) < log.index(("main", "wait_event"))
    assert [log.count(one) for one in (("side", "wait_stream"), ("main", "wait_event"))] == [1, 2]


def test_a_gpu_has_one_side_stream():
    with two_devices():
        sides = SideStreams()
        gpus = [torch.device("cuda", i) for i in (0, 1)]
        assert sides.of([torch.device("cpu")]) == []
        [first] = sides.of([gpus[0], torch.device("cpu"), gpus[0]])
        assert sides.of(gpus)[0] is first
        assert [stream.device for stream in sides.of(gpus)] == gpus


@pytest.mark.gpu
def test_a_gpu_has_its_copies_before_they_are_used():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    host = [torch.full((2**22,), float(i)).pin_memory() for i in range(8)]
    arriving = prefetch(
        lambda tensor: tensor.to(device, non_blocking=True),
        host,
        move=lambda made: [made],
        in_thread=True,
        sides=SideStreams().of([device]),
    )
    sums = [made.double().sum() for made in arriving]
    assert [float(total) for total in sums] == [2.0**22 * i for i in range(8)]
