"""How the processes of a launcher meet, and how long one waits for the others."""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import HyperParamsError, RankError

TIMEOUT = "LOCFT_TIMEOUT_MINUTES"
# One process may work for hours while the others wait: choose a place, say, or run a study.
_COLLECTIVE_TIME = timedelta(days=7)
_MEETING_TIME = timedelta(minutes=30)  # for a machine that is slow to start
_POLL_SECONDS = 0.05


def collective_time() -> timedelta:
    """Returns how long a rank waits for the others before that is an error.

    Raises:
        HyperParamsError: `LOCFT_TIMEOUT_MINUTES` is no time.
    """
    given = os.environ.get(TIMEOUT, "").strip()
    if not given:
        return _COLLECTIVE_TIME
    try:
        minutes = float(given)
        if minutes > 0:
            return timedelta(minutes=minutes)
    except (ValueError, OverflowError):
        pass
    raise HyperParamsError(
        f"{TIMEOUT}={given!r}: no number of minutes above 0. Give more than the longest that one "
        "process works while the others wait, or unset it: a week, then."
    )


def launcher_store(rank: int, size: int) -> dist.Store:
    """Returns the launcher's key-value store, at MASTER_ADDR and MASTER_PORT.

    An agent of torchrun keeps one store for all its restarts (torch 2.13), with the addresses of
    processes that have died; and agents of several machines do not count restarts alike. So the
    processes of this start agree on a prefix that none of an earlier start knows: rank 0 draws it,
    and answers every process with the number that this one has just drawn.

    Raises:
        RankError: Not all processes come.
        RuntimeError: The store cannot be reached.
    """
    store, _, _ = next(rendezvous("env://", timeout=_MEETING_TIME))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    drawn, deadline = uuid.uuid4().hex, time.monotonic() + _MEETING_TIME.total_seconds()
    store.set(f"locft/drawn/{rank}", drawn)
    while time.monotonic() < deadline:
        if rank == 0:
            others = [_value(store, f"locft/drawn/{other}") for other in range(1, size)]
            store.set("locft/answer", json.dumps([drawn, others]))
            if all(_value(store, f"locft/heard/{r}") == drawn for r in range(1, size)):
                return dist.PrefixStore(f"locft/{drawn}", store)
        else:
            prefix, answered = json.loads(_value(store, "locft/answer") or '["", []]')
            if drawn in answered:
                store.set(f"locft/heard/{rank}", prefix)
                return dist.PrefixStore(f"locft/{prefix}", store)
        time.sleep(_POLL_SECONDS)
    raise RankError(f"Not all of the {size} processes of the launcher have come together.")


def _value(store: dist.Store, key: str) -> str:
    """Returns a value of a store, empty if there is none yet."""
    return store.get(key).decode() if store.check([key]) else ""
