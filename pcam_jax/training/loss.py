"""Losses on logits, for one sigmoid unit or one softmax unit per class, with hard or mixed targets."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pcam_jax.config.schema import LossConfig


def make_loss(
    config: LossConfig, classes: int, class_weights: tuple[float, ...] | None = None
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Build the per-example loss.

    Cross-entropy, or the focal loss -(1 - p)^gamma log p (Lin et al. 2017, arXiv:1708.02002) with p the
    probability of the target; for mixed targets, its expectation over the target distribution. Label smoothing
    moves its share to the uniform distribution (Szegedy et al. 2016, arXiv:1512.00567).

    Args:
        config: which loss.
        classes: number of classes K.
        class_weights: one factor for each class, applied by the target's distribution; None is all ones.

    Returns:
        A function of logits ``[B, 1 or K] float32`` and targets, ``[B] int32`` labels or ``[B, K] float32``
        distributions, to losses ``[B] float32``.
    """

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        distribution = jax.nn.one_hot(targets, classes) if targets.ndim == 1 else targets
        weights = 1.0 if class_weights is None else distribution @ jnp.asarray(class_weights, jnp.float32)
        if config.label_smoothing:
            distribution = (1 - config.label_smoothing) * distribution + config.label_smoothing / classes
        log_probs = log_probabilities(logits)
        terms = -log_probs
        if config.name == "focal":
            # kept off zero, where the slope of a power below one is infinite
            terms = terms * jnp.maximum(-jnp.expm1(log_probs), 1e-7) ** config.focal_gamma
        return weights * jnp.sum(distribution * terms, axis=-1)

    return loss


def balanced_weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
    """Inverse class frequencies of labels ``[n]``, scaled so that a typical example weighs one.

    A class without examples counts as having one.
    """
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)
    return tuple((counts.sum() / (classes * counts)).tolist())


def log_probabilities(logits: jax.Array) -> jax.Array:
    """Log-probabilities ``[B, K] float32`` of logits ``[B, 1]`` (sigmoid, K = 2) or ``[B, K]`` (softmax)."""
    if logits.shape[-1] == 1:
        return jnp.concatenate([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=-1)
    return jax.nn.log_softmax(logits, axis=-1)


def predicted_class(logits: jax.Array) -> jax.Array:
    """Most probable class ``[B] int32`` of logits ``[B, 1 or K]``; two that are level count as class 1."""
    if logits.shape[-1] == 1:
        return (logits[:, 0] >= 0).astype(jnp.int32)
    if logits.shape[-1] == 2:
        return (logits[:, 1] >= logits[:, 0]).astype(jnp.int32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
