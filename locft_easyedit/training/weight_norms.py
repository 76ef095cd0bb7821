"""How far a parameter moved, in norms; a large one never stands in float32 as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

_ITERATIONS = 12  # of the power method: within 7 % of the spectral norm of SmolLM2's matrices
_AT_ONCE = 2**24  # numbers that are turned into float32 together

Norms = dict[str, float]


@torch.no_grad()
def change_of(original: torch.Tensor, new: torch.Tensor) -> Norms:
    """Returns how far a parameter moved; ratios of norms.

    `norm_ratio` is the Frobenius norm, new / original; `relative_change` the norm of the change /
    that of the original; `spectral_ratio`, of matrices alone, the largest singular value, new /
    original.
    """
    before, after, moved = 0.0, 0.0, 0.0
    for old, now in zip(_pieces(original), _pieces(new), strict=True):
        now = now.to(old.device)
        before = math.hypot(before, float(torch.linalg.vector_norm(old)))
        after = math.hypot(after, float(torch.linalg.vector_norm(now)))
        moved = math.hypot(moved, float(torch.linalg.vector_norm(now - old)))
    norms = {"norm_ratio": _ratio(after, before), "relative_change": _ratio(moved, before)}
    if new.ndim > 1 and before:
        norms["spectral_ratio"] = _ratio(spectral_norm(new), spectral_norm(original))
    return norms


@torch.no_grad()
def spectral_norm(matrix: torch.Tensor) -> float:
    """Returns the largest singular value, about; of a stack of matrices, the largest of all."""
    if matrix.ndim > 2:
        return max(spectral_norm(one) for one in matrix)
    # Fixed numbers, and none from the program's random state.
    start = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=start).to(matrix.device)
    size = 0.0
    for _ in range(_ITERATIONS):
        vector = vector / torch.linalg.vector_norm(vector)
        following, square = torch.zeros_like(vector), torch.zeros_like(vector[0])
        for piece in _pieces(matrix):
            image = piece @ vector
            square += image.square().sum()
            following += piece.T @ image
        vector, size = following, math.sqrt(float(square))
        if not size or not math.isfinite(size):
            break
    return size


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields a parameter's rows in float32, never a large one as a whole."""
    rows = tensor.detach() if tensor.ndim else tensor.detach().reshape(1)
    step = max(1, _AT_ONCE * len(rows) // max(1, rows.numel()))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].float()


def _ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return 1.0 if a == b else math.inf
