"""The change removed along what enters the matrices where facts are taken out, in closed form.

Let D be the change of a matrix so far. What lies below it is frozen, so that the inputs x at the
tokens of a text are constants, and where D x = 0 at all of them the model is the base there. Where
facts are to be kept, D x is to stay. Of all E = A S the one that makes

    w sum over what goes of |(D + E) x|^2  +  sum over what stays of |E x|^2  +  r |A|^2

least is a ridge regression, with second moments K (of what stays) and G (of what goes):

    A = -w D G S^T (S (K + w G) S^T + r I)^-1.

S is the filter of a confined change, or the identity: what is preserved is preserved here as well.
Outputs that a filter damps stay so, since A has D on the left. MEMIT (arXiv 2210.07229) brings
facts in by a least squares of the kind; taking out needs no values to be found first, because those
of the base are known. One pass to the matrices, over all texts, takes the place of a training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import NonFiniteLossError
from ..utils.memory import is_out_of_memory
from .states import Matrices

logger = logging.getLogger(__name__)

# All of these were chosen on the first 100 records of ZsRE, ten of which were taken out.
SCORED = 5.0  # what a token counts whose output is an answer's; others count 1
_GONE = 1.0  # w
_RIDGE = 0.03  # r, in units of what a direction carries in the mean


def remove_(
    parameters: Mapping[str, torch.Tensor],
    base: Matrices,
    stays: Mapping[str, torch.Tensor],
    goes: Mapping[str, torch.Tensor],
    filters: Mapping[str, torch.Tensor],
    modules: Mapping[str, nn.Module],
) -> None:
    """Removes the change of matrices along what goes, in place.

    Args:
        parameters: The matrices, by name.
        base: The base model's.
        stays: The sum of x x^T over the inputs of each where it is to stay, [in, in].
        goes: The same where it is to go.
        filters: S of each, [in, in]; nothing for the identity.
        modules: The linear layer of each.

    Raises:
        NonFiniteLossError: A sum overflows the matrices' precision; restoring is up to the caller.
    """
    for name, parameter in parameters.items():
        transposed = isinstance(modules[name], Conv1D)
        now, then = (
            (m.T if transposed else m).detach().float()
            for m in (parameter, base[name].to(parameter.device))
        )
        d, k, g, s = now - then, stays[name], goes[name], filters.get(name)
        try:
            change = _change(d, k, g, s)
        except Exception as error:
            if parameter.device.type == "cpu" or not is_out_of_memory(error):
                raise
            logger.warning("A GPU has no room to take facts out of `%s`; the CPU does it.", name)
            torch.cuda.empty_cache()
            change = _change(d.cpu(), k.cpu(), g.cpu(), None if s is None else s.cpu())
        new = now + change.to(now)
        with torch.no_grad():
            parameter.copy_(new.T if transposed else new)
        if not torch.isfinite(parameter).all():
            raise NonFiniteLossError(
                f"`{name}` without the facts overflows {parameter.dtype}. The model is as it was "
                "before. Retract with `exact=true`."
            )


def _change(
    change: torch.Tensor, stays: torch.Tensor, goes: torch.Tensor, s: torch.Tensor | None
) -> torch.Tensor:
    """Returns E, [out, in] float64."""
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
