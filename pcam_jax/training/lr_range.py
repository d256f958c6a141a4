"""The learning-rate range test (Smith 2017, arXiv:1506.01186): its sweep, its smoothing and what it suggests."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_SMOOTHING = 0.95
_DIVERGED = 4.0  # times the lowest smoothed loss, as in fastai
_WARM_UP_SHARE = 0.1
_SMALLEST_FALL = 0.02


def sweep(lowest: float, highest: float, steps: int) -> FloatArray:
    """Learning rates ``[steps]`` from lowest to highest, each the same factor above the one before."""
    return lowest * (highest / lowest) ** (np.arange(steps) / max(steps - 1, 1))


def smoothed(losses: Sequence[float]) -> FloatArray:
    """Exponential means ``[n]`` of the losses so far, corrected for their start (as in Adam)."""
    mean, means = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        means.append(mean / (1 - _SMOOTHING**number))
    return np.array(means)


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the sweep should end: the last loss is no number, or the mean is far above its lowest."""
    if not math.isfinite(losses[-1]):
        return True
    means = smoothed(losses)
    return bool(means[-1] > _DIVERGED * means.min())


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Learning rates that a sweep speaks for."""

    valley: float
    """Within the longest descent of the smoothed loss: a good peak for a schedule."""
    steepest: float
    """Where the smoothed loss falls fastest: careful."""
    lowest: float
    """Where the smoothed loss is lowest: already too high."""


def suggest(rates: FloatArray, losses: Sequence[float]) -> Suggestion | None:
    """Learning rates from a sweep.

    The descent is the longest decreasing subsequence of the smoothed losses, the valley its point half-way (as
    fastai's suggestion of that name). The first tenth, where the mean is over few steps, and what comes after the
    lowest mean are left out.

    Args:
        rates: ``[n]`` rising.
        losses: ``[n]`` of a step at each; a last one that is no number is ignored.

    Returns:
        The suggestion, or None if the loss never fell.
    """
    values = [loss for loss in losses if math.isfinite(loss)]
    first = max(1, round(_WARM_UP_SHARE * len(values)))
    means = smoothed(values)
    if len(means) < first + 4:
        return None
    last = first + int(np.argmin(means[first:]))
    descent = longest_descent(means[first : last + 1])
    if len(descent) < 3 or means[last] > (1 - _SMALLEST_FALL) * means[first]:
        return None
    slopes = _slopes(np.log(rates[first : last + 1]), means[first : last + 1])
    return Suggestion(
        valley=float(rates[first + descent[len(descent) // 2]]),
        steepest=float(rates[first + int(np.argmin(slopes))]),
        lowest=float(rates[last]),
    )


def _slopes(places: FloatArray, values: FloatArray) -> FloatArray:
    """Slope ``[n]`` around each point, over a tenth of all points on either side: single steps are noise."""
    reach = max(1, len(values) // 10)
    before = np.maximum(np.arange(len(values)) - reach, 0)
    after = np.minimum(np.arange(len(values)) + reach, len(values) - 1)
    return (values[after] - values[before]) / (places[after] - places[before])


def longest_descent(values: npt.ArrayLike) -> list[int]:
    """Positions of the longest strictly decreasing subsequence, the earliest such by its end values.

    Patience sorting (Schensted 1961): n log n.
    """
    tails: list[float] = []  # highest negated end of a descent of each length
    ends: list[int] = []
    before: list[int] = []
    for position, value in enumerate(np.asarray(values, float)):
        length = bisect_left(tails, -value)
        before.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [-value]
        ends[length : length + 1] = [position]
    positions = []
    position = ends[-1] if ends else -1
    while position >= 0:
        positions.append(position)
        position = before[position]
    return positions[::-1]


def rounded(rate: float) -> float:
    """A learning rate with two significant digits."""
    return float(f"{rate:.1e}")
