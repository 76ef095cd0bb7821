"""What the check of a GPU measures with: events, kernels by kind, waits, matrix products."""

import re
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that a kernel's name has. On a CPU the names are those of PyTorch's operators.
KINDS = {
    "products": r"gemm|nvjet|cutlass|xmma|cublas|aten::(add)?mm|aten::bmm",
    "attention": r"fmha|flash|attention",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy|cat",
    "indexing": r"index|gather|scatter|embedding",
    "sums": r"reduce|norm|softmax|sum|mean|amax",
    "elementwise": r"elementwise|vectorized|triton|aten::(mul|add|sub|div|silu|exp|neg|log|pow)",
}


def event_ms(action, device, repeats, warm=2):
    """The median milliseconds that an action takes on a device."""
    for _ in range(warm if device.type == "cuda" else 0):
        action()
    marks = Marks(device)
    marks.add()
    for _ in range(repeats):
        action()
        marks.add()
    return statistics.median(marks.gaps())


class Marks:
    """Moments on a GPU's own clock; on a CPU those of the host. The host does not wait for them."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self._marks, self._reserved = [], []

    def __len__(self):
        return len(self._marks)

    def add(self):
        if not self.on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
        self._reserved.append(torch.cuda.memory_reserved() / 2**30)

    def gaps(self):
        """Milliseconds from each mark to the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self.on_gpu:
            return [1e3 * (end - start) for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def figures(self, an_epoch):
        """Figures of marks of which there are so many an epoch."""
        gaps = self.gaps()
        within = [gap for i, gap in enumerate(gaps, start=1) if i % an_epoch]
        between = [gap for i, gap in enumerate(gaps, start=1) if not i % an_epoch]
        found = {"ms a step over an epoch's end": statistics.median(between or [0.0])}
        if within:
            found["ms a step within epochs"] = statistics.median(within)
            found["ms a step, slowest of ten"] = sorted(within)[9 * len(within) // 10]
        if self.on_gpu:
            # More from epoch to epoch is memory that nothing uses again.
            found["reserved GiB after each epoch"] = self._reserved[an_epoch - 1 :: an_epoch]
        return found


def by_kind(step, device, repeats):
    """Milliseconds a step by kind of kernel, kernels, and how much of the time any of them runs."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiled:
        for _ in range(repeats):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiled.events()
        # Of operators that call others the others count; a range with a name is no kernel.
        if event.device_type == wanted
        and not event.cpu_children
        and not getattr(event, "is_user_annotation", False)
    )
    kinds, counts, busy, until = Counter(), Counter(), 0.0, 0.0
    for start, end, name in events:
        matching = (kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE))
        kind = next(matching, "other")
        kinds[kind] += (end - start) / 1e3 / repeats
        counts[name] += 1
        busy += max(0.0, end - max(start, until)) / 1e3 / repeats
        until = max(until, end)
    return {
        "ms by kind": dict(kinds.most_common()),
        "kernels": len(events) / repeats,
        "busy ms": busy,
        "first to last ms": (until - events[0][0]) / 1e3 / repeats,
        "most frequent": {name[:60]: n / repeats for name, n in counts.most_common(5)},
    }


def waits(step, device):
    """Where in the code the host waits for the GPU in a step, and how often."""
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(
        Counter(
            f"{Path(one.filename).name}:{one.lineno}"
            for one in seen
            if "synchroniz" in str(one.message)
        )
    )


def matmul_figures(sizes, tokens, scored, device):
    """TFLOP/s of the products of a step, alone and joined, and TB/s of a copy.

    Args:
        sizes: The model's.
        tokens: How many there may be in a step, with what rows are filled up with.
        scored: Tokens with logits.
        device: Where.
    """
    repeats = 20 if device.type == "cuda" else 1
    source = torch.randn(2**28 if device.type == "cuda" else 2**16, device=device)
    target = torch.empty_like(source)
    ms = event_ms(lambda: target.copy_(source), device, repeats)
    found = {"copy, TB/s": 2 * source.numel() * source.element_size() / ms / 1e9}
    hidden, inner = sizes.hidden, sizes.inner
    joined = hidden * (sizes.heads + 2 * sizes.kv_heads) // sizes.heads
    shapes = {
        "q or o": (hidden, hidden), "q, k, v joined": (hidden, joined),
        "gate or up": (hidden, inner), "gate, up joined": (hidden, 2 * inner),
        "down": (inner, hidden), "back through gate, up joined": (2 * inner, hidden),
        "gradient of down": None,
    }  # fmt: skip
    for n in tokens:
        for name, shape in shapes.items():
            # The gradient of a matrix is summed over the tokens.
            rows, shared, columns = (n, *shape) if shape else (hidden, n, inner)
            found[f"{name}, {n} tokens"] = rate(rows, shared, columns, device, repeats)
    for parts in (1, 2):
        rows = scored // parts
        found[f"logits in {parts}"] = rate(rows, hidden, sizes.vocabulary, device, repeats)
        found[f"back through the head in {parts}"] = rate(
            rows, sizes.vocabulary, hidden, device, repeats
        )
    return found


def rate(rows, shared, columns, device, repeats):
    """TFLOP/s of [rows, shared] times [shared, columns] in bfloat16."""
    a = torch.randn(rows, shared, device=device).bfloat16()
    b = torch.randn(columns, shared, device=device).bfloat16()
    return 2 * rows * shared * columns / event_ms(lambda: a @ b.t(), device, repeats) / 1e9
