"""The mean over examples, and its interval."""

import numpy as np
import pytest

from pcam_jax.metrics.means import mean_with_interval


def test_mean_of_what_is_known():
    found = mean_with_interval([1.0, np.nan, 3.0, 2.0])
    assert found.value == 2
    assert found.low < 2 < found.high


def test_interval_covers():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = mean_with_interval(rng.exponential(size=80), resamples=300)
        inside += found.low <= 1 <= found.high
    assert 0.9 <= inside / 200 <= 0.99


def test_groups_widen_the_interval():
    groups = np.repeat(np.arange(12), 20).astype(str)
    values = np.random.default_rng(0).normal(size=12)[groups.astype(int)]
    alone, together = mean_with_interval(values), mean_with_interval(values, groups)
    assert together.value == pytest.approx(alone.value)
    assert together.high - together.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize("values", [[], [np.nan, np.nan]])
def test_nothing_known(values):
    assert np.isnan(mean_with_interval(values).value)


def test_a_single_value_has_no_interval():
    found = mean_with_interval([5.0])
    assert found.value == 5
    assert np.isnan(found.low)
