"""The mean of a quantity over examples, with its interval."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pcam_jax.metrics.inputs import FloatArray, check_groups
from pcam_jax.metrics.intervals import DEFAULT_RESAMPLES, bootstrap
from pcam_jax.metrics.report import Metric


def mean_with_interval(
    values: ArrayLike, groups: ArrayLike | None = None, resamples: int = DEFAULT_RESAMPLES, seed: int = 0
) -> Metric:
    """Mean and its 95 % bootstrap interval (BCa), whole groups drawn where given.

    Args:
        values: `[N]`; NaN where an example lacks the quantity: such examples are left out.
        groups: names `[N]`, or None.
        resamples: number of resamples.
        seed: of the draws.

    Returns:
        NaN throughout where no value exists, and for the interval where there is a single example or group.
    """
    given = np.asarray(values, np.float64)
    known = ~np.isnan(given)
    kept = given[known]
    if not len(kept):
        return Metric(float("nan"), float("nan"), float("nan"))
    units = None if groups is None else check_groups(np.asarray(groups)[known], len(kept))

    def mean(weights: FloatArray) -> dict[str, FloatArray]:
        return {"mean": weights @ kept / weights.sum(axis=1)}

    drawn = bootstrap(mean, len(kept), units, resamples, seed)
    return Metric(drawn.points["mean"], *drawn.interval("mean"))
