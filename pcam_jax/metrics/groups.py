"""Figures per group (slide, patient): a good mean can hide a slide on which the model fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pcam_jax.metrics.calibration import brier_terms, nll_terms
from pcam_jax.metrics.inputs import FloatArray, Predictions, check_predictions, group_names
from pcam_jax.metrics.ranking import Ranking, area_under_roc
from pcam_jax.metrics.threshold import predicted_classes


@dataclass(frozen=True)
class GroupRow:
    """Figures of one group.

    Attributes:
        group: its name.
        count: number of its examples.
        class_counts: examples by true class.
        predicted_counts: examples by predicted class.
        accuracy: share predicted right.
        sensitivity: share of class 1 found; NaN without any, or with more than two classes.
        specificity: share of class 0 left alone; NaN without any, or with more than two classes.
        auroc: NaN where the group has one class only, or with more than two classes.
        nll: mean negative log-likelihood, nats.
        brier: mean squared error of the probabilities.
    """

    group: str
    count: int
    class_counts: tuple[int, ...]
    predicted_counts: tuple[int, ...]
    accuracy: float
    sensitivity: float
    specificity: float
    auroc: float
    nll: float
    brier: float


def figures_by_group(
    labels: ArrayLike, probs: ArrayLike, groups: ArrayLike, threshold: float = 0.5
) -> list[GroupRow]:
    """Compute the figures of each group, ordered by name; examples of unknown group ("") have no row.

    Args:
        labels: `[N]` class numbers.
        probs: `[N]`, `[N, 2]` or `[N, K]`.
        groups: names `[N]`.
        threshold: of two classes.

    Raises:
        UserError: as `check_predictions`; another number of groups than of labels.
    """
    predictions = check_predictions(labels, probs)
    names = group_names(groups, len(predictions))
    order = np.argsort(names, kind="stable")
    order = order[names[order] != ""]
    if not len(order):
        return []
    ordered = names[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    return _rows(predictions.take(order), ordered[starts].tolist(), starts, threshold)


def _rows(
    predictions: Predictions, names: Sequence[str], starts: np.ndarray, threshold: float
) -> list[GroupRow]:
    """Rows of groups that lie one after the other, each from its start on."""
    classes = np.arange(predictions.class_count)
    predicted = predicted_classes(predictions.probs, threshold)
    counts = np.diff(np.append(starts, len(predictions)))
    of_class = np.add.reduceat(predictions.labels[:, None] == classes, starts, axis=0, dtype=np.int64)
    of_predicted = np.add.reduceat(predicted[:, None] == classes, starts, axis=0, dtype=np.int64)
    right = predicted == predictions.labels
    right_of_class = np.add.reduceat(
        (predictions.labels[:, None] == classes) & right[:, None], starts, axis=0, dtype=np.int64
    )
    with np.errstate(invalid="ignore"):
        recall = right_of_class / of_class
    if not predictions.binary:
        recall = np.full((len(starts), 2), np.nan)
    losses = np.add.reduceat(nll_terms(predictions), starts) / counts
    errors = np.add.reduceat(brier_terms(predictions), starts) / counts
    return [
        GroupRow(
            group=name,
            count=int(counts[row]),
            class_counts=tuple(of_class[row].tolist()),
            predicted_counts=tuple(of_predicted[row].tolist()),
            accuracy=float(right_of_class[row].sum() / counts[row]),
            sensitivity=float(recall[row, 1]),
            specificity=float(recall[row, 0]),
            auroc=_auroc(predictions, starts[row], starts[row] + counts[row], of_class[row]),
            nll=float(losses[row]),
            brier=float(errors[row]),
        )
        for row, name in enumerate(names)
    ]


def _auroc(predictions: Predictions, start: int, stop: int, class_counts: FloatArray) -> float:
    if not predictions.binary or not class_counts.all():
        return float("nan")
    part = slice(start, stop)
    ranking = Ranking(predictions.labels[part] == 1, predictions.probs[part])
    return float(area_under_roc(ranking.cumulate(np.ones(stop - start))))
