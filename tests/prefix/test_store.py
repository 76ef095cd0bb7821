"""The store of states against a plain tensor, whatever lies where."""

import os
import tempfile
import textwrap
import time

import pytest
import torch
from helpers.rank_pool import run_python, start_python

from locft_easyedit.errors import MemoryBudgetError, OutputError
from locft_easyedit.prefix import store as store_module
from locft_easyedit.prefix.state_file import StateFile
from locft_easyedit.prefix.store import Budget, StateStore

CPU = torch.device("cpu")
T, W = 41, 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gib(n_rows, dtype=torch.float32, width=W):
    return n_rows * width * dtype.itemsize / 2**30


def split(n_host, folder=None, dtype=torch.float32):
    """Returns a budget for `n_host` rows in memory and the rest on disk."""
    return Budget(host_gib=gib(n_host, dtype), disk_gib=1, folder=folder and str(folder))


def plain(dtype=torch.float32, n_tokens=T, width=W):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n_tokens, width, generator=generator).to(dtype)


def filled(budget, dtype=torch.float32, **where):
    """Returns a store that was filled in random pieces, each token once."""
    states = plain(dtype)
    store = StateStore(T, W, dtype, CPU, budget, **where)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    for piece in order.split([1, 7, 12, 2, T - 22]):
        store.put(piece, states[piece])
    return store, states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_host", [0, 1, 17, T - 1, T, 10 * T])
def test_what_was_put_in_comes_out(n_host, dtype, tmp_path):
    store, states = filled(split(n_host, tmp_path, dtype), dtype)
    assert (store.file is None) == (n_host >= T)
    assert (store.file is None) or store.file.n_tokens == T - n_host
    generator = torch.Generator().manual_seed(2)
    for shape in ((T,), (3, 5), (2, 3, 4), (1,), (0,), ()):
        where = torch.randint(0, T, shape, generator=generator)  # with repeats
        found = store.get(where)
        assert found.dtype == dtype
        assert torch.equal(found, states[where])
    store.close()


def test_a_second_put_replaces_the_first(tmp_path):
    store, states = filled(split(20, tmp_path))
    where = torch.tensor([40, 3, 4, 5, 19, 20, 22, 23, 39])  # gaps, both tiers, not in order
    store.put(where, -states[where])
    expected = states.clone()
    expected[where] *= -1
    assert torch.equal(store.get(torch.arange(T)), expected)
    store.close()


@pytest.mark.parametrize("n_host", [0, 17])
def test_pieces_that_are_no_plain_block_of_memory(n_host, tmp_path):
    states = plain()
    store = StateStore(T, W, torch.float32, CPU, split(n_host, tmp_path))
    store.put(torch.arange(0, T, 2), states[::2])  # every second row
    wide = torch.empty(T, 2 * W)
    wide[:, ::2] = states
    store.put(torch.arange(T)[1::2], wide[1::2, ::2])
    assert torch.equal(store.get(torch.arange(T)), states)
    store.close()


def test_what_is_got_does_not_change_with_the_store(tmp_path):
    store, states = filled(split(17, tmp_path))
    found = store.get(torch.arange(T))
    store.put(torch.arange(T), torch.zeros(T, W))
    store.close()
    assert torch.equal(found, states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_host", [0, 17, T])
def test_a_kept_file_holds_everything(n_host, dtype, tmp_path):
    path = tmp_path / "kept"
    store, states = filled(split(n_host, dtype=dtype), dtype, path=path)
    assert torch.equal(store.get(torch.arange(T)), states)
    assert torch.equal(store.file.get(torch.arange(T)), states)
    store.file.seal("same")
    store.close()
    file, _ = StateFile.open_whole(path, "same", T, W, dtype)
    again = StateStore(T, W, dtype, CPU, split(n_host, dtype=dtype), file=file)
    again.fill_from_file_()
    assert torch.equal(again.get(torch.arange(T)), states)
    again.close()
    assert path.is_file()


def test_the_file_fills_the_other_tiers(tmp_path, monkeypatch):
    store, states = filled(split(0), path=tmp_path / "kept")
    store.file.seal("same")
    store.close()
    file, _ = StateFile.open_whole(tmp_path / "kept", "same", T, W, torch.float32)
    again = StateStore(T, W, torch.float32, CPU, split(30), file=file)
    again.fill_from_file_()
    monkeypatch.setattr(StateFile, "get", None)  # memory is enough for the first 30
    assert torch.equal(again.get(torch.arange(30)), states[:30])


# Budgets


def test_stores_share_a_budget_and_give_it_back(tmp_path):
    budget = split(50, tmp_path)
    row = W * 4
    first, _ = filled(budget)
    assert budget.taken == [0, T * row, 0]
    second, states = filled(budget)
    assert budget.taken == [0, 50 * row, (2 * T - 50) * row]
    assert torch.equal(second.get(torch.arange(T)), states)
    first.close()
    first.close()  # gives nothing back twice
    assert budget.taken == [0, 9 * row, (2 * T - 50) * row]
    third, _ = filled(budget)
    assert third.file is None
    second.close()
    third.close()
    assert budget.taken == [0, 0, 0]


def test_disk_is_shared_as_well(tmp_path):
    budget = Budget(host_gib=0.0, disk_gib=gib(T + 5), folder=str(tmp_path))
    first, _ = filled(budget)
    with pytest.raises(MemoryBudgetError, match="the budgets allow"):
        filled(budget)
    first.close()
    second, _ = filled(budget)
    second.close()


@pytest.mark.parametrize("kept", [False, True])
def test_the_error_names_the_budgets_and_nothing_is_written(kept, tmp_path):
    one_gib = 2**30 // (W * 4)
    budget = Budget(host_gib=0.5, disk_gib=0.25, folder=str(tmp_path / "new"))
    path = tmp_path / "new" / "kept" if kept else None
    message = (
        r"prefix of \d+ tokens takes 1 GiB; the budgets allow 0 GiB on the GPU, "
        r"0\.5 GiB of host memory and 0\.25 GiB on disk\. Raise `prefix_gpu_gib`, "
        r"`prefix_host_gib` or `prefix_disk_gib`, point `prefix_dir` at a larger disk, or set "
        r"`frozen_prefix: false`"
    )
    with pytest.raises(MemoryBudgetError, match=message):
        StateStore(one_gib, W, torch.float32, CPU, budget, path=path)
    assert budget.taken == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_sealed_file_stays_when_the_budget_is_too_small(tmp_path):
    """What an earlier run has left is not destroyed for a run that cannot even begin."""
    store, _ = filled(split(0), path=tmp_path / "kept")
    store.file.seal("same")
    store.close()
    with pytest.raises(MemoryBudgetError, match="on disk"):
        StateStore(T, W, torch.float32, CPU, Budget(disk_gib=0.0), path=tmp_path / "kept")
    assert StateFile.open_whole(tmp_path / "kept", "same", T, W, torch.float32)[0] is not None


def test_a_file_that_is_there_needs_no_more_disk(tmp_path):
    """A disk that an earlier run has filled with it is not too small to use it."""
    store, states = filled(split(0), path=tmp_path / "kept")
    store.file.seal("same")
    store.close()
    file, _ = StateFile.open_whole(tmp_path / "kept", "same", T, W, torch.float32)
    again = StateStore(T, W, torch.float32, CPU, Budget(host_gib=0.0, disk_gib=0.0), file=file)
    assert torch.equal(again.get(torch.arange(T)), states)


def test_a_disk_that_is_full_takes_no_budget(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    budget = split(10, tmp_path)
    with pytest.raises(OutputError, match="No space left"):
        StateStore(T, W, torch.float32, CPU, budget)
    assert budget.taken == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_budgets_that_are_open_take_a_share_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "free_host_memory", lambda: 1000.0)
    usage = type("Usage", (), {"free": 2000})
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda folder: usage)
    assert Budget(folder=str(tmp_path / "not" / "yet")).rows(10, CPU) == (0, 50, 180)
    # What is asked for beyond the free disk cannot be had.
    assert Budget(host_gib=0.0, disk_gib=1.0).rows(10, CPU) == (0, 0, 180)
    assert Budget(gpu_gib=1.0, host_gib=0.0, disk_gib=0.0).rows(10, CPU) == (0, 0, 0)
    monkeypatch.setattr(store_module, "free_memory", lambda device: 400)
    gpu = torch.device("cuda", 0)
    assert Budget(folder=str(tmp_path)).rows(10, gpu) == (10, 50, 180)
    assert Budget(gpu_gib=0.0, folder=str(tmp_path)).rows(10, gpu) == (0, 50, 180)


TAKEN_AT_ONCE = """
import psutil, torch
from locft_easyedit.prefix.store import Budget, StateStore
resident = lambda: psutil.Process().memory_info().rss
before = resident()
store = StateStore(2**20, 32, torch.float32, torch.device("cpu"), Budget(host_gib=1.0))
assert resident() - before > 0.9 * 2**20 * 32 * 4, resident() - before
"""


def test_memory_of_a_store_counts_as_taken_at_once():
    """Memory that is only promised is still free: a second store would take a share of it.

    In a process of its own: an old one may have freed memory at hand that counts already.
    """
    done = run_python(["-c", TAKEN_AT_ONCE])
    assert done.returncode == 0, done.stderr


def test_where_tells_what_lies_where(tmp_path):
    n = 3 * 2**26 // (W * 4)
    budget = Budget(host_gib=0.0625, disk_gib=1.0, folder=str(tmp_path))
    store = StateStore(n, W, torch.float32, CPU, budget)
    assert store.where() == "0.06 GiB host memory, 0.13 GiB disk"
    store.close()


# Temporary files


def test_a_temporary_file_leaves_nothing_behind(tmp_path):
    store, _ = filled(split(5, tmp_path))
    if os.name == "posix":
        assert list(tmp_path.iterdir()) == []  # not even now
    store.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and nameless files")
@pytest.mark.parametrize("moment", ["written", "being made"])
def test_a_killed_process_leaves_nothing_behind(moment, tmp_path):
    script = f"""
        import time, torch
        from locft_easyedit.prefix import state_file as statefile
        from locft_easyedit.prefix.store import Budget, StateStore

        def ready(*args):
            print("ready", flush=True)
            time.sleep(600)

        if {moment == "being made"}:
            statefile._reserve = ready
        budget = Budget(host_gib=0.0, disk_gib=1.0, folder={str(tmp_path)!r})
        store = StateStore(100, 8, torch.float32, torch.device("cpu"), budget)
        store.put(torch.arange(100), torch.ones(100, 8))
        ready()
    """
    with tempfile.TemporaryFile("w+") as said:
        process = start_python(["-c", textwrap.dedent(script)], stdout=said, stderr=said)
        while process.poll() is None and os.fstat(said.fileno()).st_size == 0:
            time.sleep(0.02)
        process.kill()
        said.seek(0)
        assert said.read() == "ready\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_tiers_on_a_gpu(dtype, kept, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device, states = torch.device("cuda"), plain(dtype)
    for n_gpu, n_host in ((11, 13), (0, 13), (11, 0), (T, 0), (0, T), (0, 0)):
        budget = Budget(gib(n_gpu, dtype), gib(n_host, dtype), 1.0, str(tmp_path))
        path = tmp_path / "kept" if kept else None
        store = StateStore(T, W, dtype, device, budget, path=path)
        row, n_disk = W * dtype.itemsize, T if kept else T - n_gpu - n_host
        assert budget.taken == [n_gpu * row, n_host * row, n_disk * row]
        for piece in torch.randperm(T).split(9):
            store.put(piece, states[piece].to(device))
        for where in (torch.arange(T), torch.randint(0, T, (3, 7)), torch.arange(T - 1, T)):
            found = store.get(where)
            assert found.device.type == "cuda"
            assert torch.equal(found.cpu(), states[where])
        if kept:
            assert torch.equal(store.file.get(torch.arange(T)), states)
        store.close()
        assert budget.taken == [0, 0, 0]
