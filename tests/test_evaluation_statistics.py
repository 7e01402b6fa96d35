"""Intervals against scipy and by hand; normalised scores by hand."""

import numpy as np
import pytest
import scipy.stats

from focal.evaluation.statistics import normalised, seed_interval


def test_t_interval_by_hand():
    # mean 2, standard error sqrt(1 / 3), t(0.975, 2) = 4.303
    interval = seed_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert interval.low == pytest.approx(4.0 - interval.high)
    low, high = scipy.stats.t.interval(0.95, 2, loc=2.0, scale=scipy.stats.sem([1.0, 2.0, 3.0]))
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval():
    interval = seed_interval([7.0])
    assert (interval.mean, interval.low, interval.high) == (7.0, None, None)
    assert str(interval) == "7.00 (1 seed)"
    assert str(seed_interval([1.0, 1.0])) == "1.00 [1.00, 1.00]"
    with pytest.raises(ValueError, match="no seeds"):
        seed_interval([])


def test_from_ten_seeds_it_is_a_bootstrap_of_seeds():
    values = np.random.default_rng(0).exponential(size=12)
    interval = seed_interval(values)
    assert interval == seed_interval(values), "the same seeds give the same interval"
    t = scipy.stats.t.interval(0.95, 11, loc=values.mean(), scale=scipy.stats.sem(values))
    assert interval.low != pytest.approx(t[0])
    assert values.min() < interval.low < interval.mean < interval.high < values.max()


def test_normalised_scores():
    assert normalised(np.array([10.0, 60.0, 110.0]), 10.0, 110.0).tolist() == [0.0, 0.5, 1.0]
    assert not np.isfinite(normalised(np.array([1.0]), 5.0, 5.0)).any()
