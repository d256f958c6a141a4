"""Resamples against copies of the examples, determinism, and what happens where intervals cannot be given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_examples import binary_examples, class_examples
from scipy import stats

from pcam_jax.metrics import intervals
from pcam_jax.metrics.headline import Headline
from pcam_jax.metrics.inputs import check_groups, check_predictions
from pcam_jax.runtime.errors import UserError


@settings(max_examples=40)
@given(st.one_of(binary_examples(), class_examples()), st.integers(0, 2**32))
def test_a_weighting_gives_the_figures_of_the_copies(example, seed):
    labels, probs = example
    headline = Headline(check_predictions(labels, probs), threshold=0.4)
    copies = np.random.default_rng(seed).integers(0, 4, size=(5, len(labels)))
    figures = headline(copies.astype(float))
    for row, copy in enumerate(copies):
        repeated = np.repeat(labels, copy)
        if len(np.unique(repeated)) < len(np.unique(labels)):
            assert all(np.isnan(figures[name][row]) for name in headline.names)
            continue
        direct = Headline(check_predictions(repeated, np.repeat(probs, copy, axis=0)), threshold=0.4)
        expected = direct(np.ones((1, len(repeated))))
        for name in headline.names:
            assert figures[name][row] == pytest.approx(expected[name][0], abs=1e-9, nan_ok=True), name


def all_weights(*args):
    return np.concatenate(list(intervals.resample_weights(*args)))


def test_resamples_draw_as_many_examples_and_do_not_depend_on_chunks(monkeypatch):
    weights = all_weights(50, 300, 7)
    assert weights.shape == (300, 50)
    assert np.all(weights.sum(axis=1) == 50)
    assert np.all(weights == np.round(weights))
    assert weights.var() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(weights, all_weights(50, 300, 7))
    assert not np.array_equal(weights, all_weights(50, 300, 8))
    monkeypatch.setattr(intervals, "CHUNK_VALUES", 50 * 7)
    np.testing.assert_array_equal(weights, all_weights(50, 300, 7))


def test_groups_are_drawn_whole():
    groups = np.array([0, 1, 1, 2, 2, 2])
    weights = all_weights(6, 200, 3, groups)
    assert np.all(weights[:, 1] == weights[:, 2])
    assert np.all((weights[:, [0, 1, 3]]).sum(axis=1) == 3)
    assert len(np.unique(weights.sum(axis=1))) > 1


@pytest.mark.parametrize(("count", "groups"), [(50, None), (1000, None), (60, np.arange(60) // 3)])
def test_the_jackknife_leaves_out_each_unit_once(count, groups):
    weights = np.concatenate(list(intervals.jackknife_weights(count, 0, groups)))
    units = count if groups is None else 20
    assert len(weights) == min(units, intervals.JACKKNIFE_BLOCKS)
    assert np.all((1 - weights).sum(axis=0) == 1)
    if groups is not None:
        assert all(len(np.unique(row[groups == group])) == 1 for row in weights for group in range(20))


def mean_statistics(values):
    return lambda weights: {"mean": weights @ values / weights.sum(axis=1)}


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    drawn = intervals.bootstrap(mean_statistics(values), 2000, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(2000)
    for method in ("bca", "reversed"):
        low, high = drawn.interval("mean", method)
        assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bca_equals_scipy():
    values = np.random.default_rng(1).exponential(size=60)
    drawn = intervals.bootstrap(mean_statistics(values), 60, resamples=20_000)
    # scipy does not widen for few examples: ask ours for the level that its widening turns into 95 %
    level = next(level for level in np.linspace(0.9, 0.95, 501) if intervals.widened_tail(60, level) <= 0.025)
    ours = drawn.interval("mean", "bca", level)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.01)
    assert ours.high - values.mean() > values.mean() - ours.low


def test_few_units_are_widened_as_student_does():
    assert intervals.widened_tail(10**9) == pytest.approx(0.025, abs=1e-6)
    assert intervals.widened_tail(10) < intervals.widened_tail(30) < 0.025
    expected = stats.norm.cdf(stats.t.ppf(0.025, 9) * np.sqrt(10 / 9))
    assert intervals.widened_tail(10) == pytest.approx(expected)


def test_no_interval_where_none_can_be_given():
    statistics = mean_statistics(np.arange(4.0))
    alone = intervals.bootstrap(statistics, 4, np.zeros(4, dtype=np.int64), resamples=100)
    assert np.isnan(alone.interval("mean")).all()

    def mostly_missing(weights):
        return {"figure": np.where(weights[:, 0] == 1, weights[:, 0], np.nan)}

    rare = intervals.bootstrap(mostly_missing, 30, resamples=200)
    assert rare.points["figure"] == 1
    assert np.isnan(rare.interval("figure")).all()
    assert 100 < rare.lacking() < 200
    constant = intervals.bootstrap(lambda weights: {"one": np.ones(len(weights))}, 5, resamples=100)
    assert constant.interval("one") == (1, 1)


def test_too_few_resamples_are_refused():
    with pytest.raises(UserError, match="99 resamples"):
        intervals.bootstrap(mean_statistics(np.arange(4.0)), 4, resamples=99)


def test_group_codes():
    np.testing.assert_array_equal(check_groups(["b", "a", "b"], 3), [1, 0, 1])
    assert check_groups(["", None, float("nan")], 3) is None
    assert check_groups(None, 3) is None
    codes = check_groups(np.array(["s1", "", "s1", ""]), 4)
    assert codes[0] == codes[2]
    assert sorted(np.unique(codes)) == [0, 1, 2]
    np.testing.assert_array_equal(check_groups(np.array([7, 5, 7]), 3), [1, 0, 1])
    with pytest.raises(UserError, match="there are 3 examples"):
        check_groups(["a"], 3)


def test_two_groups_have_a_wide_interval_without_warnings():
    """Two units put the tail so far out that its complement rounds to one."""
    groups = np.repeat([0, 1], 20)
    drawn = intervals.bootstrap(mean_statistics(np.arange(40.0)), 40, groups, resamples=200)
    low, high = drawn.interval("mean")
    assert low <= drawn.points["mean"] <= high
