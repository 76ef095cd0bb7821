"""Adam's second moments, which a ledger's trainings hand on from one to the next.

A new Adam takes its first steps at full rate in every direction, whatever the gradients are: with
many commits that is what moves a model most. The second moments of the trainings before tell where
gradients are large; the first moments, which tell of facts that are learned by now, begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .states import STEP, Matrices


def begin_with_(
    optimizer: torch.optim.Adam, masters: Mapping[str, torch.Tensor], moments: Matrices
) -> None:
    """Gives an optimizer that has taken no step the second moments of another.

    Args:
        optimizer: The optimizer.
        masters: What it updates, by name.
        moments: What `moments_of` gave for the same names.
    """
    for name, master in masters.items():
        optimizer.state[master] = {
            "step": moments[STEP].to(master.device, copy=True),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": moments[name].to(master.device, copy=True),
        }


def moments_of(optimizer: torch.optim.Adam, masters: Mapping[str, torch.Tensor]) -> Matrices | None:
    """Returns an optimizer's second moments by name, and under `STEP` the steps behind them.

    `None` if it has taken no step.

    Args:
        optimizer: The optimizer, which is not used any more.
        masters: What it updates, by name.
    """
    if not all(optimizer.state.get(master) for master in masters.values()):
        return None
    states = {name: optimizer.state[master] for name, master in masters.items()}
    steps = max(state["step"] for state in states.values())
    return {STEP: steps, **{name: state["exp_avg_sq"] for name, state in states.items()}}
