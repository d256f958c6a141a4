"""Proper scores and calibration errors against scikit-learn and against the definitions, example by example."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_examples import binary_examples, class_examples
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from pcam_jax.metrics import calibration as cal
from pcam_jax.metrics.inputs import check_predictions
from pcam_jax.runtime.errors import UserError


@given(binary_examples(with_weights=True))
def test_binary_scores_equal_scikit_learn(example):
    labels, probs, weights = example
    assert cal.nll(labels, probs) == pytest.approx(sk.log_loss(labels, probs), rel=1e-12)
    assert cal.brier(labels, probs) == pytest.approx(sk.brier_score_loss(labels, probs), abs=1e-12)
    expected = sk.log_loss(labels, probs, sample_weight=weights)
    assert cal.nll(labels, probs, weights) == pytest.approx(expected, rel=1e-9)
    expected = sk.brier_score_loss(labels, probs, sample_weight=weights)
    assert cal.brier(labels, probs, weights) == pytest.approx(expected, abs=1e-9)
    two_columns = np.stack([1 - probs, probs], axis=1)
    assert cal.nll(labels, two_columns) == pytest.approx(cal.nll(labels, probs))


@given(class_examples())
def test_scores_of_more_classes_equal_scikit_learn(example):
    labels, probs = example
    classes = np.arange(probs.shape[1])
    assert cal.nll(labels, probs) == pytest.approx(sk.log_loss(labels, probs, labels=classes), rel=1e-9)
    truth = np.eye(len(classes))[labels]
    assert cal.brier(labels, probs) == pytest.approx(((probs - truth) ** 2).sum(axis=1).mean())


def test_a_saturated_float32_is_a_finite_mistake():
    saturated = np.array([1.0, 0.5], np.float32)
    assert cal.nll([0, 1], saturated) == pytest.approx(sk.log_loss([0, 1], saturated), rel=1e-6)
    assert cal.nll([0, 1], saturated) < cal.nll([0, 1], saturated.astype(np.float64)) < np.inf


def definition_of_ece(confidence, outcome, weight, bins, scheme):
    """One example at a time, with whole-number arithmetic for the ranks."""
    sums = {}
    total = weight.sum()
    for p, y, w in zip(confidence, outcome, weight, strict=True):
        if scheme == "equal_width":
            number = next(b for b in range(bins) if p <= (b + 1) / bins or b == bins - 1)
        else:
            above, tied = weight[confidence > p].sum(), weight[confidence == p].sum()
            number = min(int(bins * (2 * above + tied)) // int(2 * total), bins - 1)
        size, gap = sums.get(number, (0, 0))
        sums[number] = size + w, gap + w * (y - p)
    return sum(size / total * abs(gap / size) for size, gap in sums.values() if size)


@given(binary_examples(), st.integers(1, 20), st.sampled_from(cal.BIN_SCHEMES), st.integers(0, 2**32))
def test_ece_follows_its_definition(example, bins, scheme, seed):
    labels, probs = example
    weights = np.random.default_rng(seed).integers(0, 4, size=(2, len(labels))).astype(float)
    weights[:, 0] += 1
    binned = cal.calibration_bins(check_predictions(labels, probs), bins)
    errors = binned.errors(weights)[cal.BIN_SCHEMES.index(scheme)]
    for row, error in zip(weights, errors, strict=True):
        assert error == pytest.approx(definition_of_ece(probs, labels, row, bins, scheme), abs=1e-9)
        assert cal.ece(labels, probs, bins, scheme, row) == pytest.approx(error, abs=1e-12)
        curve = cal.reliability_curve(labels, probs, bins, scheme, row)
        from_curve = np.average(np.abs(curve.frequency - curve.confidence), weights=curve.weight)
        assert from_curve == pytest.approx(error, abs=1e-9)


@given(class_examples())
def test_ece_of_more_classes_is_that_of_the_top_label(example):
    labels, probs = example
    correct = (probs.argmax(axis=1) == labels).astype(float)
    for scheme in cal.BIN_SCHEMES:
        expected = definition_of_ece(probs.max(axis=1), correct, np.ones(len(labels)), 15, scheme)
        assert cal.ece(labels, probs, scheme=scheme) == pytest.approx(expected, abs=1e-9)


@given(binary_examples())
def test_reliability_curve_equals_scikit_learn(example):
    labels, probs = example
    frequency, confidence = calibration_curve(labels, probs, n_bins=10)
    curve = cal.reliability_curve(labels, probs, bins=10)
    np.testing.assert_allclose(curve.frequency, frequency, atol=1e-12)
    np.testing.assert_allclose(curve.confidence, confidence, atol=1e-12)
    assert np.all(curve.low <= curve.frequency + 1e-12)
    assert np.all(curve.high >= curve.frequency - 1e-12)


def test_equal_mass_bins_hold_equally_many():
    probs = np.random.default_rng(3).random(1000)
    curve = cal.reliability_curve(probs > 0.5, probs, scheme="equal_mass")
    assert len(curve.weight) == 15
    assert set(curve.weight) == {66, 67}


def test_known_calibration():
    rng = np.random.default_rng(0)
    probs = rng.random(200_000)
    labels = rng.random(200_000) < probs
    assert cal.ece(labels, probs) < 0.01
    assert cal.ece(labels, probs, scheme="equal_mass") < 0.01
    assert cal.ece(labels, np.full(200_000, 0.9)) == pytest.approx(0.4, abs=0.01)
    assert cal.ece([0, 1], [0.0, 1.0]) == 0
    assert cal.ece([1, 0], [0.0, 1.0]) == 1


def test_wilson_equals_scipy():
    low, high = cal.wilson_interval(np.array([3 / 20, 0.0]), np.array([20.0, 7.0]))
    for number, (hits, count) in enumerate([(3, 20), (0, 7)]):
        expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
        assert (low[number], high[number]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("probs", "sentence"),
    [
        ([0.2, 1.5], r"1 of 2 probabilities lie outside \[0, 1\]"),
        ([0.2, np.nan], "1 of 2 probabilities are NaN"),
        ([0.2], "2 labels but 1 probabilities"),
        ([[0.2, 0.2, 0.2], [0.2, 0.3, 0.5]], "1 of 2 rows of probabilities do not sum to 1"),
        ([[[0.2]], [[0.1]]], "expected \\[N\\] or"),
    ],
)
def test_bad_probabilities_are_named(probs, sentence):
    with pytest.raises(UserError, match=sentence):
        cal.nll([0, 1], probs)


def test_bad_binning_is_named():
    with pytest.raises(UserError, match="0 bins"):
        cal.ece([0, 1], [0.2, 0.3], bins=0)
    with pytest.raises(UserError, match="equal_width or equal_mass"):
        cal.ece([0, 1], [0.2, 0.3], scheme="quantile")
