"""Maps that make probabilities mean what they say, fitted on validation examples.

Sources: temperature scaling as Guo et al. 2017 (arXiv:1706.04599); isotonic regression by pooling adjacent
violators, Barlow et al. 1972, "Statistical inference under order restrictions".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from pcam_jax.metrics.inputs import (
    FloatArray,
    IntArray,
    check_groups,
    check_labels,
    check_predictions,
    check_weights,
)
from pcam_jax.runtime.errors import UserError

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0


@dataclass(frozen=True)
class TemperatureFit:
    """Result of `fit_temperature`.

    Attributes:
        temperature: divide logits by this; above 1 the model was too sure of itself.
        nll_before: mean NLL at temperature 1, in nats.
        nll_after: mean NLL at ``temperature``.
        at_bound: True where the best temperature lies outside the range searched, which means that the logits
            separate the classes perfectly (0.01) or carry no signal (100): then calibration is not to be
            trusted.
        count: number of examples it was fitted on.
    """

    temperature: float
    nll_before: float
    nll_after: float
    at_bound: bool
    count: int


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> TemperatureFit:
    """Find the temperature that minimises the NLL of ``logits / temperature``; fit it on validation examples.

    The NLL is convex in 1 / temperature, so a Newton iteration kept inside a shrinking bracket finds the one
    minimum; it is searched between 0.01 and 100. With two classes the order of examples does not change, so
    neither does AUROC.

    Args:
        logits: `[N]`, `[N, 1]` (sigmoid) or `[N, K]` (softmax).
        labels: `[N]` class numbers.

    Raises:
        UserError: empty, not finite, lengths that differ, or labels of one class only.
    """
    values, true = _checked_logits(logits, labels)
    if len(np.unique(true)) < 2:
        raise UserError(
            f"All {len(true)} examples are of class {true[0]}: calibration needs several classes."
        )
    low, high = 1.0 / HIGHEST_TEMPERATURE, 1.0 / LOWEST_TEMPERATURE
    at_bound = True
    if _slope(values, true, high)[0] <= 0:
        sharpness = high
    elif _slope(values, true, low)[0] >= 0:
        sharpness = low
    else:
        at_bound = False
        sharpness = 1.0
        for _ in range(200):
            slope, curvature = _slope(values, true, sharpness)
            low, high = (low, sharpness) if slope > 0 else (sharpness, high)
            step = sharpness - slope / curvature if curvature > 0 else low
            following = step if low < step < high else float(np.sqrt(low * high))
            if abs(following - sharpness) <= 1e-13 * sharpness:
                break
            sharpness = following
    return TemperatureFit(
        1.0 / sharpness, _mean_nll(values, true, 1.0), _mean_nll(values, true, sharpness), at_bound, len(true)
    )


def apply_temperature(logits: ArrayLike, temperature: float) -> FloatArray:
    """Turn logits into probabilities at a temperature.

    Args:
        logits: `[N]`, `[N, 1]`, `[N, 2]` or `[N, K]`.
        temperature: above 0.

    Returns:
        `[N] float64`, the probability of class 1, or `[N, K]` with K > 2.

    Raises:
        UserError: a temperature that is not above 0.
    """
    if not 0 < temperature < np.inf:
        raise UserError(f"A temperature of {temperature} is impossible: it must be above 0.")
    values = _two_class_logits(np.asarray(logits, dtype=np.float64))
    scaled = values / temperature
    return special.expit(scaled) if values.ndim == 1 else special.softmax(scaled, axis=1)


def logits_from_probs(probs: ArrayLike) -> FloatArray:
    """Recover logits (up to the softmax's constant) from probabilities, clipped by the epsilon of their type.

    Args:
        probs: `[N]` or `[N, K]`.
    """
    given = np.asarray(probs)
    epsilon = float(np.finfo(given.dtype).eps) if given.dtype.kind == "f" else float(np.finfo(np.float64).eps)
    values = np.clip(given.astype(np.float64), epsilon, 1 - epsilon)
    return special.logit(values) if values.ndim == 1 else np.log(values)


@dataclass(frozen=True)
class IsotonicMap:
    """A non-decreasing map of the probability of class 1: straight lines between knots, flat outside them.

    Attributes:
        knots: probabilities in, rising.
        values: probabilities out, never falling.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, probs: ArrayLike) -> FloatArray:
        """Map probabilities `[N]` to calibrated ones, `[N] float64`."""
        return np.interp(np.asarray(probs, dtype=np.float64), self.knots, self.values)


def fit_isotonic(labels: ArrayLike, probs: ArrayLike, weights: ArrayLike | None = None) -> IsotonicMap:
    """Fit the non-decreasing map with the least squared error (pool adjacent violators), for two classes.

    Its flat steps give many examples the same probability. Those ties lower AUROC, and steps at 0 and 1 make
    single mistakes infinitely surprising: report with it, but rank (and submit) with the model's own
    probabilities.

    Args:
        labels: `[N]` of 0 and 1.
        probs: `[N]` or `[N, 2]`.
        weights: `[N]`, how much each example counts.

    Raises:
        UserError: as `check_predictions`, or more than two classes.
    """
    predictions = check_predictions(labels, probs)
    if not predictions.binary:
        raise UserError(
            "Isotonic calibration maps one probability: with more than two classes use temperature."
        )
    counted = check_weights(weights, len(predictions))
    kept = counted > 0
    distinct, place = np.unique(predictions.probs[kept], return_inverse=True)
    mass = np.bincount(place, weights=counted[kept])
    share = np.bincount(place, weights=counted[kept] * predictions.labels[kept]) / mass
    starts, values = _pool_adjacent_violators(share, mass)
    stops = np.append(starts[1:], len(distinct)) - 1
    # a block needs its two ends only: between them the map is flat, from one to the next it is a line
    ends = np.unique(np.concatenate([starts, stops]))
    heights = values[np.searchsorted(starts, ends, side="right") - 1]
    return IsotonicMap(tuple(distinct[ends].tolist()), tuple(heights.tolist()))


def crossfit_isotonic(
    labels: ArrayLike, probs: ArrayLike, groups: ArrayLike | None = None, folds: int = 5, seed: int = 0
) -> FloatArray:
    """Probabilities under isotonic maps that have not seen the example: each fold mapped by a fit on the others.

    A map fitted on the examples it is judged on looks perfect, whatever the model.

    Args:
        labels: `[N]` of 0 and 1.
        probs: `[N]` or `[N, 2]`.
        groups: names `[N]`; a group stays in one fold.
        folds: how many, fewer where there are fewer groups.
        seed: of the folds.

    Returns:
        `[N] float64`; NaN throughout where a fit would lack a class.

    Raises:
        UserError: as `fit_isotonic`.
    """
    predictions = check_predictions(labels, probs)
    fit_isotonic(labels, probs)  # refuses what cannot be mapped
    units = check_groups(groups, len(predictions))
    if units is None:
        units = np.arange(len(predictions))
    count = int(units.max()) + 1
    fold_of_unit = np.random.default_rng(seed).permutation(count) % max(2, min(folds, count))
    fold = fold_of_unit[units]
    mapped = np.empty(len(predictions))
    for held_out in np.unique(fold):
        seen, unseen = predictions.take(fold != held_out), fold == held_out
        if len(np.unique(seen.labels)) < 2:
            return np.full(len(predictions), np.nan)
        mapped[unseen] = fit_isotonic(seen.labels, seen.probs)(predictions.probs[unseen])
    return mapped


def _pool_adjacent_violators(values: NDArray[Any], weights: NDArray[Any]) -> tuple[IntArray, FloatArray]:
    """Return where each constant block starts and its value, for the best non-decreasing fit."""
    starts: list[int] = []
    heights: list[float] = []
    masses: list[float] = []
    for start, (height, mass) in enumerate(zip(values.tolist(), weights.tolist(), strict=True)):
        first = start
        while heights and heights[-1] >= height:
            before = masses.pop()
            height = (heights.pop() * before + height * mass) / (before + mass)
            mass += before
            first = starts.pop()
        starts.append(first)
        heights.append(height)
        masses.append(mass)
    return np.array(starts, dtype=np.int64), np.array(heights)


def _checked_logits(logits: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim not in (1, 2):
        raise UserError(f"Logits have shape {values.shape}: expected [N] or [N, classes].")
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise UserError(
            f"{bad} of {values.size} logits are not finite: the model diverged or the file is broken."
        )
    values = _two_class_logits(values)
    true = check_labels(labels, 2 if values.ndim == 1 else values.shape[1])
    if len(true) != len(values):
        raise UserError(
            f"There are {len(true)} labels but {len(values)} rows of logits: they must match by row."
        )
    return values, true


def _two_class_logits(values: FloatArray) -> FloatArray:
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim == 2 and values.shape[1] == 2:
        return values[:, 1] - values[:, 0]
    return values


def _slope(values: FloatArray, true: IntArray, sharpness: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL with respect to ``sharpness`` = 1 / temperature."""
    if values.ndim == 1:
        probs = special.expit(sharpness * values)
        return float(np.mean((probs - true) * values)), float(np.mean(probs * (1 - probs) * values**2))
    probs = special.softmax(sharpness * values, axis=1)
    expected = (probs * values).sum(axis=1)
    of_label = np.take_along_axis(values, true[:, None], axis=1)[:, 0]
    spread = (probs * (values - expected[:, None]) ** 2).sum(axis=1)
    return float(np.mean(expected - of_label)), float(np.mean(spread))


def _mean_nll(values: FloatArray, true: IntArray, sharpness: float) -> float:
    if values.ndim == 1:
        signs: NDArray[np.int64] = 2 * true - 1
        return float(-np.mean(special.log_expit(signs * sharpness * values)))
    logs = special.log_softmax(sharpness * values, axis=1)
    return float(-np.mean(np.take_along_axis(logs, true[:, None], axis=1)))
