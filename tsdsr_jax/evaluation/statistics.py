"""Means with confidence intervals, and differences between methods on the same pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
# With fewer values the interval is too narrow: for normal ones it covers the mean in 85 % of cases with 5, in 90 % with 10.
FEWEST = 10
_CHUNK = 2_000_000  # random numbers drawn at a time


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over pictures.

    Attributes:
      mean: arithmetic mean.
      deviation: standard deviation between pictures (n - 1); None for a single picture.
      low, high: 95 % percentile bootstrap interval of the mean, over pictures; None for fewer than ten pictures.
      count: number of pictures.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: ArrayLike, seed: int = 0) -> Estimate:
    """Mean, deviation and interval of finite values.

    The interval comes from resampling the pictures 10,000 times. The seed is fixed, so that the same values give the same
    interval.

    Raises:
      ValueError: there are no values.
    """
    array = np.asarray(values, np.float64)
    if not len(array):
        raise ValueError("no values to average")
    deviation = float(array.std(ddof=1)) if len(array) > 1 else None
    if len(array) < FEWEST:
        return Estimate(float(array.mean()), deviation, None, None, len(array))
    low, high = np.percentile(_resampled_means(array, seed), [2.5, 97.5])
    return Estimate(float(array.mean()), deviation, float(low), float(high), len(array))


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rounds = max(1, _CHUNK // len(values))
    means = []
    for start in range(0, RESAMPLES, rounds):
        shape = min(rounds, RESAMPLES - start), len(values)
        means.append(values[generator.integers(len(values), size=shape)].mean(axis=1))
    return np.concatenate(means)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The second method minus the first, on the pictures that both have.

    Attributes:
      change: mean and interval of the differences.
      wins, losses: number of pictures on which the second method is better, and worse; None if it is unknown which values
        are better.
    """

    change: Estimate
    wins: int | None
    losses: int | None


def difference(first: Sequence[float], second: Sequence[float], better: str | None) -> Difference:
    """Compares two methods picture by picture.

    Args:
      first, second: values of the same pictures in the same order.
      better: "higher", "lower" or None.

    Raises:
      ValueError: there are no values, or different numbers of them.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values; expected pairs")
    changes = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if better is None:
        return Difference(estimate(changes), None, None)
    gains = changes if better == "higher" else -changes
    return Difference(estimate(changes), int((gains > 0).sum()), int((gains < 0).sum()))
