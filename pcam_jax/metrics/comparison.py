"""Whether two models differ, judged on the same examples.

Sources: DeLong et al. 1988 (doi:10.2307/2531595) in the midrank form of Sun & Xu 2014
(doi:10.1109/LSP.2014.2337313), which costs a sort; with groups, Obuchowski 1997 (doi:10.2307/2533958);
McNemar 1947, exact. The paired bootstrap draws the same examples for both models, so what they share cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from pcam_jax.metrics.headline import Headline
from pcam_jax.metrics.inputs import (
    FloatArray,
    IntArray,
    check_groups,
    check_labels,
    check_predictions,
    check_ranking,
)
from pcam_jax.metrics.intervals import DEFAULT_RESAMPLES, LEVEL, NO_INTERVAL, Interval, bootstrap
from pcam_jax.runtime.errors import UserError

ROUNDING = 1e-12


@dataclass(frozen=True)
class DelongTest:
    """Two AUROCs on the same examples; ``difference`` is a minus b, and all else concerns it.

    ``p_value`` is two-sided; NaN figures mean that a class has too few examples (or groups) to tell a spread.
    """

    auroc_a: float
    auroc_b: float
    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Difference:
    """One figure of model a minus that of model b, with a 95 % interval and a two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p_value: float


class McnemarTest(NamedTuple):
    """How often only one of two models was right, and the two-sided exact p-value of equal odds."""

    only_a_right: int
    only_b_right: int
    p_value: float


def auroc_covariance(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike | None = None
) -> tuple[FloatArray, FloatArray]:
    """AUROCs of M models on the same examples, and the covariance of these estimates.

    Args:
        labels: `[N]` of 0 and 1.
        scores: `[M, N]`, or `[N]` for one model.
        groups: names `[N]`; examples of a group may depend on each other. Without groups all are independent.

    Returns:
        `[M] float64` and `[M, M] float64`; NaN where a class has fewer than two examples (or groups).

    Raises:
        UserError: as `pcam_jax.metrics.inputs.check_ranking`.
    """
    rows = np.atleast_2d(np.asarray(scores))
    checked = [check_ranking(labels, row) for row in rows]
    positive = checked[0][0]
    units = check_groups(groups, len(positive))
    if units is None:
        units = np.arange(len(positive))
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return np.full(len(rows), np.nan), np.full((len(rows), len(rows)), np.nan)
    placed = np.stack([_placements(positive, row) for _, row in checked])
    areas = placed[:, positive].mean(axis=1)
    centred = placed - areas[:, None]
    of_positives = _sum_by_group(centred[:, positive], units[positive], len(positive))
    of_negatives = _sum_by_group(centred[:, ~positive], units[~positive], len(positive))
    with_positives = len(np.unique(units[positive]))
    with_negatives = len(np.unique(units[~positive]))
    both = len(np.unique(units))
    if min(with_positives, with_negatives) < 2:
        return areas, np.full((len(rows), len(rows)), np.nan)
    mixed = of_positives @ of_negatives.T * both / (both - 1)
    covariance = (
        of_positives @ of_positives.T * with_positives / (with_positives - 1) / positives**2
        + of_negatives @ of_negatives.T * with_negatives / (with_negatives - 1) / negatives**2
        + (mixed + mixed.T) / (positives * negatives)
    )
    return areas, covariance


def auroc_interval(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike | None = None, level: float = LEVEL
) -> tuple[float, Interval]:
    """AUROC and its DeLong interval, symmetric on the logit scale so that it stays within 0 and 1.

    Arguments and errors as `auroc_covariance`, for one model. At exactly 0 or 1 there is none (NaN).
    """
    areas, covariance = auroc_covariance(labels, scores, groups)
    area, variance = float(areas[0]), float(covariance[0, 0])
    if not 0 < area < 1 or np.isnan(variance):
        return area, NO_INTERVAL
    half = special.ndtri(0.5 + level / 2) * np.sqrt(variance) / (area * (1 - area))
    low, high = special.expit(special.logit(area) + np.array([-half, half]))
    return area, Interval(float(low), float(high))


def delong_test(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    groups: ArrayLike | None = None,
    level: float = LEVEL,
) -> DelongTest:
    """Test whether two models have the same AUROC on the same examples.

    Args:
        labels: `[N]` of 0 and 1.
        scores_a: `[N]`, of model a.
        scores_b: `[N]`, of model b on the same examples.
        groups: names `[N]` (slides, patients), where examples are not independent; small p-values without
            them are not to be trusted then.
        level: of the interval.

    Raises:
        UserError: as `auroc_covariance`, or scores of different lengths.
    """
    first, second = np.asarray(scores_a), np.asarray(scores_b)
    if first.shape != second.shape:
        raise UserError(
            f"The models have scores of shapes {first.shape} and {second.shape}: pair them by example."
        )
    areas, covariance = auroc_covariance(labels, np.stack([first, second]), groups)
    difference = float(areas[0] - areas[1])
    error = float(np.sqrt(max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0.0)))
    if abs(difference) <= ROUNDING and error <= np.sqrt(ROUNDING):
        error, p_value = 0.0, 1.0  # both rank every pair alike
    elif error > 0:
        p_value = float(2 * special.ndtr(-abs(difference) / error))
    else:
        error, p_value = float("nan"), float("nan")
    half = float(special.ndtri(0.5 + level / 2)) * error
    return DelongTest(
        float(areas[0]), float(areas[1]), difference, error, difference - half, difference + half, p_value
    )


def mcnemar_test(
    labels: ArrayLike, predicted_a: ArrayLike, predicted_b: ArrayLike, class_count: int = 2
) -> McnemarTest:
    """Exact test whether two models are equally often right, from the examples that only one got right.

    It takes examples as independent; with groups, the paired bootstrap of the accuracy is the one to quote.

    Args:
        labels: `[N]` class numbers.
        predicted_a: `[N]` class numbers given by model a.
        predicted_b: `[N]` class numbers given by model b.
        class_count: K.

    Raises:
        UserError: empty, lengths that differ, classes outside 0..K-1.
    """
    true, first, second = (check_labels(part, class_count) for part in (labels, predicted_a, predicted_b))
    if not len(true) == len(first) == len(second):
        raise UserError(
            f"There are {len(true)} labels and {len(first)} and {len(second)} predictions: pair them by example."
        )
    only_a = int(np.sum((first == true) & (second != true)))
    only_b = int(np.sum((first != true) & (second == true)))
    together = only_a + only_b
    p_value = (
        min(1.0, 2 * float(special.bdtr(float(min(only_a, only_b)), together, 0.5))) if together else 1.0
    )
    return McnemarTest(only_a, only_b, p_value)


def holm_adjusted(p_values: ArrayLike) -> FloatArray:
    """P-values of several tests made at once, `[M] float64`, so that small ones do not arise from their number.

    Holm 1979, "A simple sequentially rejective multiple test procedure". NaN stays NaN and counts as no test.
    """
    given = np.asarray(p_values, np.float64)
    adjusted = np.full(given.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    stepped = given[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


def paired_bootstrap(
    labels: ArrayLike,
    probs_a: ArrayLike,
    probs_b: ArrayLike,
    *,
    thresholds: tuple[float, float] = (0.5, 0.5),
    groups: ArrayLike | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Difference of every headline figure between two models, from resamples drawn alike for both.

    Args:
        labels: `[N]` class numbers.
        probs_a: `[N]` or `[N, K]`, of model a.
        probs_b: as ``probs_a``, of model b on the same examples.
        thresholds: of model a and of model b, for two classes.
        groups: names `[N]`; whole groups are drawn.
        resamples: number of resamples.
        seed: of the draws.

    Returns:
        one `Difference` per figure. Its p-value is twice the share of resamples on the far side of 0, at
        least 2 / (resamples + 1).

    Raises:
        UserError: as `check_predictions`; models with different numbers of classes.
    """
    first, second = check_predictions(labels, probs_a), check_predictions(labels, probs_b)
    if first.class_count != second.class_count:
        raise UserError(
            f"The models have {first.class_count} and {second.class_count} classes: compare like with like."
        )
    of_a, of_b = Headline(first, thresholds[0]), Headline(second, thresholds[1])

    def differences(weights: FloatArray) -> dict[str, FloatArray]:
        figures_a, figures_b = of_a(weights), of_b(weights)
        return {name: figures_a[name] - figures_b[name] for name in of_a.names}

    units = check_groups(groups, len(first))
    drawn = bootstrap(differences, len(first), units, resamples, seed)
    return {
        name: Difference(point, *drawn.interval(name), _far_side(drawn.resampled[name], point))
        for name, point in drawn.points.items()
    }


def _far_side(values: FloatArray, point: float) -> float:
    known = values[~np.isnan(values)]
    if np.isnan(point) or not len(known):
        return float("nan")
    smaller = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    return min(1.0, 2 * (smaller + 1) / (len(known) + 1))


def _placements(positive: np.ndarray, scores: FloatArray) -> FloatArray:
    """For each example, the share of the other class that it is on the right side of, ties counted half."""
    placed = np.empty(len(scores))
    overall = _midranks(scores)
    for own, below in ((positive, True), (~positive, False)):
        others_below = (overall[own] - _midranks(scores[own])) / (len(scores) - own.sum())
        placed[own] = others_below if below else 1 - others_below
    return placed


def _midranks(values: FloatArray) -> FloatArray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _sum_by_group(values: FloatArray, units: IntArray, count: int) -> FloatArray:
    return np.stack([np.bincount(units, weights=row, minlength=count) for row in values])
