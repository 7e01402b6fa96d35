"""Intervals over seeds. One seed is one trained network, so whole seeds are resampled, never single episodes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

BOOTSTRAP_FROM = 10  # seeds; below that a bootstrap's interval is too short, and Student's t is used


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95% confidence interval; `low` and `high` are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.2f} (1 seed)"
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def seed_interval(per_seed: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return mean and interval of one number per seed: Student's t below 10 seeds, BCa bootstrap of seeds from 10.

    Raises `ValueError` for no seeds.
    """
    values = np.asarray(per_seed, np.float64)
    if values.size == 0:
        raise ValueError("no seeds")
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, None, None, 1)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean, len(values))
    if values.size < BOOTSTRAP_FROM:
        half = float(scipy.stats.t.ppf(0.5 + confidence / 2, values.size - 1) * scipy.stats.sem(values))
        return Interval(mean, mean - half, mean + half, len(values))
    result = scipy.stats.bootstrap((values,), np.mean, confidence_level=confidence, rng=np.random.default_rng(0))
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), len(values))


def normalised(returns: np.ndarray, untrained: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return (returns - untrained) / (reference - untrained), elementwise; infinite where the two references agree."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (np.asarray(returns) - untrained) / (reference - untrained)
