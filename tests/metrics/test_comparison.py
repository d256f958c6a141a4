"""Paired tests against the definitions, against scipy, and under the null hypothesis."""

import numpy as np
import pytest
from hypothesis import given
from metric_examples import binary_examples
from scipy import stats

from pcam_jax.metrics import comparison
from pcam_jax.metrics.ranking import auroc
from pcam_jax.runtime.errors import UserError


def delong_by_pairs(labels, rows):
    """Covariance from every pair of a positive and a negative, as in the paper."""
    kernels = []
    for row in rows:
        above = row[labels == 1][:, None] - row[labels == 0]
        kernels.append((above > 0) + 0.5 * (above == 0))
    of_positives = np.stack([kernel.mean(axis=1) for kernel in kernels])
    of_negatives = np.stack([kernel.mean(axis=0) for kernel in kernels])
    return np.cov(of_positives) / of_positives.shape[1] + np.cov(of_negatives) / of_negatives.shape[1]


@given(binary_examples())
def test_covariance_equals_the_sum_over_pairs(example):
    labels, probs = example
    labels = np.append(labels, [0, 1, 0, 1])
    probs = np.append(probs, [0.1, 0.2, 0.5, 0.7])
    rows = np.stack([probs, np.round(probs**2 + 0.1 * np.sin(9 * probs), 2)])
    areas, covariance = comparison.auroc_covariance(labels, rows)
    assert areas == pytest.approx([auroc(labels, row) for row in rows])
    np.testing.assert_allclose(covariance, delong_by_pairs(labels, rows), atol=1e-12)
    alone = comparison.auroc_covariance(labels, rows, groups=[f"g{number}" for number in range(len(labels))])
    np.testing.assert_allclose(alone[1], covariance, atol=1e-12)


def paired_scores(rng, count, groups=None):
    """Two equally good models, which share most of what they see."""
    labels = rng.integers(0, 2, count)
    shared = rng.normal(size=count) + 1.2 * labels
    noise = rng.normal(size=(2, count))
    if groups is not None:
        noise = noise * 0.3 + rng.normal(size=(2, groups.max() + 1))[:, groups]
    return labels, shared + noise[0], shared + noise[1]


def test_delong_rejects_as_often_as_it_should_and_groups_matter():
    rng = np.random.default_rng(0)
    rejected = [comparison.delong_test(*paired_scores(rng, 200)).p_value < 0.05 for _ in range(400)]
    assert 0.025 < np.mean(rejected) < 0.08
    groups = np.arange(400) % 20
    with_groups, without = [], []
    for _ in range(300):
        labels, first, second = paired_scores(rng, 400, groups)
        # a group leans to one class, and the models differ by group: only then do groups count
        labels = np.where(rng.random(400) < 0.6, groups % 2, labels)
        first, second = first + labels, second + labels
        with_groups.append(comparison.delong_test(labels, first, second, groups).p_value < 0.05)
        without.append(comparison.delong_test(labels, first, second).p_value < 0.05)
    assert np.mean(without) > 0.3
    assert np.mean(with_groups) < 0.12


def test_delong_finds_a_difference_and_its_interval_covers():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 4000)
    good, poor = rng.normal(size=4000) + 2 * labels, rng.normal(size=4000) + labels
    result = comparison.delong_test(labels, good, poor)
    assert result.p_value < 1e-6
    assert result.difference == pytest.approx(auroc(labels, good) - auroc(labels, poor))
    assert result.low < stats.norm.cdf(2 / np.sqrt(2)) - stats.norm.cdf(1 / np.sqrt(2)) < result.high
    area, (low, high) = comparison.auroc_interval(labels, good)
    assert 0 < low < stats.norm.cdf(2 / np.sqrt(2)) < high < 1
    assert low < area < high


def test_delong_at_its_limits():
    labels = [0, 0, 1, 1]
    perfect, same = [0.1, 0.2, 0.8, 0.9], [0.1, 0.2, 0.8, 0.9]
    twin = comparison.delong_test(labels, perfect, same)
    assert (twin.difference, twin.standard_error, twin.p_value) == (0, 0, 1)
    rng = np.random.default_rng(0)
    drawn, scores = rng.integers(0, 2, 500), rng.normal(size=500)
    alike = comparison.delong_test(drawn, scores, np.exp(scores))
    assert (alike.standard_error, alike.p_value) == (0, 1)
    assert np.isnan(comparison.auroc_interval(labels, perfect)[1]).all()
    alone = comparison.delong_test([0, 0, 0, 1], [0.1, 0.2, 0.8, 0.9], [0.2, 0.2, 0.8, 0.1])
    assert np.isnan(alone.p_value)
    absent = comparison.delong_test([0, 0], [0.1, 0.2], [0.2, 0.1])
    assert np.isnan([absent.auroc_a, absent.p_value]).all()
    with pytest.raises(UserError, match="pair them by example"):
        comparison.delong_test(labels, perfect, [0.1])


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 9), (40, 21), (5, 5), (0, 1)])
def test_mcnemar_is_the_exact_binomial(only_a, only_b):
    labels = np.ones(100, dtype=int)
    first, second = np.ones(100, dtype=int), np.ones(100, dtype=int)
    second[:only_a] = 0
    first[only_a : only_a + only_b] = 0
    result = comparison.mcnemar_test(labels, first, second)
    assert (result.only_a_right, result.only_b_right) == (only_a, only_b)
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
    assert result.p_value == pytest.approx(expected)


def test_mcnemar_refuses_what_is_not_paired():
    with pytest.raises(UserError, match="pair them by example"):
        comparison.mcnemar_test([0, 1], [0, 1], [0, 1, 1])


def test_paired_bootstrap_tells_a_better_model_from_an_equal_one():
    rng = np.random.default_rng(5)
    labels, first, second = paired_scores(rng, 600)
    probs = [
        1 / (1 + np.exp(0.6 - score)) for score in (first, second, first - 2 * labels + rng.normal(size=600))
    ]
    equal = comparison.paired_bootstrap(labels, probs[0], probs[1], resamples=300)
    better = comparison.paired_bootstrap(labels, probs[0], probs[2], resamples=300)
    assert equal["auroc"].value == pytest.approx(auroc(labels, first) - auroc(labels, second))
    assert equal["auroc"].p_value > 0.05
    assert equal["auroc"].low < 0 < equal["auroc"].high
    for name in ("auroc", "accuracy"):
        assert better[name].low > 0
        assert better[name].p_value == pytest.approx(2 / 301)
    assert better["nll"].high < 0
    # the paired interval agrees with DeLong's
    delong = comparison.delong_test(labels, probs[0], probs[2])
    assert (better["auroc"].low, better["auroc"].high) == pytest.approx((delong.low, delong.high), abs=0.02)


def test_paired_bootstrap_of_a_model_with_itself():
    rng = np.random.default_rng(6)
    labels, probs = rng.integers(0, 3, 60), rng.dirichlet(np.ones(3), 60)
    result = comparison.paired_bootstrap(labels, probs, probs, resamples=100, groups=rng.integers(0, 12, 60))
    assert all((one.value, one.low, one.high, one.p_value) == (0, 0, 0, 1) for one in result.values())
    with pytest.raises(UserError, match="3 and 2 classes"):
        comparison.paired_bootstrap(np.minimum(labels, 1), probs, probs[:, 0])


def test_holm_adjusts_for_the_number_of_tests():
    """Holm's steps worked out by hand: times 3, 2 and 1 from the smallest on, and never falling."""
    np.testing.assert_allclose(comparison.holm_adjusted([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(comparison.holm_adjusted([0.5, np.nan, 0.6]), [1.0, np.nan, 1.0])
    assert comparison.holm_adjusted([]).shape == (0,)


def test_holm_keeps_the_family_error_rate():
    rng = np.random.default_rng(0)
    adjusted = np.array([comparison.holm_adjusted(row) for row in rng.random((2000, 5))])
    assert 0.035 <= np.mean(adjusted.min(axis=1) < 0.05) <= 0.065
