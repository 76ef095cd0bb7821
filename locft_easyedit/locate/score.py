"""One number for a place: whether edits are learned, generalize, and leave the rest alone."""

from __future__ import annotations

import math

# Less than a few edits can tell from nothing; of places that all fail in one respect, the others
# still decide.
_FLOOR = 0.01


def score(reliability: float, reworded: float, drift: float) -> float:
    """Returns the harmonic mean of reliability, generalization and stability, 0 to 1.

    As the "score" of Meng et al. ("Locating and Editing Factual Associations in GPT", NeurIPS
    2022) it is low if any of the three is. Stability is exp(-drift). A part counts as 0.01 at
    least; what is no finite number makes the score 0.

    Args:
        reliability: Share of the edits that are learned.
        reworded: Share of the edits' rewordings that are answered with the target.
        drift: KL divergence of the next-token distribution on unrelated text, in nats a token.
    """
    if not all(math.isfinite(part) for part in (reliability, reworded, drift)) or drift < 0:
        return 0.0
    parts = (reliability, reworded, math.exp(-drift))
    return len(parts) / sum(1 / max(part, _FLOOR) for part in parts)
