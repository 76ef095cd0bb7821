"""The change removed along what enters the matrices where facts are taken out, in closed form.

Let D be the change of a matrix so far. What lies below it is frozen, so that the inputs x at the
tokens of a text are constants, and where D x = 0 at all of them the model is the base there. Where
facts are to be kept, D x is to stay. Of all E = A S the one that makes

    sum over what goes of w |(D + E) x|^2  +  sum over what stays of w |E x|^2  +  r |A|^2

least is a ridge regression, with second moments, sums of w x x^T, K (of what stays) and G (of what
goes):

    A = -D G S^T (S (K + G) S^T + r I)^-1.

At first w is 1 for all texts. Where too few come right by it, w is raised for those that a check
does not find right, and the equation is solved again: penalties that rise until constraints hold,
an old method of optimization. What is then left is trained: rounds until nothing is left take fewer
texts, and more from how the facts that stay are known in other words.

S is the filter of a confined change, or the identity: what is preserved is preserved here as well.
Outputs that a filter damps stay so, and the rank does not grow, since A has D on the left. MEMIT
(arXiv 2210.07229) brings facts in by a least squares of the kind; taking out needs no values to be
found first, because those of the base are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

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
# These were chosen on the first 100 records of ZsRE, of which 10 or 20 were taken out.
_SCORED = 5.0  # what a token counts whose output is an answer's; others count 1
_RIDGE = 0.03  # r, in units of what a direction carries in the mean
_HARDER = 4.0  # by what w is raised for a text that is not right
_MOST_ROUNDS, _PATIENCE = 10, 2  # rounds, and those in a row that may bring nothing


def moments(
    trainer: Trainer, runner: LedgerRunner, texts: np.ndarray
) -> dict[str, torch.Tensor] | None:
    """Returns the sum of x x^T over what enters each matrix, [in, in], by the parameter's name.

    `None` where not all that is trained are matrices of linear layers that see every token.

    Args:
        trainer: Whose matrices they are.
        runner: What runs the texts.
        texts: The texts, [B].
    """
    model, parameters = trainer.model, trainer.place.parameters
    if not all(is_linear_weight(model, name) for name in parameters):
        return None
    modules = {name: owner(model, name) for name in parameters}
    return runner.input_moments(texts, modules, _SCORED, trainer.hparams.eval_batch_size)


def remove_(
    trainer: Trainer,
    base: Matrices,
    goes: Mapping[str, torch.Tensor],
    runner: LedgerRunner,
    going: np.ndarray,
    staying: np.ndarray,
    not_right: Callable[[], np.ndarray],
    enough: Callable[[np.ndarray], bool],
) -> np.ndarray | None:
    """Removes the change of the trainer's matrices along what goes, in place.

    Args:
        trainer: Whose matrices they are.
        base: The base model's.
        goes: The `moments` of what goes, in the base model; they are changed.
        runner: What runs the texts.
        going: The texts that go, [G].
        staying: Those that are to stay as they are, [K].
        not_right: Returns those that are not as they should be.
        enough: Whether these may be left.

    Returns:
        What is left; `None` where the change cannot be removed so, or not as far: restoring is up
        to the caller.

    Raises:
        NonFiniteLossError: A sum overflows the matrices' precision; restoring is up to the caller.
    """
    stays = moments(trainer, runner, staying)
    if stays is None or not all(x.isfinite().all() for x in (*stays.values(), *goes.values())):
        return None
    filters = {} if trainer.filters is None else trainer.filters.of
    matrices = [
        _Matrix.of(trainer, name, base[name], stays[name], goes[name], filters.get(name))
        for name in trainer.place.parameters
    ]
    counts = np.ones(1 + max(going.max(), staying.max()))  # w
    fewest, n_vain = np.inf, 0
    for _ in range(_MOST_ROUNDS):
        for matrix in matrices:
            matrix.solve_()
        # The same sums in all processes; unlike GPUs may have rounded them differently.
        trainer.world.broadcast_(trainer.place.parameters.values())
        wrong = not_right()
        if enough(wrong):
            return wrong
        n_vain = 0 if len(wrong) < fewest else n_vain + 1
        if n_vain == _PATIENCE:
            break
        fewest = min(fewest, len(wrong))
        for texts, sums in ((going, goes), (staying, stays)):
            _count_more_(sums, counts, np.intersect1d(texts, wrong), trainer, runner)
    return None


def _count_more_(
    sums: Mapping[str, torch.Tensor],
    counts: np.ndarray,
    texts: np.ndarray,
    trainer: Trainer,
    runner: LedgerRunner,
) -> None:
    """Lets some texts, [B], count more in sums of moments; `counts` is what all texts count."""
    for count in np.unique(counts[texts]):
        more = moments(trainer, runner, texts[counts[texts] == count])
        assert more is not None  # as those of all texts together
        for name, moment in sums.items():
            moment.add_(more[name].to(moment.device), alpha=float(count) * (_HARDER - 1))
    counts[texts] *= _HARDER


@dataclass(eq=False)
class _Matrix:
    """A matrix of which a change is to be removed.

    Attributes:
        name: Of its parameter.
        parameter: It.
        transposed: Whether the parameter is [in, out].
        now: What it was, [out, in].
        change: D, [out, in].
        stays: K, [in, in], which may grow.
        goes: G, [in, in], which may grow.
        s: S, [in, in]; `None` for the identity.
        ridge: r.
    """

    name: str
    parameter: torch.nn.Parameter
    transposed: bool
    now: torch.Tensor
    change: torch.Tensor
    stays: torch.Tensor
    goes: torch.Tensor
    s: torch.Tensor | None
    ridge: float

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        name: str,
        base: torch.Tensor,
        stays: torch.Tensor,
        goes: torch.Tensor,
        s: torch.Tensor | None,
    ) -> _Matrix:
        """Returns a trainer's matrix, with the base's, the sums and the filter."""
        parameter = trainer.place.parameters[name]
        transposed = isinstance(owner(trainer.model, name), Conv1D)
        now, then = (
            (m.T if transposed else m).detach().float().clone()
            for m in (parameter, base.to(parameter.device))
        )
        ridge = ridge_of(stays, goes, s)
        return cls(name, parameter, transposed, now, now - then, stays, goes, s, ridge)

    @torch.no_grad()
    def solve_(self) -> None:
        """Puts the matrix that the present sums want into its place."""
        removed = least_squares(self.change, self.stays, self.goes, self.s, self.ridge)
        new = self.now + removed.to(self.now)
        self.parameter.copy_(new.T if self.transposed else new)
        if not torch.isfinite(self.parameter).all():
            raise NonFiniteLossError(
                f"`{self.name}` without the facts overflows {self.parameter.dtype}. The model is "
                "as it was before. Retract with `exact=true`."
            )


def ridge_of(stays: torch.Tensor, goes: torch.Tensor, s: torch.Tensor | None = None) -> float:
    """Returns r for these sums (see `least_squares`): of what a direction carries in the mean."""
    return on_cpu_if_full(_ridge, stays, goes, s, what="to take facts out of a matrix")


def least_squares(
    change: torch.Tensor,
    stays: torch.Tensor,
    goes: torch.Tensor,
    s: torch.Tensor | None,
    ridge: float,
) -> torch.Tensor:
    """Returns E, [out, in] float64, which takes a change to zero where it is to go.

    Args:
        change: D, [out, in].
        stays: K, [in, in].
        goes: G, [in, in].
        s: S, [in, in]; `None` for the identity.
        ridge: r.
    """
    solved = partial(_solved, ridge=ridge)
    return on_cpu_if_full(solved, change, stays, goes, s, what="to take facts out of a matrix")


def _ridge(stays: torch.Tensor, goes: torch.Tensor, s: torch.Tensor | None) -> float:
    all_, s = _filtered(stays, goes, s)
    carried = float(all_.diagonal().mean())
    return _RIDGE * max(carried, torch.finfo(torch.float64).tiny)


def _solved(
    change: torch.Tensor,
    stays: torch.Tensor,
    goes: torch.Tensor,
    s: torch.Tensor | None,
    ridge: float,
) -> torch.Tensor:
    all_, s = _filtered(stays, goes, s)
    wanted = -change.to(all_) @ goes.to(all_)  # [out, in]
    if s is not None:
        wanted = wanted @ s.T
    all_.diagonal().add_(ridge)
    a = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(all_)).T
    return a if s is None else a @ s


def _filtered(
    stays: torch.Tensor, goes: torch.Tensor, s: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns S (K + G) S^T and S, in float64."""
    device = torch.device("cpu") if stays.device.type == "mps" else stays.device
    all_ = stays.to(device, torch.float64) + goes.to(device, torch.float64)
    if s is None:
        return all_, None
    s = s.to(device, torch.float64)
    return s @ all_ @ s.T, s
