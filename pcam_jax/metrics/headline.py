"""All headline figures of one set of predictions, under any number of weightings at a time.

With weights of one they are the figures of the set; with the counts of a bootstrap draw, those of the
resample.
"""

from __future__ import annotations

import numpy as np

from pcam_jax.metrics import ranking
from pcam_jax.metrics import threshold as decisions
from pcam_jax.metrics.calibration import DEFAULT_BINS, brier_terms, calibration_bins, nll_terms
from pcam_jax.metrics.inputs import FloatArray, Predictions

HELD_RATE = 0.95  # the specificity at which sensitivity is reported, and the reverse

BINARY_METRICS = (
    "auroc",
    "auprc",
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "precision",
    "f1",
    "mcc",
    "sensitivity_at_specificity_95",
    "specificity_at_sensitivity_95",
    "nll",
    "brier",
    "ece",
    "ece_equal_mass",
)
MULTICLASS_METRICS = (
    "auroc",
    "auprc",
    "accuracy",
    "balanced_accuracy",
    "precision",
    "f1",
    "mcc",
    "nll",
    "brier",
    "ece",
    "ece_equal_mass",
)


class Headline:
    """Everything that can be prepared once, so that a weighting costs a few passes over the examples.

    With two classes, sensitivity, precision and F1 are those of class 1 at the threshold. With more, AUROC,
    AUPRC, precision and F1 are means over classes (macro, one versus rest).

    Attributes:
        names: the figures, in the order of a table.
    """

    def __init__(self, predictions: Predictions, threshold: float = 0.5, bins: int = DEFAULT_BINS) -> None:
        """Sort and classify ``predictions``; ``threshold`` decides between two classes."""
        self.names = BINARY_METRICS if predictions.binary else MULTICLASS_METRICS
        self._binary = predictions.binary
        self._classes = predictions.class_count
        self._cells = predictions.labels * self._classes + decisions.predicted_classes(
            predictions.probs, threshold
        )
        self._occurs = np.bincount(predictions.labels, minlength=self._classes) > 0
        self._terms = np.stack([nll_terms(predictions), brier_terms(predictions)], axis=1)
        self._bins = calibration_bins(predictions, bins)
        if self._binary:
            self._rankings = [ranking.Ranking(predictions.labels == 1, predictions.probs)]
        else:
            self._rankings = [
                ranking.Ranking(predictions.labels == number, predictions.probs[:, number])
                for number in np.flatnonzero(self._occurs)
            ]

    def __call__(self, weights: FloatArray) -> dict[str, FloatArray]:
        """Compute every figure for each row of ``weights [R, N]``.

        Returns:
            one `[R] float64` per name. A row in which a class that occurs in the labels weighs nothing is NaN
            throughout: it tells of another problem than the one at hand.
        """
        matrices = self.confusion_matrices(weights)
        total = matrices.sum(axis=(-2, -1))
        figures = self._ranked(weights) | self._decided(matrices)
        proper = weights @ self._terms
        with np.errstate(invalid="ignore"):  # a row without any weight, made NaN below
            figures["nll"], figures["brier"] = proper[:, 0] / total, proper[:, 1] / total
            figures["ece"], figures["ece_equal_mass"] = self._bins.errors(weights)
        complete = np.all(matrices.sum(axis=-1)[:, self._occurs] > 0, axis=-1)
        return {name: np.where(complete, figures[name], np.nan) for name in self.names}

    def confusion_matrices(self, weights: FloatArray) -> FloatArray:
        """Confusion matrix of each row of ``weights [R, N]``, `[R, K, K] float64`."""
        rows, cells = len(weights), self._classes**2
        places = self._cells + cells * np.arange(rows)[:, None] if rows > 1 else self._cells
        counts = np.bincount(places.ravel(), weights=weights.ravel(), minlength=rows * cells)
        return counts.astype(np.float64, copy=False).reshape(rows, self._classes, self._classes)

    def _ranked(self, weights: FloatArray) -> dict[str, FloatArray]:
        figures: dict[str, FloatArray] = {}
        roc_areas, precision_areas = [], []
        for one in self._rankings:
            counts = one.cumulate(weights)
            roc_areas.append(ranking.area_under_roc(counts))
            precision_areas.append(ranking.area_under_precision_recall(counts))
            if self._binary:
                figures["sensitivity_at_specificity_95"] = ranking.sensitivity_at(counts, HELD_RATE)
                figures["specificity_at_sensitivity_95"] = ranking.specificity_at(counts, HELD_RATE)
        figures["auroc"] = np.mean(roc_areas, axis=0)
        figures["auprc"] = np.mean(precision_areas, axis=0)
        return figures

    def _decided(self, matrices: FloatArray) -> dict[str, FloatArray]:
        figures = {
            "accuracy": decisions.accuracy(matrices),
            "balanced_accuracy": decisions.balanced_accuracy(matrices),
            "mcc": decisions.mcc(matrices),
        }
        if not self._binary:
            return figures | {
                "precision": decisions.macro_precision(matrices),
                "f1": decisions.macro_f1(matrices),
            }
        return figures | {
            "sensitivity": decisions.recall_by_class(matrices)[..., 1],
            "specificity": decisions.specificity_by_class(matrices)[..., 1],
            "precision": decisions.precision_by_class(matrices)[..., 1],
            "f1": decisions.f1_by_class(matrices)[..., 1],
        }
