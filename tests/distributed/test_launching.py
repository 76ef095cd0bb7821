"""What starts several processes for tests: their values, their failures, and no end of time."""

import os
import time

import pytest
from helpers.launching import launch

from locft_easyedit.distributed.world import get_world

pytestmark = pytest.mark.processes
ACCELERATE = pytest.param("accelerate", marks=pytest.mark.slow)


def ranks_tell_each_other(base):
    world = get_world()
    found = world.all_gather(base + world.rank)
    world.close()
    return [world.rank, world.size, world.local_rank, world.local_size, found]


def one_fails():
    if os.environ["RANK"] == "1":
        raise ValueError("on purpose")


def one_waits():
    if os.environ["RANK"] == "0":
        time.sleep(600)


@pytest.mark.parametrize("through", [None, "torchrun", ACCELERATE])
def test_values_come_back_by_rank(through):
    ranks = launch(2, "distributed.test_launching:ranks_tell_each_other", 10, through=through)
    assert [rank.value for rank in ranks] == [
        [0, 2, 0, 2, [10, 11]],
        [1, 2, 1, 2, [10, 11]],
    ]


def test_a_failure_is_one():
    with pytest.raises(AssertionError, match=r"ranks \[1\] failed[\s\S]*on purpose"):
        launch(2, "distributed.test_launching:one_fails")
    failed = launch(2, "distributed.test_launching:one_fails", check=False)
    assert [rank.returncode for rank in failed] == [0, 1]


def test_time_is_up():
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"not done after 5 s"):
        launch(2, "distributed.test_launching:one_waits", timeout=5)
    assert time.monotonic() - began < 30


def test_a_command():
    script = "import os; print(os.environ['RANK'])"
    assert [rank.stdout.strip() for rank in launch(3, ["-c", script])] == ["0", "1", "2"]
