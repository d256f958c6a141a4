"""How well scores rank the positives above the negatives: ROC and precision-recall, their areas and points.

Everything rests on one sort. `Ranking` sorts the scores once and then gives the cumulative counts of
positives and negatives above each distinct score under any number of weightings at a time; the areas are sums
over those counts. A bootstrap resample is such a weighting (how often each example was drawn), so point
estimates and resamples go through the same lines.

Sources: area under the ROC curve as the Mann-Whitney statistic with ties counted half (Hanley & McNeil 1982,
doi:10.1148/radiology.143.1.7063747); average precision as the step sum over recall, without interpolation
(scikit-learn's definition). A figure that does not exist, such as the AUROC of one class alone, is NaN.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_jax.metrics.inputs import (
    FloatArray,
    check_labels,
    check_predictions,
    check_ranking,
    check_weights,
)
from pcam_jax.runtime.errors import UserError

# a rate counts as reached when it is short by rounding only
RATE_TOLERANCE = 1e-12


class RocCurve(NamedTuple):
    """ROC points from (0, 0) to (1, 1), each `[D + 1] float64`, for D distinct scores.

    Examples with a score >= ``thresholds`` are called positive; the first threshold is infinite (nobody is).
    """

    false_positive_rate: FloatArray
    true_positive_rate: FloatArray
    thresholds: FloatArray


class PrecisionRecallCurve(NamedTuple):
    """Precision and recall by rising threshold, as scikit-learn orders them.

    ``precision`` and ``recall`` are `[D + 1] float64` and end with the point (1, 0), which has no threshold;
    ``thresholds`` is `[D] float64`.
    """

    precision: FloatArray
    recall: FloatArray
    thresholds: FloatArray


class RankCounts(NamedTuple):
    """Weight of the examples at or above each of D distinct scores, from high to low; all `[..., D] float64`.

    Attributes:
        found: positives (true positives).
        flagged: negatives (false positives).
        called: both.
        gained: positives at exactly that score, the steps of ``found``.
    """

    found: FloatArray
    flagged: FloatArray
    called: FloatArray
    gained: FloatArray


class Ranking:
    """Scores sorted once, from high to low.

    Attributes:
        thresholds: `[D] float64`, the distinct scores from high to low.
    """

    def __init__(self, positive: NDArray[np.bool_], scores: FloatArray) -> None:
        """Sort ``scores [N]`` of examples that are ``positive [N]`` or not."""
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        in_order = bool(np.all(order[1:] > order[:-1]))
        self._order = None if in_order else order  # a sorted input spares one gather per resample
        self._positive = positive[order].astype(np.float64)
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        self._ends = None if len(ends) == len(ranked) else ends
        self.thresholds = ranked[ends]

    def cumulate(self, weights: FloatArray) -> RankCounts:
        """Count the examples with a score at or above each threshold.

        Args:
            weights: `[..., N] float64` in the order of the examples.
        """
        ranked = weights if self._order is None else np.take(weights, self._order, axis=-1)
        gained = ranked * self._positive
        found, called = np.cumsum(gained, axis=-1), np.cumsum(ranked, axis=-1)
        if self._ends is not None:
            found, called = np.take(found, self._ends, axis=-1), np.take(called, self._ends, axis=-1)
            gained = np.diff(found, axis=-1, prepend=0.0)
        return RankCounts(found, called - found, called, gained)


def area_under_roc(counts: RankCounts) -> FloatArray:
    """Area under the ROC curve, `[...]`; NaN where a class has no weight."""
    found, flagged, _, gained = counts
    # a positive is outranked by the negatives above it and by half of those it is tied with
    outranked = _dot(gained, flagged) + _dot(gained[..., 1:], flagged[..., :-1])
    pairs = found[..., -1] * flagged[..., -1]
    return _share(pairs - outranked / 2, pairs, pairs)


def area_under_precision_recall(counts: RankCounts) -> FloatArray:
    """Average precision, sum of (recall_d - recall_{d-1}) * precision_d, `[...]`; NaN without positives."""
    found, _, called, gained = counts
    # a threshold above all weight has called nobody; its gain is zero, so any divisor serves
    precision = found / np.maximum(called, np.finfo(np.float64).tiny)
    return _share(_dot(gained, precision), found[..., -1], found[..., -1])


def sensitivity_at(counts: RankCounts, specificity: float) -> FloatArray:
    """Highest sensitivity among thresholds with at least that specificity, `[...]`.

    It is 0 where only calling nobody positive is specific enough, and NaN where a class has no weight.
    """
    positives, negatives = counts.found[..., -1], counts.flagged[..., -1]
    allowed = negatives * (1.0 - specificity + RATE_TOLERANCE)
    kept = _places(counts.flagged, allowed, "right")
    found = np.where(kept > 0, _at(counts.found, np.maximum(kept - 1, 0)), 0.0)
    return _share(found, positives, positives, negatives)


def specificity_at(counts: RankCounts, sensitivity: float) -> FloatArray:
    """Highest specificity among thresholds with at least that sensitivity, `[...]`.

    NaN where a class has no weight.
    """
    positives, negatives = counts.found[..., -1], counts.flagged[..., -1]
    needed = positives * (sensitivity - RATE_TOLERANCE)
    short = _places(counts.found, needed, "left")
    flagged = np.where(needed > 0, _at(counts.flagged, np.minimum(short, counts.found.shape[-1] - 1)), 0.0)
    return _share(negatives - flagged, negatives, positives, negatives)


def _dot(left: FloatArray, right: FloatArray) -> FloatArray:
    return np.einsum("...d,...d->...", left, right)


def _places(rising: FloatArray, values: FloatArray, side: Literal["left", "right"]) -> NDArray[np.int64]:
    rows = zip(rising.reshape(-1, rising.shape[-1]), values.reshape(-1), strict=True)
    return np.array([np.searchsorted(row, value, side) for row, value in rows]).reshape(values.shape)


def _at(counts: FloatArray, positions: NDArray[np.int64]) -> FloatArray:
    return np.take_along_axis(counts, positions[..., None], axis=-1)[..., 0]


def _share(part: FloatArray, whole: FloatArray, *needed: FloatArray) -> FloatArray:
    exists = np.logical_and.reduce([weight > 0 for weight in needed])
    return np.where(exists, part / np.where(exists, whole, 1.0), np.nan)


# --------------------------------------------------------------------------- for one set of examples


def auroc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve, equal to `sklearn.metrics.roc_auc_score`.

    Args:
        labels: `[N]` of 0 and 1.
        scores: `[N]`, probabilities or logits.
        weights: `[N]`, how much each example counts.

    Returns:
        The probability that a positive outranks a negative; NaN where one class is absent.

    Raises:
        UserError: empty input, NaN, lengths that differ, labels other than 0 and 1.
    """
    return float(area_under_roc(_ranked(labels, scores, weights)[1]))


def auprc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Average precision, equal to `sklearn.metrics.average_precision_score`; NaN without positives.

    Arguments and errors as `auroc`. Its value for a useless score is the prevalence, not one half.
    """
    return float(area_under_precision_recall(_ranked(labels, scores, weights)[1]))


def sensitivity_at_specificity(
    labels: ArrayLike, scores: ArrayLike, specificity: float, weights: ArrayLike | None = None
) -> float:
    """Highest sensitivity that some threshold reaches with at least ``specificity``; no interpolation.

    Arguments and errors as `auroc`; a target outside [0, 1] is a UserError too.
    """
    _check_rate(specificity, "specificity")
    return float(sensitivity_at(_ranked(labels, scores, weights)[1], specificity))


def specificity_at_sensitivity(
    labels: ArrayLike, scores: ArrayLike, sensitivity: float, weights: ArrayLike | None = None
) -> float:
    """Highest specificity that some threshold reaches with at least ``sensitivity``; no interpolation.

    Arguments and errors as `auroc`; a target outside [0, 1] is a UserError too.
    """
    _check_rate(sensitivity, "sensitivity")
    return float(specificity_at(_ranked(labels, scores, weights)[1], sensitivity))


def roc_curve(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> RocCurve:
    """All ROC points, as `sklearn.metrics.roc_curve(..., drop_intermediate=False)`.

    Arguments and errors as `auroc`. The rate of an absent class is NaN.
    """
    ranking, counts = _ranked(labels, scores, weights)
    with np.errstate(invalid="ignore"):
        return RocCurve(
            np.append(0.0, counts.flagged) / counts.flagged[-1],
            np.append(0.0, counts.found) / counts.found[-1],
            np.append(np.inf, ranking.thresholds),
        )


def precision_recall_curve(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None
) -> PrecisionRecallCurve:
    """All precision-recall points, as `sklearn.metrics.precision_recall_curve`.

    Arguments and errors as `auroc`. Without positives recall is NaN (scikit-learn says 1).
    """
    ranking, counts = _ranked(labels, scores, weights)
    precision = counts.found / np.maximum(counts.called, np.finfo(np.float64).tiny)
    with np.errstate(invalid="ignore"):
        recall = counts.found / counts.found[-1]
    return PrecisionRecallCurve(
        np.append(precision[::-1], 1.0), np.append(recall[::-1], 0.0), ranking.thresholds[::-1].copy()
    )


# ------------------------------------------------------------------------------ more than two classes


def one_vs_rest_auroc(labels: ArrayLike, probs: ArrayLike, weights: ArrayLike | None = None) -> FloatArray:
    """AUROC of each class against all others, `[K] float64`; NaN for classes that do not occur (or alone do).

    Args:
        labels: `[N]` class numbers.
        probs: `[N, K]`.
        weights: `[N]`, how much each example counts.

    Raises:
        UserError: as `check_predictions`.
    """
    return _one_vs_rest(area_under_roc, labels, probs, weights)


def one_vs_rest_auprc(labels: ArrayLike, probs: ArrayLike, weights: ArrayLike | None = None) -> FloatArray:
    """Average precision of each class against all others, `[K] float64`; else as `one_vs_rest_auroc`."""
    return _one_vs_rest(area_under_precision_recall, labels, probs, weights)


def macro_auroc(labels: ArrayLike, probs: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean one-vs-rest AUROC over the classes that occur, each counting the same.

    Equal to scikit-learn's `roc_auc_score(multi_class="ovr", average="macro")` where every class occurs.
    Arguments and errors as `one_vs_rest_auroc`; NaN where only one class occurs.
    """
    return nanmean(one_vs_rest_auroc(labels, probs, weights))


def macro_auprc(labels: ArrayLike, probs: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean one-vs-rest average precision over the classes that occur; else as `macro_auroc`."""
    return nanmean(one_vs_rest_auprc(labels, probs, weights))


def nanmean(values: FloatArray) -> float:
    """Mean of the values that exist; NaN, without a warning, where none does."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _one_vs_rest(area, labels, probs, weights) -> FloatArray:  # type: ignore[no-untyped-def]
    predictions = check_predictions(labels, probs)
    columns = predictions.probs
    if predictions.binary:
        columns = np.stack([1.0 - predictions.probs, predictions.probs], axis=1)
    checked = check_labels(labels, predictions.class_count)
    counted = check_weights(weights, len(checked))
    values = [
        float(area(Ranking(checked == number, columns[:, number]).cumulate(counted)))
        for number in range(predictions.class_count)
    ]
    return np.array(values)


def _ranked(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None) -> tuple[Ranking, RankCounts]:
    positive, values = check_ranking(labels, scores)
    ranking = Ranking(positive, values)
    return ranking, ranking.cumulate(check_weights(weights, len(values)))


def _check_rate(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"A target {name} of {value} is no share: choose a value from 0 to 1.")
