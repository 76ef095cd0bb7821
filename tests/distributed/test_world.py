"""What processes that work together tell each other; alone, nothing of it costs anything."""

import logging
import os
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.launching import free_port, launch
from hypothesis import given
from hypothesis import strategies as st

from locft_easyedit.distributed import meeting
from locft_easyedit.distributed import world as world_module
from locft_easyedit.distributed.launch import is_launched, single_process_environment
from locft_easyedit.distributed.world import (
    SINGLE_PROCESS,
    Partition,
    World,
    get_world,
    single_process,
)
from locft_easyedit.errors import HyperParamsError, LocFTError, LostRankError, RankError


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 9))
def test_every_item_is_somebodys_and_the_work_is_even(sizes, n):
    sizes = np.array(sizes, np.int64)
    shares = [World(rank, n).partition(sizes) for rank in range(n)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(sizes)))
    assert all((np.diff(share) > 0).all() for share in shares)
    work = [int(sizes[share].sum()) for share in shares]
    # Dealt out from the largest on, the first is ahead by one item at most.
    assert max(work) - min(work) <= max(sizes, default=0)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 40), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_mini_batch_is_split_into_the_shares_in_its_order(n_edits, n, random):
    sizes = np.array([random.randint(1, 9) for _ in range(n_edits)])
    batch = np.array(random.sample(range(n_edits), random.randint(0, n_edits)), np.int64)
    found = []
    for rank in range(n):
        share = Partition.of_rank(World(rank, n), sizes)
        mine = share.own[share.positions_of(batch)]
        assert [i for i in batch if i in set(mine.tolist())] == mine.tolist()
        found += mine.tolist()
    assert sorted(found) == sorted(batch.tolist())


def test_one_process_is_the_first_and_only_one():
    tensor = torch.ones(3)
    SINGLE_PROCESS.sum_([tensor])
    SINGLE_PROCESS.broadcast_([tensor])
    assert torch.equal(tensor, torch.ones(3))
    assert (SINGLE_PROCESS.is_main_process, SINGLE_PROCESS.is_distributed) == (True, False)
    assert SINGLE_PROCESS.all_max([3, -1]) == [3, -1]
    assert SINGLE_PROCESS.all_gather("a") == ["a"]
    assert SINGLE_PROCESS.broadcast_from_main(lambda: 5) == 5
    with pytest.raises(KeyError), SINGLE_PROCESS.sharing_errors():
        raise KeyError("passed on as it is")
    SINGLE_PROCESS.close()
    assert get_world() is SINGLE_PROCESS


def test_an_environment_without_a_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("KEPT", "yes")
    assert is_launched()
    assert "RANK" not in single_process_environment()
    with single_process():
        assert not is_launched()
        assert (get_world(), os.environ["KEPT"]) == (SINGLE_PROCESS, "yes")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_launched()


def one_process():
    """What a launch of one process sets up: nothing."""
    return [get_world() is SINGLE_PROCESS, dist.is_initialized()]


@pytest.mark.processes
@pytest.mark.parametrize("through", [None, pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_launch_of_one_process_is_a_plain_one(through):
    [only] = launch(1, "distributed.test_world:one_process", through=through)
    assert only.value == [True, False]


def told():
    """Every operation once, on each rank."""
    world = get_world()
    summed, given = torch.full((2,), world.rank + 1.0), torch.full((2,), float(world.rank))
    leaf = torch.full((2,), float(world.rank), requires_grad=True)
    world.sum_([summed])
    world.broadcast_([given, leaf])
    found = [
        summed.tolist(),
        given.tolist(),
        leaf.tolist(),
        world.all_max([world.rank, -world.rank]),
    ]
    found += [
        world.all_gather(f"rank {world.rank}"),
        world.broadcast_from_main(lambda: {"a": world.rank}),
    ]
    return found


def raised(act):
    try:
        act()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def failing():
    """How errors of one rank reach the others."""
    world = get_world()

    def ours():
        raise HyperParamsError("`lr=0` is wrong.\nSecond line.")

    def theirs():
        raise ZeroDivisionError("first line\nsecond line")

    def part_of_one(error):
        with world.sharing_errors():
            if world.rank == 2:
                raise error

    return [
        raised(lambda: world.broadcast_from_main(ours)),
        raised(lambda: world.broadcast_from_main(theirs)),
        raised(lambda: part_of_one(LocFTError("No room.\nBuy some."))),
        raised(lambda: part_of_one(IndexError("a\nb"))),
        raised(lambda: part_of_one(None) if world.rank != 2 else world.all_gather(None)),
    ]


@pytest.mark.processes
def test_all_ranks_are_told_the_same():
    for rank in launch(3, "distributed.test_world:told"):
        *tensors, most, names, first = rank.value
        assert tensors == [[6.0, 6.0], [0.0, 0.0], [0.0, 0.0]]
        assert most == [2, 0]
        assert names == ["rank 0", "rank 1", "rank 2"]
        assert first == {"a": 0}


@pytest.mark.processes
def test_the_error_of_one_is_an_error_of_all():
    ranks = launch(3, "distributed.test_world:failing")
    for number, rank in enumerate(ranks):
        asked, unexpected, known, unknown, none = rank.value
        assert asked == ["HyperParamsError", "`lr=0` is wrong.\nSecond line."]
        if number == 0:
            assert unexpected == ["ZeroDivisionError", "first line\nsecond line"]
        else:
            assert unexpected == ["RankError", "Rank 0 of 3 failed: ZeroDivisionError: first line"]
        if number == 2:
            assert known == ["LocFTError", "No room.\nBuy some."]
            assert unknown == ["IndexError", "a\nb"]
        else:
            assert known == ["RankError", "Rank 2 of 3 failed: No room.\nBuy some."]
            assert unknown == ["RankError", "Rank 2 of 3 failed: IndexError: a"]
        assert none is None


def ends_early():
    """Rank 1 is through long before rank 0, which then still works."""
    if get_world().rank == 0:
        time.sleep(3)
    return get_world().rank


@pytest.mark.processes
def test_one_may_end_before_another():
    assert [rank.value for rank in launch(2, "distributed.test_world:ends_early")] == [0, 1]


def one_leaves():
    """Rank 1 ends with a status of its own while rank 0 waits for it."""
    world = get_world()
    if world.rank == 1:
        raise SystemExit(3)
    return raised(lambda: world.all_gather(None))


@pytest.mark.processes
def test_whoever_leaves_is_not_waited_for():
    first, second = launch(2, "distributed.test_world:one_leaves", check=False)
    assert second.returncode == 3
    assert first.value[0] == "LostRankError"
    assert "Rank 0 of 2 has lost the other ranks in all_gather (" in first.value[1]
    assert "one of them has ended, or cannot be reached" in first.value[1]


def dies_while_another_waits():
    """Rank 1 is killed, as by the system when memory runs out, while rank 0 waits for it."""
    from locft_easyedit.cli.launched import run_in_world
    from locft_easyedit.cli.messages import tell

    def wait(arguments):
        world = get_world()
        world.advise("Last words.")
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.all_gather(None)
        return 0

    try:
        return run_in_world("edit", wait, [])
    except LocFTError as error:
        os._exit(tell("edit", error))


@pytest.mark.parametrize("through", ["torchrun", "accelerate"])
def test_a_launcher_ends_a_job_of_which_a_rank_was_killed(through):
    began = time.monotonic()
    first, _ = launch(
        2, "distributed.test_world:dies_while_another_waits", through=through, check=False
    )
    assert first.returncode == 1
    assert "locft edit: Rank 0 of 2 has lost the other ranks in all_gather (" in first.stderr
    assert "when memory runs out). Last words." in first.stderr
    assert "Signal 9 (SIGKILL)" in first.stderr  # of the launcher, about rank 1
    assert time.monotonic() - began < 60


def waits_for_long():
    """Rank 1 is busy for longer than rank 0 waits without a word."""
    records = []
    world_module._WARN_SECONDS = 0.5
    world_module.logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: records.append(record.getMessage())
    world = get_world()
    world.all_gather("at once")
    if world.rank == 1:
        time.sleep(3)
    world.all_max([1])
    return records


def test_waiting_for_a_gpu_is_told_as_well(monkeypatch, caplog):
    """What GPUs exchange returns at once: the host waits later, for its own GPU."""
    monkeypatch.setattr(world_module, "_WARN_SECONDS", 0.05)
    for world in (World(), World(1, 2)):
        with world.warning_of_waits("an epoch's losses"):
            time.sleep(0.3)
        with world.warning_of_waits("what comes at once"):
            pass
    time.sleep(0.1)
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith("Rank 1 of 2 is still waiting for the other ranks in an epoch's losses")
    assert "LOCFT_TIMEOUT_MINUTES ends such waits" in told


def test_a_rank_that_waits_says_so_once():
    first, second = launch(2, "distributed.test_world:waits_for_long")
    [told] = first.value
    assert told.startswith("Rank 0 of 2 is still waiting for the other ranks in all_reduce, after")
    assert second.value == []


def not_started():
    """Rank 1 is not there: the others tell so, and do not try twice."""
    from locft_easyedit.__main__ import main

    os.environ["WORLD_SIZE"] = "2"
    meeting._MEETING_TIME = timedelta(seconds=2)
    return main(["edit", "--config-name", "smollm2-135m", "data=none.json"])


@pytest.mark.processes
def test_a_command_says_that_the_others_did_not_come():
    [only] = launch(1, "distributed.test_world:not_started", check=False)
    assert only.returncode == 2
    assert only.stderr.count("do not find each other") == 1


@pytest.fixture
def set_up(monkeypatch):
    """Has a launched process set up its world; returns what it gave to torch.distributed."""
    given = []

    def world_of(n_gpus, **environment):
        launcher = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        for key, value in (launcher | environment).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(world_module, "_world", None)
        monkeypatch.setattr(world_module, "launcher_store", lambda rank, size: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", given.append)
        for name in ("init_process_group", "new_group"):
            monkeypatch.setattr(dist, name, lambda *args, **more: given.append((args, more)))
        get_world()
        return given

    return world_of


def test_a_gpu_is_named_before_anything_is_exchanged(set_up):
    """NCCL then connects at once, and cannot take another one's GPU for this process's."""
    gpu = torch.device("cuda", 2)  # of four, which two processes share
    chosen, (backend, group), _ = set_up(4)
    assert chosen == gpu
    assert (backend, group["device_id"]) == (("nccl",), gpu)


def test_without_gpus_none_is_named(set_up):
    (backend, group), _ = set_up(0)
    assert (backend, group["device_id"]) == (("gloo",), None)


@pytest.mark.parametrize(
    ("given", "time_out"),
    [("", timedelta(days=7)), ("90", timedelta(hours=1.5)), (" 0.5 ", timedelta(seconds=30))],
)
def test_how_long_to_wait_is_up_to_the_user(given, time_out, set_up):
    (_, group), (_, hosts) = set_up(0, LOCFT_TIMEOUT_MINUTES=given)
    assert group["timeout"] == hosts["timeout"] == time_out


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan", "inf", "1e300"])
def test_what_is_no_time_is_refused_before_anything_is_set_up(given, set_up):
    with pytest.raises(HyperParamsError, match=f"LOCFT_TIMEOUT_MINUTES='{given}': no number of"):
        set_up(0, LOCFT_TIMEOUT_MINUTES=given)


def never_comes():
    """Rank 1 hangs; rank 0 waits no longer than it was told to."""
    world = get_world()
    world.all_gather("here")
    if world.rank == 1:
        time.sleep(6)
        os._exit(0)
    start = time.monotonic()
    try:
        world.all_max([1])
    except LostRankError as error:
        return time.monotonic() - start, str(error)


@pytest.mark.processes
def test_a_rank_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setenv("LOCFT_TIMEOUT_MINUTES", "0.04")
    waited, told = launch(2, "distributed.test_world:never_comes", check=False)[0].value
    assert 2 < waited < 5
    assert told.startswith("Rank 0 of 2 has lost the other ranks in all_reduce")


def test_memory_that_runs_out_in_an_exchange_is_no_lost_rank(monkeypatch):
    def full(*args, **kwargs):
        raise dist.DistBackendError("NCCL error: Cuda failure 2 'out of memory'")

    monkeypatch.setattr(dist, "all_reduce", full)
    with pytest.raises(dist.DistBackendError, match="out of memory"):
        World(0, 2).sum_([torch.zeros(3)])


def test_processes_that_do_not_come_together(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(meeting, "_MEETING_TIME", timedelta(seconds=1))
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("locft_easyedit.distributed.world._world", None)
    with pytest.raises(RankError, match="The 2 processes of the launcher do not find each other"):
        get_world()
