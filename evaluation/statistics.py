"""Summaries and intervals over seeds. One seed is one trained network, so whole seeds are resampled, never cells.

Every statistic of a score table (S seeds, K tasks) is computed within each seed first; its mean over seeds and the
interval then rest on S independent numbers: Student's t below 10 seeds, a bootstrap of whole seeds from 10. (rliable
pools runs and tasks before it takes the interquartile mean; with one estimate per seed, few seeds have a t interval
too, and the estimand is the same for any number of seeds.) Cells that are NaN, tasks without a score, are left out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

BOOTSTRAP_FROM = 10  # seeds; below that a bootstrap's interval is too short, and Student's t is used
LEAST_SPAN = 0.1  # of the median (expert - untrained): a task with less has no normalised score
_RESAMPLES = 9999
PROFILE_THRESHOLDS = np.linspace(-0.2, 1.2, 57)  # normalised scores at which performance profiles are drawn

Scores = np.ndarray | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """An estimate over seeds and its 95% confidence interval; `low` and `high` are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.2f} ({self.seeds} seed{'s' * (self.seeds > 1)})"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def seed_interval(per_seed: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Return mean and interval of one number per seed: Student's t below 10 seeds, BCa bootstrap of seeds from 10.

    Raises `ValueError` for no seeds.
    """
    values = np.asarray(per_seed, np.float64)
    if values.size == 0:
        raise ValueError("no seeds")
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, None, None, 1)
    if _all_same(values):
        return Interval(mean, mean, mean, len(values))
    if values.size < BOOTSTRAP_FROM:
        half = float(scipy.stats.t.ppf(0.5 + confidence / 2, values.size - 1) * scipy.stats.sem(values))
        return Interval(mean, mean - half, mean + half, len(values))
    result = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, confidence_level=confidence, rng=np.random.default_rng(0)
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), len(values))


def difference_interval(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> Interval:
    """Return mean(first) - mean(second) and its interval, from one number per seed of two methods.

    The seeds of two methods are independent trainings, so this is Welch's t where either has fewer than 10 seeds, else
    a bootstrap of the seeds of each (percentile). `seeds` is the smaller count. Raises `ValueError` for no seeds.
    """
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not one.size or not two.size:
        raise ValueError("no seeds")
    mean, seeds = float(one.mean() - two.mean()), min(one.size, two.size)
    if seeds == 1:
        return Interval(mean, None, None, 1)
    if _all_same(one) and _all_same(two):
        return Interval(mean, mean, mean, seeds)
    if seeds < BOOTSTRAP_FROM:
        bounds = scipy.stats.ttest_ind(one, two, equal_var=False).confidence_interval(confidence)
        return Interval(mean, float(bounds.low), float(bounds.high), seeds)

    def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis=axis) - b.mean(axis=axis)

    result = scipy.stats.bootstrap(
        (one, two), difference, n_resamples=_RESAMPLES, confidence_level=confidence, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), seeds)


def _all_same(values: np.ndarray) -> bool:
    """Whether values differ by no more than rounding, which has no interval: BCa's is NaN there."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def verdict(difference: Interval, span: float) -> str:
    """Say in a word what a difference (first - second) shows; `span` is reference - untrained, in the same unit.

    "better" or "worse" where the interval leaves 0 out, "not distinguishable" where all of it lies within 10% of
    `span` around 0, else "undecided": more seeds are needed (design section 9).
    """
    if difference.low is None or difference.high is None:
        return "undecided"
    if max(abs(difference.low), abs(difference.high)) <= 0.1 * abs(span):
        return "not distinguishable"
    if difference.low > 0 or difference.high < 0:
        return "better" if difference.low > 0 else "worse"
    return "undecided"


def interquartile_mean(values: np.ndarray | Sequence[float]) -> float:
    """Return the mean of the middle half of all `values`, NaN left out: a quarter is cut off at each end.

    As `scipy.stats.trim_mean(values, 0.25)`: of 4n + r values, n are cut at each end, so of 3 none. Raises `ValueError`
    where there is no value.
    """
    flat = np.asarray(values, np.float64).reshape(-1)
    flat = flat[~np.isnan(flat)]
    if flat.size == 0:
        raise ValueError("no values")
    return float(scipy.stats.trim_mean(flat, 0.25))


def mean_of_counted(values: np.ndarray) -> float:
    """Return the mean of all `values` that are not NaN."""
    return float(np.nanmean(np.asarray(values, np.float64)))


def over_seeds(scores: Scores, statistic: Callable[[np.ndarray], float] = interquartile_mean) -> Interval:
    """Return the interval over seeds of `statistic` of each seed's scores, for `scores` (S, ...)."""
    return seed_interval([statistic(row) for row in np.asarray(scores, np.float64)])


def performance_profile(scores: Scores, thresholds: np.ndarray | Sequence[float]) -> np.ndarray:
    """Return each seed's share of scores above each threshold, (S, T), for `scores` (S, ...) and `thresholds` (T,).

    Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice": the run-score distribution, kept per seed
    so that `seed_interval` of a column gives the band.
    """
    rows = [row.reshape(-1) for row in np.asarray(scores, np.float64)]
    counted = [row[~np.isnan(row)] for row in rows]
    return np.array([[float((row > threshold).mean()) for threshold in thresholds] for row in counted])


def profile_intervals(scores: Scores, thresholds: np.ndarray | Sequence[float]) -> list[Interval]:
    """Return the mean of `performance_profile` over seeds with its interval at each threshold."""
    return [share_interval(column) for column in performance_profile(scores, thresholds).T]


def share_interval(per_seed: Sequence[float] | np.ndarray) -> Interval:
    """Return `seed_interval` of a share, cut at 0 and 1: Student's t knows nothing of these bounds."""
    interval = seed_interval(per_seed)
    if interval.low is None or interval.high is None:
        return interval
    return dataclasses.replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def probability_of_improvement(first: Scores, second: Scores) -> Interval:
    """Return the chance that a seed of `first` (S1, K) scores higher than one of `second` (S2, K), mean over K tasks.

    Ties count half, so per task it is the Mann-Whitney U over S1 S2 (Agarwal et al. 2021). The interval is a
    bootstrap of the seeds of both (percentile); where either has fewer than 10 seeds it is left out.
    """
    one, two = (np.asarray(scores, np.float64) for scores in (first, second))
    keep = ~(np.isnan(one).any(axis=0) | np.isnan(two).any(axis=0))
    if not one.size or not two.size or not keep.any():
        raise ValueError("no scores that both have")
    # (S1, S2): share of tasks on which seed i of the first beats seed j of the second
    wins = np.array([[(np.sign(a - b) + 1.0).mean() / 2.0 for b in two[:, keep]] for a in one[:, keep]])
    estimate, seeds = float(wins.mean()), min(wins.shape)
    if seeds < BOOTSTRAP_FROM:
        return Interval(estimate, None, None, seeds)
    rng = np.random.default_rng(0)
    rows, columns = (rng.integers(n, size=(_RESAMPLES, n)) for n in wins.shape)
    draws = np.array([wins[np.ix_(i, j)].mean() for i, j in zip(rows, columns, strict=True)])
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), seeds)


def normalised(returns: np.ndarray, untrained: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return (returns - untrained) / (reference - untrained), elementwise; infinite where the two references agree."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.asarray(returns) - untrained) / (reference - untrained)


def scored_tasks(reached: np.ndarray, untrained: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Tell which tasks (K,) have a normalised return that says something.

    Their expert `reached` the absolute test, and earns above the untrained policy at least `LEAST_SPAN` of what is the
    median of such tasks: where standing still is almost the optimum, a score divides by next to nothing.
    """
    spans = reference - untrained
    sound = reached & np.isfinite(spans) & (spans > 0)
    return sound & (spans >= LEAST_SPAN * np.median(spans[sound])) if sound.any() else sound
