"""Whether probabilities mean what they say: proper scores, calibration error, the reliability curve.

Sources: Brier 1950 (doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2); expected calibration error as Guo
et al. 2017 (arXiv:1706.04599); interval of a share as Wilson 1927 (doi:10.1080/01621459.1927.10502953).

What is binned: with two classes, the probability of class 1 against the share of class 1 (what a reader of
"70 % tumour" relies on); with K > 2 classes, the highest probability against the share predicted right.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from pcam_jax.metrics.inputs import (
    FloatArray,
    IntArray,
    Predictions,
    check_predictions,
    check_weights,
)
from pcam_jax.runtime.errors import UserError

DEFAULT_BINS = 15
BIN_SCHEMES = ("equal_width", "equal_mass")


# -------------------------------------------------------------------------------------- proper scores


def nll_terms(predictions: Predictions) -> FloatArray:
    """Negative log-likelihood of each example in nats, `[N] float64`.

    Probabilities are clipped by their epsilon, so that a certain mistake is finite.
    """
    if predictions.binary:
        of_label = np.where(predictions.labels == 1, predictions.probs, 1.0 - predictions.probs)
    else:
        of_label = np.take_along_axis(predictions.probs, predictions.labels[:, None], axis=1)[:, 0]
    return -np.log(np.clip(of_label, predictions.epsilon, 1.0 - predictions.epsilon))


def brier_terms(predictions: Predictions) -> FloatArray:
    """Squared error of each example, `[N] float64`: of class 1 (0 to 1), or over K > 2 classes (0 to 2)."""
    if predictions.binary:
        return (predictions.probs - predictions.labels) ** 2
    truth = np.eye(predictions.class_count)[predictions.labels]
    return ((predictions.probs - truth) ** 2).sum(axis=1)


def nll(labels: ArrayLike, probs: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean negative log-likelihood in nats, equal to `sklearn.metrics.log_loss`.

    Args:
        labels: `[N]` class numbers.
        probs: `[N]`, `[N, 2]` or `[N, K]`.
        weights: `[N]`, how much each example counts.

    Raises:
        UserError: as `check_predictions`.
    """
    predictions = check_predictions(labels, probs)
    return float(np.average(nll_terms(predictions), weights=check_weights(weights, len(predictions))))


def brier(labels: ArrayLike, probs: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean squared error of the probabilities, equal to `sklearn.metrics.brier_score_loss`.

    From 0 to 1 with two classes, from 0 to 2 with more (Brier's own definition). Arguments as `nll`.
    """
    predictions = check_predictions(labels, probs)
    return float(np.average(brier_terms(predictions), weights=check_weights(weights, len(predictions))))


# ---------------------------------------------------------------------------------- calibration error


class CalibrationBins:
    """Confidences sorted once and cut into bins under any number of weightings at a time.

    Equal width: bin b holds confidences in (b/B, (b+1)/B], the first one also 0. Equal mass: an example's bin
    is floor(B * r), r being the share of weight above it plus half the weight tied with it, so that ties stay
    together and, without ties, bins differ by one example at most.
    """

    def __init__(self, confidence: FloatArray, outcome: FloatArray, bins: int) -> None:
        """Sort ``confidence [N]`` in [0, 1] with its ``outcome [N]`` of 0 and 1 for ``bins`` bins."""
        if bins < 1:
            raise UserError(f"Calibration cannot be measured with {bins} bins: use 15, or at least one.")
        order = np.argsort(-confidence, kind="stable")
        self._order = None if np.all(order[1:] > order[:-1]) else order
        self.confidence = confidence[order]
        self.outcome = outcome[order]
        self._gap = self.outcome - self.confidence
        self._bins = bins
        numbers = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], self.confidence, side="left")
        self._width_starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
        self._ends = np.flatnonzero(np.append(self.confidence[1:] != self.confidence[:-1], True))

    def ranked(self, weights: FloatArray) -> FloatArray:
        """Bring weights `[..., N]` from the order of the examples into that of falling confidence."""
        return weights if self._order is None else np.take(weights, self._order, axis=-1)

    def errors(self, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Expected calibration errors of ``weights [R, N]``, `[R]` with equal width and `[R]` with equal mass."""
        ranked = self.ranked(weights)
        gaps, seen = np.cumsum(ranked * self._gap, axis=-1), np.cumsum(ranked, axis=-1)
        width_stops = np.append(self._width_starts[1:], len(self.confidence))
        errors = np.empty((2, len(ranked)))
        for row, (gap, weight) in enumerate(zip(gaps, seen, strict=True)):
            for scheme, stops in enumerate((width_stops, self._mass_stops(weight))):
                at_stops = np.where(stops > 0, gap[np.maximum(stops - 1, 0)], 0.0)
                errors[scheme, row] = np.abs(np.diff(at_stops, prepend=0.0)).sum() / weight[-1]
        return errors[0], errors[1]

    def errors_if_calibrated(self, draws: int, seed: int) -> tuple[FloatArray, FloatArray]:
        """Calibration errors that a perfectly calibrated model would show on as many examples.

        Outcomes are drawn anew from the confidences (consistency resampling, Bröcker & Smith 2007,
        doi:10.1175/WAF993.1), ``draws`` times.

        Returns:
            `[draws]` with equal width and `[draws]` with equal mass.
        """
        rng = np.random.default_rng(seed)
        count = len(self.confidence)
        schemes = [self.starts(np.ones(count), scheme) for scheme in BIN_SCHEMES]
        errors = np.empty((2, draws))
        for draw in range(draws):
            gap = (rng.random(count) < self.confidence) - self.confidence
            for scheme, starts in enumerate(schemes):
                errors[scheme, draw] = np.abs(np.add.reduceat(gap, starts)).sum() / count
        return errors[0], errors[1]

    def starts(self, weights: FloatArray, scheme: str) -> IntArray:
        """First positions (by falling confidence) of the bins that hold examples, for ``weights [N]``."""
        if scheme == "equal_width":
            return self._width_starts
        stops = self._mass_stops(np.cumsum(self.ranked(weights)))
        return np.unique(np.append(0, stops[:-1][stops[:-1] < len(self.confidence)]))

    def _mass_stops(self, seen: FloatArray) -> IntArray:
        """Positions after each bin's last example, `[bins]`, from the cumulative weight `[N]`."""
        at_ends = seen[self._ends]
        twice_middle = at_ends + np.append(0.0, at_ends[:-1])
        limits = 2.0 * np.arange(1, self._bins) * seen[-1] / self._bins
        # an example exactly on a limit belongs to the next bin, whichever way the limit was rounded
        tied_runs = np.searchsorted(twice_middle, limits * (1 - 1e-12), side="left")
        stops = np.append(0, self._ends + 1)[tied_runs]
        return np.append(stops, len(seen))


def calibration_bins(predictions: Predictions, bins: int = DEFAULT_BINS) -> CalibrationBins:
    """Pair confidences with outcomes, as the head of this file says, ready for binning."""
    if predictions.binary:
        return CalibrationBins(predictions.probs, predictions.labels.astype(np.float64), bins)
    correct = predictions.probs.argmax(axis=1) == predictions.labels
    return CalibrationBins(predictions.probs.max(axis=1), correct.astype(np.float64), bins)


def ece(
    labels: ArrayLike,
    probs: ArrayLike,
    bins: int = DEFAULT_BINS,
    scheme: str = "equal_width",
    weights: ArrayLike | None = None,
) -> float:
    """Expected calibration error: the mean over bins of |share - mean confidence|, by the bins' weight.

    It is biased upwards: a perfectly calibrated model on few examples does not reach 0.

    Args:
        labels: `[N]` class numbers.
        probs: `[N]`, `[N, 2]` or `[N, K]`.
        bins: how many.
        scheme: ``equal_width`` or ``equal_mass``.
        weights: `[N]`, how much each example counts.

    Raises:
        UserError: as `check_predictions`; fewer than one bin, an unknown scheme.
    """
    predictions = check_predictions(labels, probs)
    binned = calibration_bins(predictions, bins)
    counted = check_weights(weights, len(predictions))
    return float(binned.errors(counted[None])[BIN_SCHEMES.index(_checked_scheme(scheme))][0])


class ReliabilityCurve(NamedTuple):
    """One entry per bin that holds examples, by rising confidence; all `[bins with examples] float64`.

    Attributes:
        confidence: mean confidence in the bin.
        frequency: share of outcomes.
        low: lower end of the 95 % Wilson interval of ``frequency``.
        high: upper end.
        weight: number of examples in the bin (their weight).
    """

    confidence: FloatArray
    frequency: FloatArray
    low: FloatArray
    high: FloatArray
    weight: FloatArray


def reliability_curve(
    labels: ArrayLike,
    probs: ArrayLike,
    bins: int = DEFAULT_BINS,
    scheme: str = "equal_width",
    weights: ArrayLike | None = None,
) -> ReliabilityCurve:
    """Mean confidence and observed share per bin. Arguments and errors as `ece`."""
    predictions = check_predictions(labels, probs)
    binned = calibration_bins(predictions, bins)
    counted = check_weights(weights, len(predictions))
    starts = binned.starts(counted, _checked_scheme(scheme))
    ranked = binned.ranked(counted)
    weight = np.add.reduceat(ranked, starts)
    filled = weight > 0
    confidence = np.add.reduceat(ranked * binned.confidence, starts)[filled] / weight[filled]
    frequency = np.add.reduceat(ranked * binned.outcome, starts)[filled] / weight[filled]
    low, high = wilson_interval(frequency, weight[filled])
    return ReliabilityCurve(
        *(part[::-1].copy() for part in (confidence, frequency, low, high, weight[filled]))
    )


def wilson_interval(
    share: FloatArray, count: FloatArray, level: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Wilson's score interval of a share observed on ``count`` independent examples."""
    z = float(special.ndtri(0.5 + level / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)


def _checked_scheme(scheme: str) -> str:
    if scheme not in BIN_SCHEMES:
        raise UserError(f"Unknown binning {scheme!r}: choose {' or '.join(BIN_SCHEMES)}.")
    return scheme
