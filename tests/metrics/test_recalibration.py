"""Temperature against a brute search, isotonic regression against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_examples import binary_examples
from scipy import optimize, special
from sklearn import metrics as sk
from sklearn.isotonic import IsotonicRegression

from pcam_jax.metrics import recalibration as re
from pcam_jax.runtime.errors import UserError


def binary_logits(seed, count=400, temperature=2.5):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=count) * 2
    return (true * temperature).astype(np.float32), (rng.random(count) < special.expit(true)).astype(int)


def softmax_logits(seed, count=400, classes=4, temperature=0.4):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(count, classes)) * 2
    labels = (true + rng.gumbel(size=true.shape)).argmax(axis=1)
    return true * temperature, labels


@given(st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 1.0, 8.0, 40.0]), st.booleans())
def test_the_temperature_is_the_minimum(seed, temperature, two_classes):
    make = binary_logits if two_classes else softmax_logits
    logits, labels = make(seed, count=60, temperature=temperature)
    fit = re.fit_temperature(logits, labels)

    def loss(log_temperature):
        scaled = np.asarray(logits, dtype=np.float64) / np.exp(log_temperature)
        rows = np.stack([np.zeros(len(scaled)), scaled], axis=1) if two_classes else scaled
        return -special.log_softmax(rows, axis=1)[np.arange(len(labels)), labels].mean()

    assert fit.nll_before == pytest.approx(loss(0.0), rel=1e-6)
    if not fit.at_bound:
        best = optimize.minimize_scalar(
            loss, bracket=(np.log(fit.temperature) - 1, np.log(fit.temperature) + 1)
        )
        assert fit.nll_after <= best.fun + 1e-10
        assert np.log(fit.temperature) == pytest.approx(best.x, abs=1e-5)


@pytest.mark.parametrize(("make", "temperature"), [(binary_logits, 2.5), (softmax_logits, 0.4)])
def test_the_temperature_is_recovered(make, temperature):
    logits, labels = make(7, count=50_000)
    fit = re.fit_temperature(logits, labels)
    assert fit.temperature == pytest.approx(temperature, rel=0.05)
    assert fit.nll_after < fit.nll_before
    assert not fit.at_bound
    assert fit.count == 50_000


def test_two_logits_are_their_difference():
    logits, labels = binary_logits(3)
    pair = np.stack([np.zeros_like(logits) + 5, logits + 5], axis=1)
    assert re.fit_temperature(pair, labels).temperature == pytest.approx(
        re.fit_temperature(logits[:, None], labels).temperature, rel=1e-5
    )
    np.testing.assert_allclose(
        re.apply_temperature(pair, 2.0), special.expit(logits.astype(float) / 2), rtol=1e-5
    )


def test_perfect_separation_and_no_signal_end_at_the_bounds():
    separable = re.fit_temperature([-1.0, -2.0, 1.0, 2.0], [0, 0, 1, 1])
    assert separable.at_bound
    assert separable.temperature == pytest.approx(re.LOWEST_TEMPERATURE)
    inverted = re.fit_temperature([-1.0, -2.0, 1.0, 2.0], [1, 1, 0, 0])
    assert inverted.at_bound
    assert inverted.temperature == pytest.approx(re.HIGHEST_TEMPERATURE)


def test_extreme_logits_do_not_overflow():
    logits = np.array([-1e4, 1e4, 1e4, -1e4, 3.0, -2.0])
    fit = re.fit_temperature(logits, [0, 1, 1, 0, 0, 1])
    assert np.isfinite([fit.nll_before, fit.nll_after, fit.temperature]).all()


def test_probabilities_give_their_logits_back():
    probs = np.array([0.1, 0.5, 0.99])
    np.testing.assert_allclose(re.apply_temperature(re.logits_from_probs(probs), 1.0), probs)
    rows = np.array([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(re.apply_temperature(re.logits_from_probs(rows), 1.0), rows, atol=1e-12)
    assert np.isfinite(re.logits_from_probs(np.array([0.0, 1.0], np.float32))).all()


@pytest.mark.parametrize(
    ("logits", "labels", "sentence"),
    [
        ([np.nan, 1.0], [0, 1], "1 of 2 logits are not finite"),
        ([np.inf, 1.0], [0, 1], "1 of 2 logits are not finite"),
        ([0.0, 1.0], [1, 1], "All 2 examples are of class 1"),
        ([0.0, 1.0, 2.0], [1, 0], "2 labels but 3 rows"),
        ([], [], "empty"),
    ],
)
def test_bad_logits_are_named(logits, labels, sentence):
    with pytest.raises(UserError, match=sentence):
        re.fit_temperature(logits, labels)


@pytest.mark.parametrize("temperature", [0, -1, np.nan, np.inf])
def test_bad_temperatures_are_named(temperature):
    with pytest.raises(UserError, match="must be above 0"):
        re.apply_temperature([0.0], temperature)


@given(binary_examples(with_weights=True))
def test_isotonic_equals_scikit_learn(example):
    labels, probs, weights = example
    for counted in (None, weights):
        reference = IsotonicRegression(out_of_bounds="clip").fit(probs, labels, sample_weight=counted)
        ours = re.fit_isotonic(labels, probs, counted)
        grid = np.concatenate([probs, np.linspace(0, 1, 23)])
        np.testing.assert_allclose(ours(grid), reference.predict(grid), atol=1e-9)
        assert np.all(np.diff(ours.values) >= 0)


def test_isotonic_ties_lower_auroc_where_temperature_does_not():
    rng = np.random.default_rng(5)
    probs = rng.random(2000)
    labels = (rng.random(2000) < probs).astype(int)
    fitted, held_out = slice(0, 1000), slice(1000, None)
    mended = re.fit_isotonic(labels[fitted], probs[fitted])(probs[held_out])
    cooled = re.apply_temperature(re.logits_from_probs(probs[held_out]), 3.0)
    plain = sk.roc_auc_score(labels[held_out], probs[held_out])
    assert sk.roc_auc_score(labels[held_out], mended) < plain
    assert sk.roc_auc_score(labels[held_out], cooled) == pytest.approx(plain, abs=1e-12)


def test_isotonic_is_for_two_classes():
    with pytest.raises(UserError, match="use temperature"):
        re.fit_isotonic([0, 1, 2], np.eye(3))


def test_crossfitting_maps_each_example_by_a_fit_that_has_not_seen_it():
    """A map that sees its examples makes noise look calibrated; one that does not cannot."""
    rng = np.random.default_rng(0)
    labels, probs = rng.integers(0, 2, 60), rng.random(60)
    seen = re.fit_isotonic(labels, probs)(probs)
    unseen = re.crossfit_isotonic(labels, probs)
    assert np.mean((seen - labels) ** 2) < 0.25 <= np.mean((unseen - labels) ** 2)
    left_out = re.crossfit_isotonic(labels, probs, folds=60)
    others = np.arange(60) != 7
    assert left_out[7] == re.fit_isotonic(labels[others], probs[others])(probs[7:8])[0]


def test_crossfitting_keeps_groups_together():
    rng = np.random.default_rng(0)
    labels, probs, groups = np.tile([0, 1], 20), rng.random(40), np.repeat(np.arange(10), 4).astype(str)
    left_out = re.crossfit_isotonic(labels, probs, groups, folds=10)
    others = groups != "3"
    np.testing.assert_array_equal(
        left_out[~others], re.fit_isotonic(labels[others], probs[others])(probs[~others])
    )


def test_crossfitting_says_where_a_fit_would_lack_a_class():
    assert np.isnan(re.crossfit_isotonic([0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], folds=4)).all()
