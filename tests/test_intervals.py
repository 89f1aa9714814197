"""Paired differences: scipy's own numbers, and the coverage that an interval promises."""

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra [recipes]")

from scipy import stats

from timm_metricconv.recipes.intervals import Difference, mean_interval, paired_difference


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_scipys_numbers(seeds):
    ours, theirs = np.random.default_rng(seeds).normal(90, 1, (2, seeds))
    result = paired_difference(ours.tolist(), theirs.tolist())
    test = stats.ttest_rel(ours, theirs)
    assert result.difference == pytest.approx((ours - theirs).mean())
    assert result[1:] == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (result.verdict == "no difference") == (test.pvalue > 0.05)
    low, high = mean_interval(np.stack([ours, theirs], 1))  # over the first axis alone
    assert (low[1], high[1]) == pytest.approx(tuple(stats.ttest_1samp(theirs, 0).confidence_interval(0.95)))


def test_coverage():
    """Of many comparisons whose truth is known, 95 % of the intervals hold it; where nothing differs 5 % say so.

    Seeds matter five times as much as noise: unpaired intervals would hold the truth always and find nothing.
    """
    random = np.random.default_rng(0)
    for seeds in (3, 5):
        for truth in (0.0, 1.0):
            results = []
            for _ in range(2000):
                of_seed = random.normal(80, 2.5, seeds)
                ours, theirs = of_seed + random.normal(0, 0.5, (2, seeds))
                results.append(paired_difference(ours + truth, theirs))
            held = np.mean([r.low <= truth <= r.high for r in results])
            assert abs(held - 0.95) < 0.015
            if truth == 0:
                words = [r.verdict for r in results]
                assert abs(words.count("higher") - 50) < 25 and abs(words.count("lower") - 50) < 25


def test_words():
    assert Difference(1.0, 0.1, 1.9).verdict == "higher"
    assert Difference(-1.0, -1.9, -0.1).verdict == "lower"
    assert Difference(1.0, -0.1, 2.1).verdict == Difference(0.0, 0.0, 0.0).verdict == "no difference"
    assert Difference(1.0, 1.0, 1.0).verdict == "no difference"  # two seeds that happen to differ alike


def test_few_seeds():
    """One seed has no interval; seeds that all agree have one of no width; a missing run is an error."""
    assert paired_difference([90.0], [89.0]) is None
    assert np.isnan(mean_interval([90.0])).all()
    assert paired_difference([90.0, 91.0], [89.5, 90.5]) == Difference(0.5, 0.5, 0.5)
    with pytest.raises(ValueError):
        paired_difference([90.0, 91.0], [89.0])
