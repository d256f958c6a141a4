"""From logits to losses and classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

from pcam_jax.metrics.links import log_probabilities, mean_log_loss, most_probable
from pcam_jax.metrics.recalibration import apply_temperature
from pcam_jax.metrics.threshold import predicted_classes

logits = st.integers(1, 4).flatmap(
    lambda outputs: hnp.arrays(
        # eighths: level ones are common, and none is so near to another that a sigmoid rounds them together
        np.int64,
        st.tuples(st.integers(1, 8), st.just(outputs)),
        elements=st.integers(-240, 240),
    ).map(lambda eighths: eighths.astype(np.float32) / 8)
)


@given(logits)
def test_classes_are_those_of_the_probabilities_at_one_half(values):
    np.testing.assert_array_equal(most_probable(values), predicted_classes(apply_temperature(values, 1.0)))


def test_level_logits_are_called_positive():
    assert most_probable(np.zeros((1, 1))).tolist() == most_probable(np.zeros((1, 2))).tolist() == [1]
    assert most_probable(np.zeros((1, 3))).tolist() == [0]


@given(logits)
def test_log_probabilities_are_normalised(values):
    logs = log_probabilities(values)
    assert logs.shape == (len(values), max(2, values.shape[1]))
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1, rtol=1e-12)


def test_log_loss_of_huge_logits_is_finite():
    values, labels = np.array([[800.0], [-800.0], [0.0]]), np.array([0, 0, 1])
    assert mean_log_loss(values, labels) == pytest.approx((800 + np.log(2)) / 3)
    wide = np.concatenate([np.zeros((3, 1)), values], axis=1)
    assert mean_log_loss(wide, labels) == pytest.approx(
        -np.mean(special.log_softmax(wide, axis=1)[range(3), labels])
    )
