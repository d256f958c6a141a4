"""Figures of decisions: the confusion matrix, what follows from it, and the choice of its threshold.

The functions of a confusion matrix take any leading shape, `[..., K, K]`, so that a thousand resamples cost
one call. Row = true class, column = predicted class, as in scikit-learn. Where a figure divides nothing by
nothing: recall and specificity of a class without examples are NaN; the precision of a class that was never
predicted is 0 (scikit-learn's value); F1 is NaN only for a class neither present nor predicted; MCC is 0 when
everything was put into one class, and NaN when the labels hold only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_jax.metrics.inputs import (
    FloatArray,
    IntArray,
    Predictions,
    check_labels,
    check_predictions,
    check_weights,
)
from pcam_jax.metrics.ranking import RATE_TOLERANCE, Ranking
from pcam_jax.runtime.errors import UserError

THRESHOLD_RULES = ("youden", "sensitivity", "specificity", "cost")


def predicted_classes(probs: ArrayLike, threshold: float = 0.5) -> IntArray:
    """Turn probabilities into class numbers.

    Args:
        probs: `[N]`, class 1 where ``probs >= threshold``; or `[N, K]`, the class of the highest probability
            (the first of equals; the threshold plays no part).
        threshold: compared in float64, so that float32 probabilities are not rounded onto it.

    Returns:
        `[N] int64`.
    """
    values = np.asarray(probs, dtype=np.float64)
    if values.ndim == 1:
        return (values >= threshold).astype(np.int64)
    return values.argmax(axis=1)


def confusion_matrix(
    labels: ArrayLike, predicted: ArrayLike, class_count: int = 2, weights: ArrayLike | None = None
) -> FloatArray | IntArray:
    """Count examples by true class (row) and predicted class (column).

    Args:
        labels: `[N]` class numbers.
        predicted: `[N]` class numbers.
        class_count: K.
        weights: `[N]`; without them the matrix is `int64`.

    Returns:
        `[K, K] int64`, or `float64` with weights.

    Raises:
        UserError: empty, lengths that differ, labels or predictions outside the classes.
    """
    true = check_labels(labels, class_count)
    chosen = check_labels(predicted, class_count)
    if len(true) != len(chosen):
        raise UserError(
            f"There are {len(true)} labels but {len(chosen)} predictions: they must match by row."
        )
    counted = None if weights is None else check_weights(weights, len(true))
    cells = np.bincount(true * class_count + chosen, weights=counted, minlength=class_count**2)
    return cells.reshape(class_count, class_count)


# --------------------------------------------------------------------- from the matrix, `[..., K, K]`


def accuracy(matrix: ArrayLike) -> FloatArray:
    """Share of examples predicted right, `[...]`."""
    counts = _counts(matrix)
    return _ratio(_right(counts).sum(axis=-1), counts.sum(axis=(-2, -1)), np.nan)


def recall_by_class(matrix: ArrayLike) -> FloatArray:
    """Share of each class's examples that were found (sensitivity), `[..., K]`."""
    counts = _counts(matrix)
    return _ratio(_right(counts), counts.sum(axis=-1), np.nan)


def specificity_by_class(matrix: ArrayLike) -> FloatArray:
    """Share of the other classes' examples that were not given to the class, `[..., K]`."""
    counts = _counts(matrix)
    support, called = counts.sum(axis=-1), counts.sum(axis=-2)
    others = counts.sum(axis=(-2, -1))[..., None] - support
    return _ratio(others - (called - _right(counts)), others, np.nan)


def precision_by_class(matrix: ArrayLike) -> FloatArray:
    """Share of the examples given to each class that belong there, `[..., K]`."""
    counts = _counts(matrix)
    return _ratio(_right(counts), counts.sum(axis=-2), 0.0)


def f1_by_class(matrix: ArrayLike) -> FloatArray:
    """Harmonic mean of precision and recall, `[..., K]`."""
    counts = _counts(matrix)
    return _ratio(2 * _right(counts), counts.sum(axis=-1) + counts.sum(axis=-2), np.nan)


def balanced_accuracy(matrix: ArrayLike) -> FloatArray:
    """Mean recall over the classes that occur, `[...]`."""
    return _mean_known(recall_by_class(matrix))


def macro_precision(matrix: ArrayLike) -> FloatArray:
    """Mean precision over the classes that occur or were predicted, `[...]`."""
    return _mean_known(np.where(np.isnan(f1_by_class(matrix)), np.nan, precision_by_class(matrix)))


def macro_f1(matrix: ArrayLike) -> FloatArray:
    """Mean F1 over the classes that occur or were predicted, `[...]`."""
    return _mean_known(f1_by_class(matrix))


def mcc(matrix: ArrayLike) -> FloatArray:
    """Matthews correlation, `[...]`; for K classes as Gorodkin (doi:10.1016/j.compbiolchem.2004.09.006)."""
    counts = _counts(matrix)
    support, called = counts.sum(axis=-1), counts.sum(axis=-2)
    total = support.sum(axis=-1)
    covariance = _right(counts).sum(axis=-1) * total - (support * called).sum(axis=-1)
    spread_true = total**2 - (support**2).sum(axis=-1)
    spread_called = total**2 - (called**2).sum(axis=-1)
    rounding = RATE_TOLERANCE * total**2
    spread = np.where((spread_true > rounding) & (spread_called > rounding), spread_true * spread_called, 0.0)
    return np.where(spread_true > rounding, _ratio(covariance, np.sqrt(spread), 0.0), np.nan)


# --------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class ClassRow:
    """One class in the per-class report; ``support`` is its number of examples."""

    name: str
    precision: float
    recall: float
    specificity: float
    f1: float
    support: float


def class_report(matrix: ArrayLike, class_names: Sequence[str]) -> list[ClassRow]:
    """Precision, recall, specificity, F1 and support of each class of a `[K, K]` confusion matrix.

    Raises:
        UserError: another number of names than of classes.
    """
    counts = _counts(matrix)
    if len(class_names) != len(counts):
        raise UserError(
            f"There are {len(class_names)} class names for {len(counts)} classes: name each class."
        )
    columns = (
        precision_by_class(counts),
        recall_by_class(counts),
        specificity_by_class(counts),
        f1_by_class(counts),
        counts.sum(axis=-1),
    )
    return [
        ClassRow(str(name), *(float(column[number]) for column in columns))
        for number, name in enumerate(class_names)
    ]


def majority_baseline(labels: ArrayLike, class_count: int = 2) -> tuple[int, float]:
    """Return the most frequent class (the first of equals) and the accuracy of always naming it.

    Raises:
        UserError: as `check_labels`.
    """
    counts = np.bincount(check_labels(labels, class_count), minlength=class_count)
    return int(counts.argmax()), float(counts.max() / counts.sum())


# ----------------------------------------------------------------------------- choosing the threshold


@dataclass(frozen=True)
class ThresholdChoice:
    """A threshold, the rule that chose it, and what it did on the examples it was chosen on.

    Attributes:
        threshold: call an example positive when its probability is >= this.
        rule: one of `THRESHOLD_RULES`, or ``fixed`` (`describe_threshold`).
        target: the wanted sensitivity or specificity, or the cost of a missed positive in false alarms; None
            for ``youden`` and ``fixed``.
        sensitivity: share of positives found.
        specificity: share of negatives left alone.
        positives: number of positive examples it was chosen on.
        negatives: number of negative ones.
    """

    threshold: float
    rule: str
    target: float | None
    sensitivity: float
    specificity: float
    positives: int
    negatives: int

    @property
    def missed_per_1000(self) -> int:
        """Positives missed of every 1,000, rounded."""
        return round(1000 * (1 - self.sensitivity))

    @property
    def flagged_per_1000(self) -> int:
        """Negatives flagged of every 1,000, rounded."""
        return round(1000 * (1 - self.specificity))

    def sentence(self, class_names: Sequence[str] = ("normal", "tumour"), noun: str = "patches") -> str:
        """Say what the threshold means: "of 1,000 tumour patches, 38 missed; ..."."""
        negative, positive = class_names
        return (
            f"At threshold {self.threshold:.4g}: of 1,000 {positive} {noun}, {self.missed_per_1000} missed; "
            f"of 1,000 {negative} ones, {self.flagged_per_1000} flagged."
        )


def choose_threshold(
    labels: ArrayLike, probs: ArrayLike, rule: str = "youden", target: float | None = None
) -> ThresholdChoice:
    """Choose the threshold of a two-class model; do so on validation examples, never on test ones.

    Rules, with ties settled for fewer missed positives, then fewer false alarms:
        ``youden``: largest sensitivity + specificity - 1 (Youden 1950).
        ``sensitivity``: largest specificity with a sensitivity of at least ``target``.
        ``specificity``: largest sensitivity with a specificity of at least ``target``.
        ``cost``: smallest total cost on these examples, a missed positive costing ``target`` false alarms.

    The threshold lies midway between the lowest probability it flags and the next one below, so that rounding
    in another batch size or precision does not carry an example across.

    Args:
        labels: `[N]` of 0 and 1, both present.
        probs: `[N]` (or `[N, 2]`) probabilities.
        rule: one of `THRESHOLD_RULES`.
        target: needed by every rule but ``youden``.

    Raises:
        UserError: bad predictions, one class only, more than two classes, an unknown rule, a missing or
            senseless target.
    """
    predictions = check_predictions(labels, probs)
    wanted = _checked_target(predictions, rule, target)
    ranking = Ranking(predictions.labels == 1, predictions.probs)
    counts = ranking.cumulate(np.ones(len(predictions)))
    found, flagged = np.append(0.0, counts.found), np.append(0.0, counts.flagged)
    sensitivity, false_rate = found / found[-1], flagged / flagged[-1]
    if rule == "youden":
        merit = sensitivity - false_rate
    elif rule == "sensitivity":
        merit = np.where(sensitivity >= wanted - RATE_TOLERANCE, -false_rate, -np.inf)
    elif rule == "specificity":
        merit = np.where(1 - false_rate >= wanted - RATE_TOLERANCE, sensitivity, -np.inf)
    else:
        merit = -(wanted * (found[-1] - found) + flagged)
    best = merit >= merit.max() - RATE_TOLERANCE * max(1.0, abs(merit.max()))
    best &= found == found[best].max()
    chosen = int(np.flatnonzero(best)[0])
    return ThresholdChoice(
        threshold=_threshold_between(ranking.thresholds, chosen),
        rule=rule,
        target=None if rule == "youden" else wanted,
        sensitivity=float(sensitivity[chosen]),
        specificity=float(1 - false_rate[chosen]),
        positives=int(found[-1]),
        negatives=int(flagged[-1]),
    )


def describe_threshold(labels: ArrayLike, probs: ArrayLike, threshold: float) -> ThresholdChoice:
    """Say what a threshold that nobody chose by a rule does on examples of both classes.

    Args:
        labels: `[N]` of 0 and 1, both present.
        probs: `[N]` (or `[N, 2]`) probabilities.
        threshold: from 0 to 1.

    Raises:
        UserError: bad predictions, one class only, more than two classes, or a threshold outside [0, 1].
    """
    predictions = check_predictions(labels, probs)
    _checked_target(predictions, "youden", None)
    if not 0 <= threshold <= 1 + 1e-6:  # one that flags nobody lies just above 1
        raise UserError(f"A threshold of {threshold} decides nothing: choose a probability from 0 to 1.")
    matrix = confusion_matrix(predictions.labels, predicted_classes(predictions.probs, threshold))
    return ThresholdChoice(
        threshold=float(threshold),
        rule="fixed",
        target=None,
        sensitivity=float(recall_by_class(matrix)[1]),
        specificity=float(recall_by_class(matrix)[0]),
        positives=int(matrix[1].sum()),
        negatives=int(matrix[0].sum()),
    )


def _checked_target(predictions: Predictions, rule: str, target: float | None) -> float:
    if not predictions.binary:
        raise UserError(
            f"A threshold is chosen for two classes, but there are {predictions.class_count}: the highest "
            "probability decides."
        )
    if rule not in THRESHOLD_RULES:
        raise UserError(f"Unknown threshold rule {rule!r}: choose one of {', '.join(THRESHOLD_RULES)}.")
    if rule in ("sensitivity", "specificity") and not (target is not None and 0 <= target <= 1):
        raise UserError(f"The threshold rule {rule!r} needs a target from 0 to 1, not {target}.")
    if rule == "cost" and not (target is not None and 0 < target < np.inf):
        raise UserError(
            f"The threshold rule 'cost' needs what a missed positive costs in false alarms, not {target}."
        )
    positives = int(predictions.labels.sum())
    if positives in (0, len(predictions)):
        raise UserError(
            f"All {len(predictions)} examples are of class {predictions.labels[0]}: choosing a threshold "
            "needs examples of both classes."
        )
    return float("nan") if target is None else float(target)


def _threshold_between(distinct: FloatArray, flagged_count: int) -> float:
    """Return the threshold that flags the ``flagged_count`` highest of the distinct probabilities."""
    if flagged_count == len(distinct):
        return 0.0
    below = float(distinct[flagged_count])
    if flagged_count:
        above = float(distinct[flagged_count - 1])
    else:
        above = 1.0 if below < 1 else float(np.nextafter(np.float32(1), np.float32(2)))
    midway = below + (above - below) / 2
    # a consumer may compare in float32: the threshold must not round onto the value it excludes
    return midway if np.float32(midway) > np.float32(below) else above


def _counts(matrix: ArrayLike) -> FloatArray:
    return np.asarray(matrix, dtype=np.float64)


def _right(counts: FloatArray) -> FloatArray:
    return np.diagonal(counts, axis1=-2, axis2=-1)


def _ratio(part: FloatArray, whole: FloatArray, empty: float) -> FloatArray:
    exists = whole > 0
    return np.where(exists, part / np.where(exists, whole, 1.0), empty)


def _mean_known(values: FloatArray) -> FloatArray:
    known: NDArray[np.bool_] = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1), np.nan)
