"""Means, intervals and paired differences."""

import numpy as np
import pytest

from tsdsr_jax.evaluation import statistics
from tsdsr_jax.evaluation.statistics import difference, estimate


def test_estimate_of_many():
    values = np.random.default_rng().normal(5, 2, 400)
    found = estimate(values.tolist())
    assert found.mean == pytest.approx(values.mean())
    assert found.deviation == pytest.approx(values.std(ddof=1))
    assert found.count == 400
    # With so many values, the bootstrap's interval equals the normal one.
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert estimate(values.tolist()) == found
    # Ten thousand resamples, and the range of 95 % of their means.
    means = values[np.random.default_rng(0).integers(400, size=(10_000, 400))].mean(axis=1)
    means.sort()
    inside = ((means >= found.low) & (means <= found.high)).mean()
    assert inside == pytest.approx(0.95, abs=1e-4)


def test_chunks_draw_what_one_round_draws(monkeypatch):
    values = list(range(50))
    whole = estimate(values)
    monkeypatch.setattr(statistics, "_CHUNK", 50 * 333)
    assert estimate(values) == whole


def test_few_values_have_no_interval():
    assert estimate([3.0, 5.0] * 4).low is None and estimate([3.0, 5.0] * 5).low is not None
    assert estimate([3.0, 5.0]).deviation == pytest.approx(2**0.5)
    assert estimate([3.0]) == statistics.Estimate(3.0, None, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_paired_difference():
    first = [1.0, 2.0, 3.0, 4.0]
    second = [2.0, 3.0, 3.0, 3.0]
    higher = difference(first, second, "higher")
    assert higher.change.mean == pytest.approx(0.25)
    assert (higher.wins, higher.losses) == (2, 1)
    lower = difference(first, second, "lower")
    assert (lower.wins, lower.losses) == (1, 2)
    assert difference(first, second, None).wins is None
    # A constant shift is certain, however much the pictures differ.
    first = [*range(12)]
    sure = difference(first, [value + 0.5 for value in first], "higher").change
    assert (sure.low, sure.high) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="pairs"):
        difference([1.0], [1.0, 2.0], "higher")
