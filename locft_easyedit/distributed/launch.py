"""Whether a launcher has started this process, as the environment tells it."""

from __future__ import annotations

import os

# What launchers tell the processes that they start.
LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)


def is_launched() -> bool:
    """Returns whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def single_process_environment() -> dict[str, str]:
    """Returns an environment for a process that works by itself, also where this one is a rank."""
    return {key: value for key, value in os.environ.items() if key not in LAUNCHED}
