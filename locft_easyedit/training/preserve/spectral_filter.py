"""The filters S and T: how much of each direction of a matrix's inputs and outputs a change uses.

With C = mean of k k^T over the inputs k of a matrix on what is to be preserved, a change D of the
matrix moves its outputs there by tr(D C D^T) in the mean square. D = A S with

    S = (I + C / (alpha m))^(-p),  m: what a direction carries in the mean,

scaled to rows of one norm in the mean, damps directions by how much of C they carry. With p = 1/2 a
change of the same size in A costs the preserved texts about the same in every direction; a larger p
leaves the busy ones to the edits that need them. Inputs that must not be touched at all are
projected out besides (the null space of AlphaEdit, arXiv 2410.02355, holds for these exactly).

With G, how much each direction of the outputs matters there (see `output_gradients`), the change
moves the model's distributions by tr(D C D^T G) / 2 in the mean. D = T A S, with T made of G as S
is of C, but with a power of its own, damps what matters on either side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ...errors import PreserveError
from ...utils.memory import on_cpu_if_full

_FLOOR = 0.6  # alpha: what a direction may carry, of the mean, before it is damped much
_POWER = 0.75  # p
_OUTPUT_FLOOR, _OUTPUT_POWER = 1.0, 0.25  # the same of T
# Adam's steps in A are steps in A S for the matrix. What is left to a damped change has to go
# further to the same end: so a rate that suits the matrix itself suits A.
_REACH = 4.0
_NEGLIGIBLE = 1e-5  # singular values below this part of the largest are rounding
_MOST_POWERS = 32
_MOST_EXACT = 0.5  # of the directions


def mixed(
    moments: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    with_first: Collection[str] = (),
) -> torch.Tensor:
    """Returns the weighted sum of second moments, each divided by its trace, [in, in].

    Args:
        moments: Mean of k k^T by source, [in, in] each.
        weights: What each source counts.
        with_first: Sources whose texts' first tokens count; divided by their `ordinary_trace`.
    """
    total = torch.zeros_like(next(iter(moments.values())))
    for name, moment in moments.items():
        scale = ordinary_trace(moment) if name in with_first else moment.trace()
        total += weights[name] * moment / scale
    return total


def ordinary_trace(moment: torch.Tensor) -> torch.Tensor:
    """Returns a second moment's trace, in which no direction counts for more than all others do.

    At some layers the first token's key is hundreds of times as long as others and always the same
    (massive activations, arXiv 2402.17762). In units of the whole trace nothing else would carry
    anything, and nothing else be damped.

    Args:
        moment: Of more than one direction, [in, in].
    """
    trace = moment.trace()
    # Where one direction holds half of the trace, powers of the matrix soon leave it alone.
    direction = moment[moment.diagonal().argmax()]
    for _ in range(_MOST_POWERS):
        direction = moment @ (direction / torch.linalg.vector_norm(direction))
    others = trace - torch.linalg.vector_norm(direction)
    return torch.minimum(trace, 2 * others.clamp(min=_NEGLIGIBLE * trace))


def spectral_filter(
    moment: torch.Tensor | None,
    kept: torch.Tensor | None = None,
    *,
    strength: float = 1.0,
    mean: float | None = None,
    name: str = "the matrix",
) -> torch.Tensor:
    """Returns S, [in, in] float32.

    Args:
        moment: C, [in, in]; `None` damps nothing.
        kept: An orthonormal basis of what S takes to 0, [in, r] (see `basis_of`); `None` for
            nothing.
        strength: 1 / alpha, in units of the usual one.
        mean: m, what a direction carries in the mean; that of C if `None`.
        name: Of the matrix, for errors.

    Raises:
        PreserveError: C is not finite.
    """
    if moment is None:
        assert kept is not None
        s = torch.eye(len(kept), dtype=torch.float64, device=kept.device)
    else:
        if not torch.isfinite(moment).all():
            raise PreserveError(
                f"What enters {name} on the text to be preserved is not finite. Load the model in "
                "another precision."
            )
        s = _damping(moment, _FLOOR / strength, _POWER, mean)
    if kept is not None:
        s = s - (s @ kept) @ kept.T
    return (s if moment is None else _REACH * s).float()


def spared_filter(
    moment: torch.Tensor, before: torch.Tensor | None = None, *, strength: float
) -> torch.Tensor:
    """Returns S, [in, in] float32, which damps what some inputs carry, and all that S did before.

    Args:
        moment: C of these inputs, [in, in], finite.
        before: The S that a change is confined with already; `None` for none.
        strength: As for `spectral_filter`.
    """
    if before is None:
        return spectral_filter(moment, strength=strength)
    s = before.double()
    seen = spectral_filter(s @ moment.double() @ s.T, strength=strength)
    return (seen.double() @ s / _REACH).float()


def output_filter(moment: torch.Tensor, *, strength: float = 1.0) -> torch.Tensor:
    """Returns T, [out, out] float32.

    Args:
        moment: G, [out, out], finite.
        strength: As for `spectral_filter`.
    """
    return _damping(moment, _OUTPUT_FLOOR / strength, _OUTPUT_POWER).float()


def _damping(
    moment: torch.Tensor, floor: float, power: float, mean: float | None = None
) -> torch.Tensor:
    """Returns (I + moment / (floor mean))^(-power), scaled, float64.

    A row's norm is 1 in the mean, whatever floor and power: so is the size of a step.
    """
    carried, directions = _decomposed(moment)
    carried = carried.clamp(min=0)
    usual = carried.mean().clamp(min=torch.finfo(torch.float32).tiny) if mean is None else mean
    damped = (1 + carried / (floor * usual)) ** -power
    return (directions * (damped / damped.square().mean().sqrt())) @ directions.T


def _decomposed(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns eigenvalues [n] and eigenvectors [n, n] in float64, where the moment is."""
    carried, directions = on_cpu_if_full(
        lambda m: torch.linalg.eigh(m.double()),
        moment,
        what=f"to decompose a moment of {len(moment)} x {len(moment)}",
    )
    return carried.to(moment.device), directions.to(moment.device)


def basis_of(keys: torch.Tensor, name: str = "the matrix") -> torch.Tensor:
    """Returns an orthonormal basis of what keys [T, in] span, [in, r] float64.

    Args:
        keys: Inputs of a matrix that must not be touched.
        name: Of the matrix, for errors.

    Raises:
        PreserveError: They span so much that next to nothing could be changed.
    """
    n, keys = keys.shape[1], keys.double()
    tiny = torch.finfo(keys.dtype).tiny
    # The first token's key may be hundreds of times as long as others (massive activations, arXiv
    # 2402.17762), beside which all that these differ in would pass for rounding.
    lengths = torch.linalg.vector_norm(keys, dim=1, keepdim=True)
    keys = keys / lengths.clamp(min=(_NEGLIGIBLE * lengths.median()).clamp(min=tiny))
    _, sizes, directions = torch.linalg.svd(keys, full_matrices=False)
    basis = directions[sizes > _NEGLIGIBLE * sizes[:1].clamp(min=tiny)].T
    if basis.shape[1] > _MOST_EXACT * n:
        raise PreserveError(
            f"The prompts of `preserve` take {basis.shape[1]} of the {n} directions of the inputs "
            f"of {name}; exactly kept prompts may take {int(_MOST_EXACT * n)}, or too little is "
            "left to edit with. Give fewer or shorter prompts, or the same as a .txt file, which "
            "is kept nearly."
        )
    return basis
