"""Memory: the peak of a part of a program, what is free, whether it ran out, and what then."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Peak:
    """What `peak_memory` measured; `None` where this system does not tell.

    Attributes:
        gib: The peak, in GiB.
        of: `GPU` or `process`.
    """

    gib: float | None = None
    of: str | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the peak within the context; the `Peak` is filled in on leaving it.

    On a GPU, what tensors took at most. Otherwise the process's resident memory: Linux counts it
    from the start of the context, other systems from that of the process.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    yield peak
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak.gib, peak.of = torch.cuda.max_memory_allocated(device) / 2**30, "GPU"
    else:
        kib = _resident_peak_kib()
        peak.gib, peak.of = (None, None) if kib is None else (kib / 2**20, "process")


def _resident_peak_kib() -> float | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value / 1024 if sys.platform == "darwin" else float(value)


# What libraries say where memory ran out, in errors without a type of their own.
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA itself (pinned memory as well), and NCCL, which repeats it
    "_ALLOC_FAILED",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_, ...
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no room for the workspace of its handle
    "can't allocate memory",  # PyTorch on the host
    "not enough memory",  # the same on Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, of a GPU or of the host.

    Only PyTorch's own allocator has a type for it. What cuBLAS and NCCL need beside it, and what
    the host's allocator refuses, comes as a plain `RuntimeError`.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY)


def on_cpu_if_full(compute: Callable[..., T], *tensors: torch.Tensor | None, what: str) -> T:
    """Returns what `compute` gives for tensors: on the CPU, where their GPU has no room for it.

    Args:
        compute: Called with the tensors.
        tensors: On one device; `None` stays.
        what: What is done, as the warning says it: "to decompose ...".
    """
    try:
        return compute(*tensors)
    except Exception as error:
        if tensors[0] is None or tensors[0].device.type == "cpu" or not is_out_of_memory(error):
            raise
    # Outside the handler: the exception's frames hold the tensors that have to go.
    logger.warning("The GPU has no room %s; the CPU does it, which takes longer.", what)
    torch.cuda.empty_cache()
    return compute(*(None if tensor is None else tensor.cpu() for tensor in tensors))


def free_memory(device: torch.device) -> int:
    """Returns the bytes that new tensors can take on a GPU, or on the host.

    What PyTorch holds of a GPU without using it is free as well: its next tensors lie there.
    """
    if device.type != "cuda":
        return int(free_host_memory())
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def free_host_memory() -> float:
    """Returns the host's memory that is available, in bytes.

    A container's limit counts: it ends a process that the host has room for.
    """
    available = float(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        return available if limit == "max" else min(available, max(0.0, int(limit) - used))
    except (OSError, ValueError):
        return available
