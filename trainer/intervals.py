"""How far a measured number may be off: 95 % confidence intervals for shares and for ratios of sums."""

import math

import numpy as np

_Z = 1.959964  # of the normal distribution, for 95 %
_BLOCKS, _RESAMPLES = 64, 1000


def wilson(right: int, count: int) -> tuple[float, float]:
    """Of a share `right`/`count` (Wilson 1927): within [0, 1] and honest for few and for extreme."""
    if not count:
        return 0.0, 1.0
    share, widen = right / count, _Z**2 / count
    middle = (share + widen / 2) / (1 + widen)
    half = _Z / (1 + widen) * math.sqrt(share * (1 - share) / count + widen / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def ratio_of_sums(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Of sum(above) / sum(below), both (n,), by a bootstrap over 64 stretches: neighbours in a text are no two witnesses."""
    blocks = min(_BLOCKS, len(above))
    tops, bottoms = (np.array([part.sum() for part in np.array_split(values, blocks)]) for values in (above, below))
    drawn = np.random.default_rng(0).integers(blocks, size=(_RESAMPLES, blocks))
    ratios = tops[drawn].sum(1) / np.maximum(bottoms[drawn].sum(1), 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
