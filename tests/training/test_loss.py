from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcam_jax.config.schema import LossConfig
from pcam_jax.training.loss import balanced_weights, log_probabilities, make_loss, predicted_class

RNG = np.random.default_rng(0)
SIGMOID = RNG.normal(0, 3, (7, 1)).astype(np.float32)
SOFTMAX = RNG.normal(0, 3, (7, 3)).astype(np.float32)
LABELS2 = np.array([0, 1, 1, 0, 1, 0, 0], np.int32)
LABELS3 = np.array([0, 1, 2, 0, 1, 2, 0], np.int32)
MIXED2 = RNG.dirichlet([1, 1], 7).astype(np.float32)
MIXED3 = RNG.dirichlet([1, 1, 1], 7).astype(np.float32)


def probs_of(logits: np.ndarray) -> np.ndarray:
    """The textbook formulas in float64."""
    wide = logits.astype(np.float64)
    if wide.shape[1] == 1:
        positive = 1 / (1 + np.exp(-wide[:, 0]))
        return np.stack([1 - positive, positive], axis=1)
    exponential = np.exp(wide)
    return exponential / exponential.sum(1, keepdims=True)


CASES = [(SIGMOID, LABELS2, 2), (SOFTMAX, LABELS3, 3), (SIGMOID, MIXED2, 2), (SOFTMAX, MIXED3, 3)]


@pytest.mark.parametrize(("logits", "targets", "classes"), CASES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [None, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_follow_their_formulas(
    logits: np.ndarray,
    targets: np.ndarray,
    classes: int,
    smoothing: float,
    gamma: float | None,
    weighted: bool,
) -> None:
    weights = tuple(np.linspace(0.5, 2, classes).tolist()) if weighted else None
    name = "cross_entropy" if gamma is None else "focal"
    config = LossConfig(name=name, focal_gamma=gamma or 0.0, label_smoothing=smoothing)
    found = jax.jit(make_loss(config, classes, weights))(logits, targets)

    target = np.eye(classes)[targets] if targets.ndim == 1 else targets.astype(np.float64)
    factor = 1.0 if weights is None else target @ np.array(weights)
    target = target * (1 - smoothing) + smoothing / classes
    probs = probs_of(logits)
    focus = (1 - probs) ** gamma if gamma is not None else 1.0
    expected = factor * (target * focus * -np.log(probs)).sum(1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@given(
    logit=st.floats(-1e4, 1e4, width=32),
    label=st.sampled_from([0, 1]),
    gamma=st.sampled_from([None, 0.0, 0.5, 1.0, 2.0, 5.0]),
)
def test_loss_and_gradient_are_finite_however_sure_the_net_is(
    logit: float, label: int, gamma: float | None
) -> None:
    config = LossConfig(name="cross_entropy" if gamma is None else "focal", focal_gamma=gamma or 0.0)
    loss = make_loss(config, 2)
    for logits in (np.array([[logit]], np.float32), np.array([[0, logit]], np.float32)):
        value, slope = jax.value_and_grad(lambda z: loss(z, jnp.array([label])).sum())(logits)
        assert np.isfinite(value)
        assert value >= 0
        assert np.isfinite(slope).all()


@given(st.floats(-50, 50, width=32))
def test_one_sigmoid_unit_equals_two_softmax_units(logit: float) -> None:
    one = log_probabilities(jnp.array([[logit]], jnp.float32))
    two = log_probabilities(jnp.array([[0.0, logit]], jnp.float32))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_give_float32_losses() -> None:
    loss = make_loss(LossConfig(), 2)(jnp.asarray(SIGMOID, jnp.bfloat16), LABELS2)
    assert loss.dtype == jnp.float32


def test_predicted_class() -> None:
    assert predicted_class(jnp.array([[-1.0], [0.0], [2.0]])).tolist() == [0, 1, 1]
    assert predicted_class(jnp.array([[1.0, 3.0, 2.0], [1.0, 1.0, 0.0]])).tolist() == [1, 0]


def test_balanced_weights_make_classes_count_alike() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = np.array(balanced_weights(labels, 3))
    totals = weights * np.bincount(labels)
    np.testing.assert_allclose(totals, totals[0])
    np.testing.assert_allclose(weights[labels].mean(), 1)
    assert np.isfinite(balanced_weights(np.array([0, 0]), 2)).all()
