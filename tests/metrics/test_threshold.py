"""Decision figures against scikit-learn, and the choice of a threshold against a search over all of them."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from metric_examples import binary_examples
from sklearn import metrics as sk

from pcam_jax.metrics import threshold as th
from pcam_jax.runtime.errors import UserError


@st.composite
def decisions(draw):
    classes = draw(st.integers(2, 5))
    count = draw(st.integers(classes, 60))
    labels = draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    labels[:classes] = np.arange(classes)
    return labels, draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1))), classes


@settings(max_examples=50)  # scikit-learn checks its arguments slowly
@given(decisions())
def test_figures_equal_scikit_learn(example):
    labels, predicted, classes = example
    matrix = th.confusion_matrix(labels, predicted, classes)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(labels, predicted))
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, predicted, zero_division=0)
    np.testing.assert_allclose(th.precision_by_class(matrix), precision, atol=1e-12)
    np.testing.assert_allclose(th.recall_by_class(matrix), recall, atol=1e-12)
    np.testing.assert_allclose(th.f1_by_class(matrix), f1, atol=1e-12)
    expected = [sk.recall_score(labels != number, predicted != number) for number in range(classes)]
    np.testing.assert_allclose(th.specificity_by_class(matrix), expected, atol=1e-12)
    assert th.accuracy(matrix) == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-12)
    assert th.balanced_accuracy(matrix) == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert th.mcc(matrix) == pytest.approx(sk.matthews_corrcoef(labels, predicted), abs=1e-12)
    assert th.macro_precision(matrix) == pytest.approx(precision.mean())
    assert th.macro_f1(matrix) == pytest.approx(f1.mean())
    rows = th.class_report(matrix, [f"class {number}" for number in range(classes)])
    assert [row.support for row in rows] == list(support)
    assert [row.f1 for row in rows] == pytest.approx(list(f1))
    assert rows[1].name == "class 1"


@settings(max_examples=50)
@given(decisions(), st.integers(0, 2**32))
def test_leading_axes_and_weights(example, seed):
    labels, predicted, classes = example
    weights = np.random.default_rng(seed).integers(1, 9, (2, len(labels))) / 4  # sums without rounding
    matrices = np.stack([th.confusion_matrix(labels, predicted, classes, row) for row in weights])
    for number, row in enumerate(weights):
        expected = sk.confusion_matrix(labels, predicted, sample_weight=row)
        np.testing.assert_allclose(matrices[number], expected)
        expected = sk.matthews_corrcoef(labels, predicted, sample_weight=row)
        assert th.mcc(matrices)[number] == pytest.approx(expected, abs=1e-9)
        expected = sk.f1_score(labels, predicted, average="macro", sample_weight=row)
        assert th.macro_f1(matrices)[number] == pytest.approx(expected, abs=1e-9)


def test_what_divides_nothing_by_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        never_called = th.confusion_matrix([0, 0, 1], [0, 0, 0])
        assert th.precision_by_class(never_called)[1] == 0
        assert th.f1_by_class(never_called)[1] == 0
        assert th.mcc(never_called) == 0
        absent = th.confusion_matrix([0, 0, 0], [0, 0, 1])
        assert np.isnan(th.recall_by_class(absent)[1])
        assert np.isnan(th.specificity_by_class(absent)[0])
        assert np.isnan(th.mcc(absent))
        assert th.balanced_accuracy(absent) == pytest.approx(2 / 3)
        nowhere = th.confusion_matrix([0, 1], [0, 1], 3)
        assert np.isnan(th.f1_by_class(nowhere)[2])
        assert th.macro_f1(nowhere) == th.macro_precision(nowhere) == 1


def test_decisions_include_the_threshold_itself_in_float64():
    np.testing.assert_array_equal(th.predicted_classes([0.4, 0.5, 0.6]), [0, 1, 1])
    np.testing.assert_array_equal(th.predicted_classes([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]), [0, 2])
    below = np.float32(0.3)  # 0.30000001192...
    assert th.predicted_classes(np.array([below]), 0.3)[0] == 1
    assert th.predicted_classes(np.array([below]), 0.30000001195)[0] == 0


def test_majority_baseline():
    assert th.majority_baseline([0, 1, 1, 1]) == (1, 0.75)
    assert th.majority_baseline([2, 2, 0], 3) == (2, pytest.approx(2 / 3))


def outcomes(labels, probs, threshold):
    called = probs >= threshold
    return np.sum(called & (labels == 1)), np.sum(called & (labels == 0))


@given(
    binary_examples(),
    st.sampled_from(
        [("youden", None)]
        + [(rule, target) for rule in ("sensitivity", "specificity") for target in (0.0, 0.5, 0.8, 0.95, 1.0)]
        + [("cost", target) for target in (0.1, 1.0, 7.0)]
    ),
)
def test_the_threshold_is_the_best_there_is(example, rule_and_target):
    labels, probs = example
    rule, target = rule_and_target
    choice = th.choose_threshold(labels, probs, rule, target)
    positives, negatives = int(labels.sum()), int((labels == 0).sum())

    def merit(threshold):
        found, flagged = outcomes(labels, probs, threshold)
        sensitivity, specificity = found / positives, 1 - flagged / negatives
        return {
            "youden": sensitivity + specificity,
            "sensitivity": specificity if sensitivity >= (target or 0) - 1e-12 else -np.inf,
            "specificity": sensitivity if specificity >= (target or 0) - 1e-12 else -np.inf,
            "cost": -((target or 0) * (positives - found) + flagged),
        }[rule]

    candidates = [*np.unique(probs), 2.0]
    assert merit(choice.threshold) == pytest.approx(max(map(merit, candidates)))
    found, flagged = outcomes(labels, probs, choice.threshold)
    assert choice.sensitivity == pytest.approx(found / positives)
    assert choice.specificity == pytest.approx(1 - flagged / negatives)
    assert (choice.positives, choice.negatives) == (positives, negatives)
    equals = [
        outcomes(labels, probs, one) for one in candidates if merit(one) >= merit(choice.threshold) - 1e-12
    ]
    assert found == max(pair[0] for pair in equals)


@given(binary_examples(dtype=np.float32))
def test_a_float32_comparison_decides_the_same(example):
    labels, probs = example
    choice = th.choose_threshold(labels, probs)
    np.testing.assert_array_equal(
        probs >= np.float32(choice.threshold), th.predicted_classes(probs, choice.threshold) == 1
    )


def test_neighbouring_float32_values_stay_apart():
    low = np.float32(0.25)
    high = np.nextafter(low, np.float32(1))
    choice = th.choose_threshold([0, 1], np.array([low, high]))
    assert np.float32(choice.threshold) == high
    assert (choice.sensitivity, choice.specificity) == (1, 1)


def test_flagging_nobody_is_possible_even_at_a_certain_probability():
    probs = np.array([1.0, 0.5], np.float32)
    choice = th.choose_threshold([0, 1], probs, "specificity", 1.0)
    assert (choice.sensitivity, choice.specificity) == (0, 1)
    assert not np.any(probs >= np.float32(choice.threshold))


def test_the_threshold_lies_midway_and_says_what_it_means():
    labels = np.repeat([0, 1], 1000)
    probs = np.concatenate(
        [np.where(np.arange(1000) < 61, 0.95, 0.2), np.where(np.arange(1000) < 38, 0.1, 0.9)]
    )
    choice = th.choose_threshold(labels, probs)
    assert choice.threshold == pytest.approx(0.55)
    assert choice.sentence() == (
        "At threshold 0.55: of 1,000 tumour patches, 38 missed; of 1,000 normal ones, 61 flagged."
    )
    assert choice.sentence(("benign", "malignant"), "photographs").endswith(
        "of 1,000 malignant photographs, 38 missed; of 1,000 benign ones, 61 flagged."
    )


@pytest.mark.parametrize(
    ("labels", "rule", "target", "sentence"),
    [
        ([1, 1], "youden", None, "All 2 examples are of class 1"),
        ([0, 1], "best", None, "choose one of youden"),
        ([0, 1], "sensitivity", None, "needs a target from 0 to 1"),
        ([0, 1], "specificity", 95, "needs a target from 0 to 1, not 95"),
        ([0, 1], "cost", 0, "costs in false alarms"),
        ([0, 1], "cost", None, "costs in false alarms"),
    ],
)
def test_a_bad_choice_is_refused(labels, rule, target, sentence):
    with pytest.raises(UserError, match=sentence):
        th.choose_threshold(labels, [0.2, 0.3], rule, target)


def test_more_than_two_classes_have_no_threshold():
    with pytest.raises(UserError, match="there are 3"):
        th.choose_threshold([0, 1], [[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])


def test_bad_matrices_and_names_are_refused():
    with pytest.raises(UserError, match="2 labels but 3 predictions"):
        th.confusion_matrix([0, 1], [0, 1, 1])
    with pytest.raises(UserError, match="1 of 2 labels lie outside"):
        th.confusion_matrix([0, 1], [0, 2])
    with pytest.raises(UserError, match="1 class names for 2 classes"):
        th.class_report([[1, 0], [0, 1]], ["normal"])


@given(binary_examples(), st.floats(0, 1))
def test_a_threshold_is_described_as_scikit_learn_counts(example, threshold):
    labels, probs = example
    described = th.describe_threshold(labels, probs, threshold)
    called = probs >= threshold
    assert described.sensitivity == pytest.approx(sk.recall_score(labels, called))
    assert described.specificity == pytest.approx(sk.recall_score(labels, called, pos_label=0))
    assert (described.positives, described.negatives) == (labels.sum(), (1 - labels).sum())
    assert described.rule == "fixed"


def test_a_chosen_threshold_is_described_as_it_was_chosen():
    labels, probs = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.6, 0.4, 0.8, 0.9])
    choice = th.choose_threshold(labels, probs, "sensitivity", 1.0)
    assert th.describe_threshold(labels, probs, choice.threshold).sentence() == choice.sentence()
    with pytest.raises(UserError, match="decides nothing"):
        th.describe_threshold(labels, probs, 1.5)
    with pytest.raises(UserError, match="both classes"):
        th.describe_threshold(labels[:2], probs[:2], 0.5)
