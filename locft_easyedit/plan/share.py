"""How much of a mini-batch falls to the rank that gets most of it: what a step waits for.

Each edit belongs to one rank, dealt out in turn, and a mini-batch is drawn from all edits: how many
of its edits belong to which rank is chance (a multivariate hypergeometric distribution; with many
more edits than a mini-batch has, a multinomial one). A step takes as long as its largest rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Beyond so many standard deviations nothing is left that could be added up.
_DEVIATIONS = 12.0


@dataclass(frozen=True)
class LargestShare:
    """Of the edits of a mini-batch, those of the rank with most of them.

    Attributes:
        mean: Their number, on average over all mini-batches.
        most: Their number in the worst of a run's mini-batches, as likely as not.
    """

    mean: float
    most: int


def largest_share(n_edits: int, batch_size: int, ranks: int, n_steps: int = 1) -> LargestShare:
    """Returns the largest number of edits that one of the ranks has in a mini-batch.

    The probability that no rank has more than m is the product, over ranks, of the probabilities
    that independent binomials stay at m or below, times that of their sum being the batch size when
    they do, over that of the sum being it anyway (Levin, "A representation for multinomial
    cumulative distribution functions", Annals of Statistics 1981). Nothing is sampled.

    Args:
        n_edits: All edits, N.
        batch_size: Edits in a mini-batch, B; at most N of them are there.
        ranks: Ranks, R.
        n_steps: Mini-batches of the run.
    """
    batch = min(batch_size, n_edits)
    if ranks == 1 or batch == n_edits:
        most = math.ceil(batch / ranks)
        return LargestShare(float(most), most)
    # Dealt out in turn, the first few ranks have one edit more than the others.
    owned = [(n_edits // ranks + 1, n_edits % ranks), (n_edits // ranks, ranks - n_edits % ranks)]
    chance = batch / n_edits
    within = {owns: _log_binomial(owns, chance, batch) for owns, n in owned if n}
    anyway = float(np.exp(_log_binomial(n_edits, chance, batch)[batch]))
    mean, most = 0.0, 0
    low = math.ceil(batch / ranks)
    high = min(batch, math.ceil(low + _DEVIATIONS * math.sqrt(low) + _DEVIATIONS))
    mean = float(low)
    for m in range(low, high + 1):
        above = max(0.0, 1.0 - _none_above(m, within, owned, batch) / anyway)
        mean += above
        if 1 - (1 - min(above, 1.0)) ** n_steps >= 0.5:
            most = m + 1
    return LargestShare(mean, min(max(most, low), batch))


def _none_above(
    m: int, within: dict[int, np.ndarray], owned: list[tuple[int, int]], batch: int
) -> float:
    """Returns the probability that no binomial is above `m` and that all add up to `batch`."""
    length = sum(n * min(m, owns) for owns, n in owned) + 1
    if length <= batch:
        return 0.0
    product = np.ones(length, dtype=complex)
    log_scale = 0.0
    for owns, n in owned:
        if n:
            kept = np.exp(within[owns][: m + 1])
            # Each is made to add up to 1: the 64th power of anything less is lost in rounding.
            log_scale += n * math.log(kept.sum())
            product *= np.fft.fft(kept / kept.sum(), length) ** n
    return float(np.fft.ifft(product).real[batch]) * math.exp(log_scale)


def _log_binomial(n: int, chance: float, up_to: int) -> np.ndarray:
    """Returns the logarithms of the probabilities of 0 to `up_to` successes in `n` trials."""
    k = np.arange(1, min(n, up_to) + 1, dtype=float)
    ways = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    k = np.arange(len(ways))
    return ways + k * math.log(chance) + (n - k) * math.log1p(-chance)
