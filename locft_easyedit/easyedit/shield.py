"""Keeps what EasyEdit's import changes outside itself from reaching the user's program."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

# The current source sets it to "1" at import, which makes every CUDA kernel wait for the last.
_LAUNCH_BLOCKING = "CUDA_LAUNCH_BLOCKING"


@contextmanager
def shielded() -> Iterator[None]:
    """Puts back random states, root logger and `CUDA_LAUNCH_BLOCKING` as they were before.

    The random states are those of Python, NumPy and torch, on the CPU and on CUDA, also where
    CUDA is not initialised yet.
    """
    import numpy as np
    import torch

    python_state, numpy_state, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
    )
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    # Before CUDA is initialised, `torch.manual_seed` leaves a seed to be set when it is.
    cuda_seeds = getattr(torch.cuda, "_lazy_seed_tracker", None)
    queued = dict(vars(cuda_seeds)) if cuda_seeds is not None else {}
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    blocking = os.environ.get(_LAUNCH_BLOCKING)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if cuda_seeds is not None:
            vars(cuda_seeds).update(queued)
        root.handlers[:] = handlers
        root.setLevel(level)
        if blocking is None:
            os.environ.pop(_LAUNCH_BLOCKING, None)
        else:
            os.environ[_LAUNCH_BLOCKING] = blocking
