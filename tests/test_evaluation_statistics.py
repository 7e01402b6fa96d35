"""Intervals against scipy and by hand; normalised scores by hand."""

import numpy as np
import pytest
import scipy.stats

from focal.evaluation.statistics import (
    Interval,
    difference_interval,
    interquartile_mean,
    mean_of_counted,
    normalised,
    over_seeds,
    performance_profile,
    probability_of_improvement,
    scored_tasks,
    seed_interval,
    verdict,
)


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
    assert str(Interval(0.5, None, None, 3)) == "0.50 (3 seeds)"
    with pytest.raises(ValueError, match="no seeds"):
        seed_interval([])


def test_nine_seeds_have_a_t_interval_and_ten_a_bootstrap():
    values = np.random.default_rng(6).exponential(size=10)
    for count, same in ((9, True), (10, False)):
        interval = seed_interval(values[:count])
        t = scipy.stats.t.interval(0.95, count - 1, loc=interval.mean, scale=scipy.stats.sem(values[:count]))
        assert ((interval.low, interval.high) == pytest.approx(t)) is same
    assert probability_of_improvement(values[:9, None], values[:, None]).low is None


@pytest.mark.filterwarnings("ignore:Precision loss")
@pytest.mark.parametrize("count", [3, 12])
def test_seeds_that_differ_by_rounding_alone_have_an_interval_of_no_width(count):
    values = [0.1] * (count - 1) + [np.nextafter(0.1, 1.0)]
    interval = seed_interval(values)
    assert interval.low == interval.high == interval.mean == pytest.approx(0.1)
    difference = difference_interval(values, [0.3] * count)
    assert difference.low == difference.high == pytest.approx(-0.2)
    spread = difference_interval(values, np.linspace(0.2, 0.4, count))
    assert spread.low < spread.mean < spread.high, "one that does not vary, and one that does"


def test_from_ten_seeds_it_is_a_bootstrap_of_seeds():
    values = np.random.default_rng(0).exponential(size=12)
    interval = seed_interval(values)
    assert interval == seed_interval(values), "the same seeds give the same interval"
    # scipy's own with other draws, which move an end by about 0.02; a percentile interval's are 0.13 and 0.3 lower
    again = scipy.stats.bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(7))
    low, high = again.confidence_interval
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.05)
    t = scipy.stats.t.interval(0.95, 11, loc=values.mean(), scale=scipy.stats.sem(values))
    assert interval.low != pytest.approx(t[0])
    assert values.min() < interval.low < interval.mean < interval.high < values.max()


def test_a_score_table_is_resampled_by_whole_seeds():
    # 10 seeds that differ a lot, tasks within a seed that hardly do: resampling cells would shrink the interval
    # by sqrt(K); resampling seeds gives that of the seeds' own means, however many tasks there are
    rng = np.random.default_rng(1)
    means = rng.normal(size=10)
    scores = means[:, None] + 1e-3 * rng.normal(size=(10, 200))
    interval = over_seeds(scores, mean_of_counted)
    assert interval == seed_interval(scores.mean(axis=1))
    assert interval.high - interval.low > 0.5 * 4 * means.std(ddof=1) / np.sqrt(10)
    assert over_seeds(scores[:3]).mean == pytest.approx(
        np.mean([scipy.stats.trim_mean(row, 0.25) for row in scores[:3]])
    )


def test_interquartile_mean_against_scipy_and_by_hand():
    assert interquartile_mean([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5  # 2, 3, 4, 5
    values = np.random.default_rng(2).normal(size=(7, 9))
    assert interquartile_mean(values) == scipy.stats.trim_mean(values, 0.25, axis=None)
    assert interquartile_mean([np.nan, 2.0]) == 2.0
    with pytest.raises(ValueError, match="no values"):
        interquartile_mean([np.nan])


def test_difference_is_welch_below_ten_seeds():
    first, second = [3.0, 4.0, 5.0], [1.0, 1.5, 1.0, 2.0]
    interval = difference_interval(first, second)
    expected = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(4 - 1.375)
    assert interval.seeds == 3
    assert difference_interval([1.0], [0.0]) == Interval(1.0, None, None, 1)


def test_difference_bootstraps_the_seeds_of_both_from_ten():
    rng = np.random.default_rng(3)
    first, second = rng.normal(1.0, 1.0, 12), rng.normal(0.0, 1.0, 15)
    interval = difference_interval(first, second)
    expected = scipy.stats.bootstrap(
        (first, second),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        method="percentile",
        rng=np.random.default_rng(9),
    )
    low, high = expected.confidence_interval
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.05)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.2, 0.6, "better"),
        (-0.6, -0.2, "worse"),
        (-0.05, 0.09, "not distinguishable"),
        (0.01, 0.09, "not distinguishable"),  # a difference that is there and too small to matter
        (-0.05, 0.3, "undecided"),
        (-0.05, 0.11, "undecided"),
        (0.01, 0.11, "better"),
        (None, None, "undecided"),
    ],
)
def test_verdict(low, high, word):
    assert verdict(Interval(0.0, low, high, 3), span=1.0) == word


def test_performance_profile_by_hand():
    scores = [[0.0, 0.5, 1.0, np.nan], [1.0, 1.0, 1.0, 1.0]]
    profile = performance_profile(scores, [-0.1, 0.0, 0.5, 1.0])
    assert profile.tolist() == [[1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0], [1.0, 1.0, 1.0, 0.0]]


def test_probability_of_improvement_is_mann_whitney():
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 5, (4, 3)).astype(float), rng.integers(0, 4, (6, 3)).astype(float)
    expected = [scipy.stats.mannwhitneyu(first[:, k], second[:, k]).statistic / 24 for k in range(3)]
    found = probability_of_improvement(first, second)
    assert found.mean == pytest.approx(np.mean(expected))
    assert (found.low, found.high) == (None, None)
    assert probability_of_improvement(first, first).mean == 0.5
    assert probability_of_improvement([[2.0, np.nan]], [[1.0, 5.0]]).mean == 1.0


def test_probability_of_improvement_has_an_interval_from_ten_seeds():
    rng = np.random.default_rng(5)
    first, second = rng.normal(0.5, 1.0, (12, 4)), rng.normal(0.0, 1.0, (10, 4))
    found = probability_of_improvement(first, second)
    assert 0.0 < found.low < found.mean < found.high < 1.0
    # by resampling whole seeds of both with other draws, which move an end by about 0.01
    draws, again = np.random.default_rng(8), []
    for _ in range(1000):
        one, two = first[draws.integers(12, size=12)], second[draws.integers(10, size=10)]
        again.append((one[:, None] > two).mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(again, [0.025, 0.975]), abs=0.04)
    certain = probability_of_improvement(first + 100, second)
    assert (certain.low, certain.mean, certain.high) == (1.0, 1.0, 1.0)


def test_normalised_scores():
    assert normalised(np.array([10.0, 60.0, 110.0]), 10.0, 110.0).tolist() == [0.0, 0.5, 1.0]
    assert not np.isfinite(normalised(np.array([1.0]), 5.0, 5.0)).any()


def test_tasks_without_a_score_failed_are_unknown_or_have_an_expert_hardly_above_the_untrained_policy():
    untrained, expert = np.full(6, -10.0), np.array([-7.0, 215.0, 433.0, 90.0, np.nan, -12.0])
    reached = np.array([True, True, True, False, True, True])
    # spans 3, 225, 443 of sound tasks, median 225: at least 22.5
    assert scored_tasks(reached, untrained, expert).tolist() == [False, True, True, False, False, False]
    assert scored_tasks(reached[:1], untrained[:1], expert[:1]).tolist() == [True]
    assert not scored_tasks(reached[3:], untrained[3:], expert[3:]).any()
