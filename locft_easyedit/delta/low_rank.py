"""What an edit changes, as low-rank factors: the best of each rank (Eckart and Young, 1936)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ..errors import DeltaError
from .delta import Delta, Factors

# Beyond this many numbers a decomposition in float64 would take hours on a CPU.
_MOST_IN_DOUBLE = 2**24


@dataclass(frozen=True)
class _Decomposed:
    """U S V of a change [out, in]: [out, K], [K] and [K, in]."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor
    n_beyond_rounding: int


class LowRankChange:
    """The change of each matrix of an edit, by rank.

    Args:
        delta: The edit, with the values that it replaced.
        transposed: Names of matrices that are stored as [in, out] (transformers' `Conv1D`).
        device: Where the matrices are decomposed.

    Attributes:
        full_rank: The rank that holds the whole change of every matrix, up to rounding.

    Raises:
        DeltaError: The edit lacks what it replaced, or changes what is no matrix.
    """

    def __init__(
        self,
        delta: Delta,
        transposed: Collection[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        if not delta.original:
            raise DeltaError(
                f"Edit {delta.short_id} was saved without the values that it replaced; its change "
                "is not known. Take them from its base (`originals_from`, or `base=FOLDER`)."
            )
        wrong = [name for name, value in delta.new.items() if value.dim() != 2]
        if wrong:
            raise DeltaError(
                f"`{wrong[0]}` is no matrix, and has no low rank. Use as=adapter or as=model."
            )
        self._delta = delta
        self._transposed = frozenset(transposed)
        self._parts = {name: self._decomposed(name, device) for name in delta.new}
        self.full_rank = max(1, *(part.n_beyond_rounding for part in self._parts.values()))

    def factors(self, rank: int) -> dict[str, Factors]:
        """Returns for each matrix A, [R, in], and B, [out, R], float32: the change is near B A.

        R is `rank`, or what the change has beyond rounding where that is less.
        """
        return {name: self._factors(part, rank) for name, part in self._parts.items()}

    def error(self, rank: int) -> float:
        """Returns ||change - B A|| / ||change|| over all matrices (Frobenius norms)."""
        left = sum(float((part.s[rank:].double() ** 2).sum()) for part in self._parts.values())
        whole = sum(float((part.s.double() ** 2).sum()) for part in self._parts.values())
        return (left / whole) ** 0.5 if whole else 0.0

    def values(self, rank: int) -> dict[str, torch.Tensor]:
        """Returns the matrices with the change of this rank in place of the whole one."""
        return add_factors(self._delta, self.factors(rank), self._transposed)

    def _decomposed(self, name: str, device: torch.device | str) -> _Decomposed:
        new, original = self._delta.new[name], self._delta.original[name]
        exact = torch.float64 if new.numel() <= _MOST_IN_DOUBLE else torch.float32
        change = new.to(device, exact) - original.to(device, exact)
        u, s, v = torch.linalg.svd(_turned(change, name in self._transposed), full_matrices=False)
        # Rounding of the stored numbers leaves a little in every direction, which is no change.
        noise = torch.finfo(torch.float32).eps * max(change.shape)
        n_beyond = int((s > s[0] * noise).sum()) if s[0] > 0 else 0
        return _Decomposed(u.cpu(), s.cpu(), v.cpu(), n_beyond)

    def _factors(self, part: _Decomposed, rank: int) -> Factors:
        rank = max(1, min(rank, part.n_beyond_rounding))
        # Half of each singular value on either side: neither factor is much larger.
        root = part.s[:rank].sqrt()
        a = root[:, None] * part.v[:rank]
        b = part.u[:, :rank] * root
        return a.float().contiguous(), b.float().contiguous()


def add_factors(
    delta: Delta,
    factors: Mapping[str, Factors],
    transposed: Collection[str],
    scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Returns original + scale B A of each matrix, in its own precision; added in float32."""
    values = {}
    for name, (a, b) in factors.items():
        original = delta.original[name]
        change = _turned(scale * (b.float() @ a.float()), name in transposed)
        values[name] = (original.float() + change.to(original.device)).to(original.dtype)
    return values


def _turned(matrix: torch.Tensor, transposed: bool) -> torch.Tensor:
    return matrix.T if transposed else matrix
