"""Differences between convolutions, paired by seed, with 95 % intervals."""

from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """A mean difference and its 95 % interval."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" where the interval leaves zero out, else "no difference".

        An interval without width decides nothing: that a few seeds differ alike is a matter of few images.
        """
        return "higher" if 0 < self.low < self.high else "lower" if self.low < self.high < 0 else "no difference"


def mean_interval(values: Sequence) -> Tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of the mean by Student's t, (low, high), over the first axis: `[n, ...]` → two `[...]`.

    NaN for n = 1. Where all values are equal it is that value: t knows no other uncertainty than their spread.
    """
    array = np.asarray(values, dtype=float)
    mean, count = array.mean(0), len(array)
    if count < 2:
        return np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = stats.t.ppf(0.975, count - 1) * array.std(0, ddof=1) / np.sqrt(count)
    return mean - half, mean + half


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Optional[Difference]:
    """Mean of `ours[i] − theirs[i]`, with the interval of the paired t-test: both have run i's seed in common.

    A seed's images, order and starting weights raise or lower both, and their difference is free of that. Each interval
    is at 95 % for itself; among twenty of them one is expected to miss.

    Args:
        ours: One number for each seed.
        theirs: Of the same seeds, in the same order.

    Returns:
        The difference, None for fewer than two seeds.

    Raises:
        ValueError: The numbers are not as many.
    """
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) < 2:
        return None
    low, high = mean_interval(pairs)
    return Difference(float(np.mean(pairs)), float(low), float(high))
