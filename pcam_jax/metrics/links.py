"""From logits to losses and classes, in float64 so that no figure depends on the device's rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities ``[N, K] float64`` of logits ``[N, 1]`` (sigmoid, K = 2) or ``[N, K]`` (softmax)."""
    logits = np.asarray(logits, np.float64)
    if logits.shape[1] == 1:
        return -np.logaddexp(0.0, np.concatenate([logits, -logits], axis=1))
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def mean_log_loss(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Mean negative log-likelihood of labels ``[N]`` under logits ``[N, 1 or K]``, in nats."""
    return float(-np.mean(np.take_along_axis(log_probabilities(logits), labels[:, None].astype(np.int64), 1)))


def most_probable(logits: NDArray[np.floating]) -> NDArray[np.int64]:
    """The class that logits ``[N, 1 or K]`` favour, ``[N] int64``.

    Two classes that are exactly level count as class 1, as a probability of .5 does at the threshold .5; of more
    classes the first of equals.
    """
    logits = np.asarray(logits)
    if logits.shape[1] == 1:
        return (logits[:, 0] >= 0).astype(np.int64)
    if logits.shape[1] == 2:
        return (logits[:, 1] >= logits[:, 0]).astype(np.int64)
    return np.argmax(logits, axis=1)
