"""How the processes that a launcher has started find each other, also when it starts them again.

An agent of torchrun keeps one key-value store for all its restarts (torch 2.13): what the dead
processes have written is still there, their addresses too, and would be read by the new ones.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from .errors import RankError

_POLL_SECONDS = 0.05
_PATIENCE = timedelta(minutes=30)  # for a machine that is slow to start


def fresh_store(rank: int, size: int) -> dist.Store:
    """Returns a store that the processes of this start have to themselves.

    Args:
        rank: This process.
        size: Number of processes.

    Raises:
        RankError: They do not come.
        RuntimeError: The store cannot be reached.
    """
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not kept,
        timeout=_PATIENCE,
        multi_tenant=True,
    )
    token = _agreed_token(store, rank, size) if kept else "0"
    return dist.PrefixStore(f"locft/{token}", store)


def _agreed_token(store: dist.Store, rank: int, size: int) -> str:
    """Returns a name that all processes of this start, and none of an earlier one, know.

    Rank 0 makes it, and answers every process with the number that this one has just drawn: only a
    rank 0 that is alive can. It goes on when all have its name.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + _PATIENCE.total_seconds()
    store.set(f"locft/drawn/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0:
            drawn = {r: _get(store, f"locft/drawn/{r}") for r in range(1, size)}
            store.set("locft/answer", json.dumps([own, list(drawn.values())]))
            if all(_get(store, f"locft/heard/{r}") == own for r in drawn):
                return own
        else:
            token, answered = json.loads(_get(store, "locft/answer") or '["", []]')
            if own in answered:
                store.set(f"locft/heard/{rank}", token)
                return str(token)
        time.sleep(_POLL_SECONDS)
    raise RankError(f"Not all of the {size} processes of the launcher have come together.")


def _get(store: dist.Store, key: str) -> str:
    """Returns a value, empty if there is none yet."""
    return store.get(key).decode() if store.check([key]) else ""
