"""The change removed along what enters the matrices where facts are taken out, in closed form.

Let D be the change of a matrix so far. What lies below it is frozen, so that the inputs x at the
tokens of a text are constants, and where D x = 0 at all of them the model is the base there. Where
facts are to be kept, D x is to stay. Of all E = A S the one that makes

    w sum over what goes of |(D + E) x|^2  +  sum over what stays of |E x|^2  +  r |A|^2

least is a ridge regression, with second moments K (of what stays) and G (of what goes):

    A = -w D G S^T (S (K + w G) S^T + r I)^-1.

S is the filter of a confined change, or the identity: what is preserved is preserved here as well.
Outputs that a filter damps stay so, and the rank does not grow, since A has D on the left. MEMIT
(arXiv 2210.07229) brings facts in by a least squares of the kind; taking out needs no values to be
found first, because those of the base are known. One pass to the matrices, over all texts, takes
the place of a training.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from ..errors import NonFiniteLossError
from ..modeling.places import is_linear_weight, owner
from ..utils.memory import on_cpu_if_full
from .runner import LedgerRunner
from .states import Matrices
from .trainer import Trainer

# Of what goes, how much may not be back for the rest to be trained from there. Where more is not,
# as with many facts in few inputs, training from before takes as long, and keeps more of the rest.
MOST_LEFT = 0.75
# These were chosen on the first 100 records of ZsRE, of which ten were taken out.
_SCORED = 5.0  # what a token counts whose output is an answer's; others count 1
_GONE = 1.0  # w
_RIDGE = 0.03  # r, in units of what a direction carries in the mean


def moments(
    trainer: Trainer, runner: LedgerRunner, texts: np.ndarray
) -> dict[str, torch.Tensor] | None:
    """Returns the sum of x x^T over what enters each matrix, [in, in], by the parameter's name.

    `None` where not all that is trained are matrices of linear layers that see every token, or a
    sum is not finite.

    Args:
        trainer: Whose matrices they are.
        runner: What runs the texts.
        texts: The texts, [B].
    """
    model, parameters = trainer.model, trainer.place.parameters
    if not all(is_linear_weight(model, name) for name in parameters):
        return None
    modules = {name: owner(model, name) for name in parameters}
    found = runner.input_moments(texts, modules, _SCORED, trainer.hparams.eval_batch_size)
    finite = found is not None and all(x.isfinite().all() for x in found.values())
    return found if finite else None


def remove_(
    trainer: Trainer,
    base: Matrices,
    goes: Mapping[str, torch.Tensor],
    stays: Mapping[str, torch.Tensor],
) -> None:
    """Removes the change of the trainer's matrices along what goes, in place.

    Args:
        trainer: Whose matrices they are.
        base: The base model's.
        goes: The `moments` of what goes, in the base model, finite.
        stays: Those of what is to stay as it is, finite.

    Raises:
        NonFiniteLossError: A sum overflows the matrices' precision; restoring is up to the caller.
    """
    filters = {} if trainer.filters is None else trainer.filters.of
    for name, parameter in trainer.place.parameters.items():
        transposed = isinstance(owner(trainer.model, name), Conv1D)
        now, then = (
            (m.T if transposed else m).detach().float()
            for m in (parameter, base[name].to(parameter.device))
        )
        new = now + least_squares(now - then, stays[name], goes[name], filters.get(name)).to(now)
        with torch.no_grad():
            parameter.copy_(new.T if transposed else new)
        if not torch.isfinite(parameter).all():
            raise NonFiniteLossError(
                f"`{name}` without the facts overflows {parameter.dtype}. The model is as it was "
                "before. Retract with `exact=true`."
            )
    # The same sums in all processes; unlike GPUs may have rounded them differently.
    trainer.world.broadcast_(trainer.place.parameters.values())


def least_squares(
    change: torch.Tensor,
    stays: torch.Tensor,
    goes: torch.Tensor,
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns E, [out, in] float64, which takes a change to zero where it is to go.

    Args:
        change: D, [out, in].
        stays: K, [in, in].
        goes: G, [in, in].
        s: S, [in, in]; `None` for the identity.
    """
    return on_cpu_if_full(_solved, change, stays, goes, s, what="to take facts out of a matrix")


def _solved(
    change: torch.Tensor, stays: torch.Tensor, goes: torch.Tensor, s: torch.Tensor | None
) -> torch.Tensor:
    device = torch.device("cpu") if change.device.type == "mps" else change.device
    d, k, g = (part.to(device, torch.float64) for part in (change, stays, goes))
    wanted, all_ = -_GONE * d @ g, k + _GONE * g  # [out, in], [in, in]
    if s is not None:
        s = s.to(device, torch.float64)
        wanted, all_ = wanted @ s.T, s @ all_ @ s.T
    ridge = _RIDGE * all_.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    all_.diagonal().add_(ridge)
    a = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(all_)).T
    return a if s is None else a @ s
