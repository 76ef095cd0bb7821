"""What counts as memory that ran out, and what counts as free."""

import pytest
import torch
from helpers.two_devices import two_devices

from locft_easyedit.utils.memory import free_memory, is_out_of_memory

GIB = 2**30


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("no room"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously ..."),
        torch.distributed.DistBackendError(
            "NCCL error in: NCCLUtils.hpp:268, unhandled cuda error\nncclUnhandledCudaError: Call "
            "to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 9 bytes."),
    ],
    ids=lambda error: str(error)[:40],
)  # fmt: skip
def test_memory_has_run_out(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        torch.distributed.DistBackendError("Connection closed by peer"),
        OSError("out of memory"),  # a disk that says so is none
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_none(error):
    assert not is_out_of_memory(error)


def test_what_pytorch_holds_without_using_it_is_free(monkeypatch):
    with two_devices() as pretended:
        pretended.free = [3 * GIB, 5 * GIB]
        held = {0: (7 * GIB, 6 * GIB), 1: (2 * GIB, 0)}
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[device.index][0])
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[device.index][1])
        found = [free_memory(torch.device("cuda", gpu)) for gpu in (0, 1)]
    assert found == [4 * GIB, 7 * GIB]
    assert free_memory(torch.device("cpu")) > 0
