"""What an edit changes, as low-rank factors: the best of each rank (Eckart and Young, 1936)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from .edited_matrices import EditedMatrices, Factors

# Beyond this many numbers a decomposition in float64 would take hours on a CPU.
_MOST_IN_DOUBLE = 2**24
LITTLE = 0.05  # of a change that may be left out without a warning


def low_rank_factors(
    delta: EditedMatrices, rank: int, transposed: Collection[str] = ()
) -> tuple[dict[str, Factors], float, int]:
    """Returns each matrix's change as factors of a rank, and how much of the change they leave out.

    Args:
        delta: An edit of matrices alone, with the values that it replaced.
        rank: The rank R; a matrix whose change has less beyond rounding gets less.
        transposed: Names of matrices that are stored as [in, out] (transformers' `Conv1D`).

    Returns:
        By matrix A, [R, in], and B, [out, R], float32, whose product B A is near the change; and
        ||change - B A|| / ||change|| over all matrices (Frobenius norms); and the smallest rank
        that leaves out `LITTLE` at most.
    """
    factors, left_out, whole = {}, 0.0, 0.0
    spectra = []
    for name, new in delta.new.items():
        exact = torch.float64 if new.numel() <= _MOST_IN_DOUBLE else torch.float32
        change = new.to(exact) - delta.original[name].to(exact)
        if name in transposed:
            change = change.T
        # [out, K], [K] and [K, in]
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        # Rounding of the stored numbers leaves a little in every direction, which is no change.
        noise = float(s[0]) * torch.finfo(torch.float32).eps * max(change.shape)
        r = max(1, min(rank, int((s > noise).sum())))
        # Half of each singular value on either side: neither factor is much larger.
        root = s[:r].sqrt()
        factors[name] = (
            (root[:, None] * v[:r]).float().contiguous(),
            (u[:, :r] * root).float().contiguous(),
        )
        squares = s.double() ** 2
        left_out += float(squares[r:].sum())
        whole += float(squares.sum())
        spectra.append(squares)
    share = (left_out / whole) ** 0.5 if whole else 0.0
    return factors, share, _enough(spectra, LITTLE**2 * whole)


def _enough(spectra: Sequence[torch.Tensor], most: float) -> int:
    """Returns the smallest rank beyond which the squares of all matrices sum up to `most` or less.

    Args:
        spectra: Squares of the singular values of each matrix, in descending order.
        most: What may be left out of their sum.
    """
    # [K]: of rank k + 1 of all matrices together, then what is left behind each rank.
    together = torch.zeros(max(map(len, spectra)), dtype=torch.float64)
    for squares in spectra:
        together[: len(squares)] += squares.cpu()
    behind = together.flip(0).cumsum(0).flip(0) - together
    return int((behind > most).sum()) + 1
