"""Figures per group equal the figures of that group alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_examples import binary_examples, class_examples

from pcam_jax.metrics.calibration import brier, nll
from pcam_jax.metrics.groups import figures_by_group
from pcam_jax.metrics.ranking import auroc
from pcam_jax.metrics.threshold import accuracy, confusion_matrix, predicted_classes, recall_by_class
from pcam_jax.runtime.errors import UserError


@given(st.one_of(binary_examples(), class_examples()), st.integers(0, 2**32))
def test_each_row_is_its_group_alone(example, seed):
    labels, probs = example
    groups = np.random.default_rng(seed).choice(["s1", "s10", "s2", ""], size=len(labels))
    rows = figures_by_group(labels, probs, groups, threshold=0.3)
    assert [row.group for row in rows] == sorted(set(groups) - {""})
    for row in rows:
        mine = groups == row.group
        classes = 2 if probs.ndim == 1 else probs.shape[1]
        matrix = confusion_matrix(labels[mine], predicted_classes(probs[mine], 0.3), classes)
        assert row.count == mine.sum()
        assert row.class_counts == tuple(matrix.sum(axis=1))
        assert row.predicted_counts == tuple(matrix.sum(axis=0))
        assert row.accuracy == pytest.approx(float(accuracy(matrix)))
        assert row.nll == pytest.approx(nll(labels[mine], probs[mine]))
        assert row.brier == pytest.approx(brier(labels[mine], probs[mine]))
        if classes > 2:
            assert np.isnan([row.auroc, row.sensitivity, row.specificity]).all()
            continue
        expected = (*recall_by_class(matrix)[::-1], auroc(labels[mine], probs[mine]))
        assert (row.sensitivity, row.specificity, row.auroc) == pytest.approx(expected, nan_ok=True)


def test_groups_may_be_numbers_or_missing():
    rows = figures_by_group([0, 1, 1], [0.1, 0.9, 0.2], np.array([7, 7, 5]))
    assert [(row.group, row.count) for row in rows] == [("5", 1), ("7", 2)]
    assert figures_by_group([0, 1], [0.1, 0.9], [None, float("nan")]) == []


def test_groups_of_another_length_are_refused():
    with pytest.raises(UserError, match="there are 2 examples"):
        figures_by_group([0, 1], [0.1, 0.9], ["a"])
