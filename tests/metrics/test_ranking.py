"""Ranking figures against scikit-learn and against their own definitions."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_examples import binary_examples, class_examples
from sklearn import metrics as sk

from pcam_jax.metrics import ranking
from pcam_jax.metrics.inputs import check_ranking
from pcam_jax.runtime.errors import UserError


@given(binary_examples(with_weights=True))
def test_areas_equal_scikit_learn(example):
    labels, probs, weights = example
    assert ranking.auroc(labels, probs) == pytest.approx(sk.roc_auc_score(labels, probs), abs=1e-12)
    assert ranking.auprc(labels, probs) == pytest.approx(sk.average_precision_score(labels, probs), abs=1e-12)
    weighted = {"sample_weight": weights}
    expected = sk.roc_auc_score(labels, probs, **weighted)
    assert ranking.auroc(labels, probs, weights) == pytest.approx(expected, abs=1e-9)
    expected = sk.average_precision_score(labels, probs, **weighted)
    assert ranking.auprc(labels, probs, weights) == pytest.approx(expected, abs=1e-9)


@given(binary_examples())
def test_curves_equal_scikit_learn(example):
    labels, probs = example
    for ours, theirs in zip(
        ranking.roc_curve(labels, probs), sk.roc_curve(labels, probs, drop_intermediate=False), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    for ours, theirs in zip(
        ranking.precision_recall_curve(labels, probs), sk.precision_recall_curve(labels, probs), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@given(binary_examples(), st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.95, 1.0]))
def test_fixed_rates_are_the_best_points_of_the_roc_curve(example, target):
    labels, probs = example
    false_rate, true_rate, _ = sk.roc_curve(labels, probs, drop_intermediate=False)
    best_sensitivity = true_rate[1 - false_rate >= target - 1e-12].max()
    best_specificity = (1 - false_rate)[true_rate >= target - 1e-12].max()
    assert ranking.sensitivity_at_specificity(labels, probs, target) == pytest.approx(best_sensitivity)
    assert ranking.specificity_at_sensitivity(labels, probs, target) == pytest.approx(best_specificity)


@given(binary_examples())
def test_auroc_is_the_share_of_pairs_in_order(example):
    labels, probs = example
    above = probs[labels == 1][:, None] - probs[labels == 0]
    assert ranking.auroc(labels, probs) == pytest.approx(np.mean((above > 0) + 0.5 * (above == 0)))
    assert ranking.auroc(labels, -probs) == pytest.approx(1 - ranking.auroc(labels, probs))
    assert ranking.auroc(labels, np.exp(3 * probs)) == pytest.approx(ranking.auroc(labels, probs))


@given(binary_examples(), st.integers(0, 2**32))
def test_a_weight_counts_like_copies(example, seed):
    labels, probs = example
    copies = np.random.default_rng(seed).integers(0, 4, size=(3, len(labels)))
    kernel = ranking.Ranking(*check_ranking(labels, probs))
    counts = kernel.cumulate(copies.astype(float))
    for row, copy in enumerate(copies):
        repeated, scores = np.repeat(labels, copy), np.repeat(probs, copy)
        if len(np.unique(repeated)) < 2:
            assert np.isnan(ranking.area_under_roc(counts)[row])
            continue
        assert ranking.area_under_roc(counts)[row] == pytest.approx(ranking.auroc(repeated, scores))
        expected = ranking.auprc(repeated, scores)
        assert ranking.area_under_precision_recall(counts)[row] == pytest.approx(expected)
        expected = ranking.sensitivity_at_specificity(repeated, scores, 0.8)
        assert ranking.sensitivity_at(counts, 0.8)[row] == pytest.approx(expected)
        expected = ranking.specificity_at_sensitivity(repeated, scores, 0.8)
        assert ranking.specificity_at(counts, 0.8)[row] == pytest.approx(expected)


@given(class_examples())
def test_macro_figures_equal_scikit_learn(example):
    labels, probs = example
    expected = sk.roc_auc_score(labels, probs, multi_class="ovr", average="macro")
    assert ranking.macro_auroc(labels, probs) == pytest.approx(expected, abs=1e-9)
    truth = np.eye(probs.shape[1])[labels]
    expected = sk.average_precision_score(truth, probs, average="macro")
    assert ranking.macro_auprc(labels, probs) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("only", [0, 1])
def test_one_class_alone_has_no_auroc(only):
    labels, probs = np.full(4, only), np.array([0.1, 0.2, 0.3, 0.3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(ranking.auroc(labels, probs))
        assert np.isnan(ranking.sensitivity_at_specificity(labels, probs, 0.9))
        assert np.isnan(ranking.specificity_at_sensitivity(labels, probs, 0.9))
        assert np.isnan(ranking.macro_auroc(labels, probs))
        ranking.roc_curve(labels, probs)
        ranking.precision_recall_curve(labels, probs)
    assert np.isnan(ranking.auprc(labels, probs)) == (only == 0)


def test_constant_scores_are_chance():
    labels = np.array([0, 1, 0, 0])
    assert ranking.auroc(labels, np.full(4, 0.6)) == 0.5
    assert ranking.auprc(labels, np.full(4, 0.6)) == 0.25
    assert ranking.sensitivity_at_specificity(labels, np.full(4, 0.6), 0.9) == 0
    assert ranking.specificity_at_sensitivity(labels, np.full(4, 0.6), 0.9) == 0


def test_an_absent_class_is_left_out_of_the_macro_figure():
    labels = np.array([0, 1, 0, 1])
    probs = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.55, 0.4, 0.05]])
    each = ranking.one_vs_rest_auroc(labels, probs)
    assert np.isnan(each[2])
    assert ranking.macro_auroc(labels, probs) == pytest.approx((each[0] + each[1]) / 2)


def test_float32_ranks_as_given_and_logits_are_scores():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, 500), rng.normal(size=500).astype(np.float32)
    assert ranking.auroc(labels, logits) == ranking.auroc(labels, logits.astype(np.float64))
    assert ranking.auroc(labels, logits) == pytest.approx(sk.roc_auc_score(labels, logits))


@pytest.mark.parametrize(
    ("labels", "scores", "sentence"),
    [
        ([], [], "nothing to evaluate"),
        ([0, 1, 1], [0.1, np.nan, np.nan], "2 of 3 scores are NaN"),
        ([0, 1], [0.1, 0.2, 0.3], "2 labels but 3 scores"),
        ([0, 2], [0.1, 0.2], r"1 of 2 labels lie outside 0\.\.1"),
        ([0, -1], [0.1, 0.2], r"1 of 2 labels are unknown \(-1\)"),
        ([0, 0.5], [0.1, 0.2], "1 of 2 labels are not whole"),
        ([0, 1], [[0.1, 0.9], [0.2, 0.8]], "one score per example"),
        (["a", "b"], [0.1, 0.2], "class numbers"),
        ([0, 1], ["a", "b"], "numbers are expected"),
    ],
)
def test_bad_input_is_named(labels, scores, sentence):
    with pytest.raises(UserError, match=sentence):
        ranking.auroc(labels, scores)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1], "2 examples"),
        ([1, -1], "1 of 2 weights"),
        ([np.nan, 1], "1 of 2"),
        ([0, 0], "All weights are zero"),
    ],
)
def test_bad_weights_are_named(weights, sentence):
    with pytest.raises(UserError, match=sentence):
        ranking.auroc([0, 1], [0.1, 0.2], weights)


def test_a_target_outside_the_unit_interval_is_refused():
    with pytest.raises(UserError, match="choose a value from 0 to 1"):
        ranking.sensitivity_at_specificity([0, 1], [0.1, 0.2], 95)
    with pytest.raises(UserError, match="choose a value from 0 to 1"):
        ranking.specificity_at_sensitivity([0, 1], [0.1, 0.2], -0.1)
