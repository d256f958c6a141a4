"""What every figure of merit takes for granted about its input, checked once and said in one sentence.

Binary problems have one probability per example, that of class 1: `[N]`, `[N, 1]`, or `[N, 2]` whose second
column is taken. With K > 2 classes it is `[N, K]` and rows sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pcam_jax.runtime.errors import UserError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ROW_SUM_TOLERANCE = 1e-3  # float32 softmax errs by 1e-6; logits or percentages err by far more than this


@dataclass(frozen=True)
class Predictions:
    """Labels and probabilities that passed every check.

    Attributes:
        labels: `[N] int64` in `0 .. class_count - 1`.
        probs: `[N] float64`, the probability of class 1, or `[N, K] float64` with K > 2.
        class_count: 2 or K.
        epsilon: machine epsilon of the type the probabilities came in. Logarithms are taken of values clipped
            to `[epsilon, 1 - epsilon]`, as scikit-learn's `log_loss` does, since a float32 sigmoid saturates
            at 1.
    """

    labels: IntArray
    probs: FloatArray
    class_count: int
    epsilon: float

    @property
    def binary(self) -> bool:
        """True for two classes."""
        return self.probs.ndim == 1

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: ArrayLike) -> Predictions:
        """Return the examples at ``positions``."""
        chosen = np.asarray(positions)
        return Predictions(self.labels[chosen], self.probs[chosen], self.class_count, self.epsilon)


def check_predictions(labels: ArrayLike, probs: ArrayLike) -> Predictions:
    """Check labels against probabilities and bring both to one type and shape.

    Args:
        labels: `[N]` integers (or booleans, or whole floats).
        probs: `[N]`, `[N, 1]`, `[N, 2]` or `[N, K]` floats of any precision.

    Raises:
        UserError: nothing to evaluate, lengths that differ, NaN, values outside [0, 1], rows that do not sum
            to one, unknown labels, labels without a class; the sentence says how many.
    """
    given = np.asarray(probs)
    epsilon = float(np.finfo(given.dtype).eps) if given.dtype.kind == "f" else float(np.finfo(np.float64).eps)
    values = _floats(given, "probabilities")
    if values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] == 0):
        raise UserError(f"Probabilities have shape {values.shape}: expected [N] or [N, classes].")
    _refuse_nan(values, "probabilities")
    outside = int(np.count_nonzero((values < 0) | (values > 1)))
    if outside:
        raise UserError(
            f"{outside} of {values.size} probabilities lie outside [0, 1] (from {values.min():g} to "
            f"{values.max():g}): apply the sigmoid or softmax to logits first."
        )
    class_count = 2
    if values.ndim == 2 and values.shape[1] >= 2:
        class_count = values.shape[1]
        astray = int(np.count_nonzero(np.abs(values.sum(axis=1) - 1) > ROW_SUM_TOLERANCE))
        if astray:
            raise UserError(
                f"{astray} of {len(values)} rows of probabilities do not sum to 1: apply the softmax first."
            )
    if values.ndim == 2 and class_count == 2:
        values = np.ascontiguousarray(values[:, -1])
    checked = check_labels(labels, class_count)
    _same_length(checked, values, "probabilities")
    return Predictions(checked, values, class_count, epsilon)


def check_ranking(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], FloatArray]:
    """Check binary labels against scores of any scale (probabilities or logits; higher means class 1).

    Returns:
        `positive [N] bool`, `scores [N] float64`.

    Raises:
        UserError: as for `check_predictions`, but any number except NaN is a score.
    """
    values = _floats(np.asarray(scores), "scores")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise UserError(f"Scores have shape {values.shape}: one score per example, [N], is expected here.")
    _refuse_nan(values, "scores")
    checked = check_labels(labels, 2)
    _same_length(checked, values, "scores")
    return checked == 1, values


def check_labels(labels: ArrayLike, class_count: int) -> IntArray:
    """Check that labels are whole numbers in `0 .. class_count - 1`; returns `[N] int64`.

    Raises:
        UserError: none at all, not one-dimensional, not whole, unknown (-1), or without a class.
    """
    given = np.asarray(labels)
    if given.ndim != 1:
        raise UserError(f"Labels have shape {given.shape}: one class number per example, [N], is expected.")
    if len(given) == 0:
        raise UserError("There is nothing to evaluate: the list of labels is empty.")
    if given.dtype.kind not in "biuf":
        raise UserError(f"Labels are of type {given.dtype}: class numbers 0, 1, ... are expected.")
    _refuse_nan(given, "labels")
    whole = given.astype(np.int64)
    broken = int(np.count_nonzero(whole != given))
    if broken:
        raise UserError(f"{broken} of {len(given)} labels are not whole numbers: class numbers are expected.")
    unknown = int(np.count_nonzero(whole == -1))
    if unknown:
        raise UserError(
            f"{unknown} of {len(given)} labels are unknown (-1): evaluate labelled examples only."
        )
    outside = int(np.count_nonzero((whole < 0) | (whole >= class_count)))
    if outside:
        raise UserError(
            f"{outside} of {len(given)} labels lie outside 0..{class_count - 1} (from {whole.min()} to "
            f"{whole.max()}), but the model has {class_count} classes."
        )
    return whole


def check_weights(weights: ArrayLike | None, count: int) -> FloatArray:
    """Check example weights `[N]`; without any, each example weighs one.

    Raises:
        UserError: another length, NaN, infinite or negative values, or nothing that weighs anything.
    """
    if weights is None:
        return np.ones(count)
    values = _floats(np.asarray(weights), "weights")
    if values.shape != (count,):
        raise UserError(f"Weights have shape {values.shape}, but there are {count} examples.")
    bad = int(np.count_nonzero(~np.isfinite(values) | (values < 0)))
    if bad:
        raise UserError(f"{bad} of {count} weights are negative or not finite: weights count examples.")
    if not values.any():
        raise UserError("All weights are zero: there is nothing to evaluate.")
    return values


def group_names(groups: ArrayLike, count: int) -> NDArray[np.str_]:
    """Bring group names to text, `[N]`; "" where unknown (None or NaN).

    Raises:
        UserError: another length than the labels.
    """
    given = np.asarray(groups)
    if given.shape != (count,):
        raise UserError(f"Groups have shape {given.shape}, but there are {count} examples.")
    if given.dtype.kind == "U":
        return given
    # a NaN, which pandas makes of an empty cell, is the only value that differs from itself
    return np.array(["" if name is None or name != name else str(name) for name in given.tolist()])


def check_groups(groups: ArrayLike | None, count: int) -> IntArray | None:
    """Number the groups, and give examples of unknown group ("") one of their own each.

    Returns:
        `[N] int64` codes 0 .. G-1, or None where no example has a group.

    Raises:
        UserError: another length than the labels.
    """
    if groups is None:
        return None
    names = group_names(groups, count)
    unknown = names == ""
    if unknown.all():
        return None
    _, codes = np.unique(names, return_inverse=True)
    codes[unknown] = len(names) + np.arange(np.count_nonzero(unknown))
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def _floats(values: NDArray[Any], what: str) -> FloatArray:
    if values.dtype.kind not in "biuf":
        raise UserError(f"The {what} are of type {values.dtype}: numbers are expected.")
    return values.astype(np.float64)


def _refuse_nan(values: NDArray[Any], what: str) -> None:
    missing = int(np.count_nonzero(np.isnan(values))) if values.dtype.kind == "f" else 0
    if missing:
        raise UserError(f"{missing} of {values.size} {what} are NaN: the model or the file is broken there.")


def _same_length(labels: NDArray[Any], values: NDArray[Any], what: str) -> None:
    if len(labels) != len(values):
        raise UserError(f"There are {len(labels)} labels but {len(values)} {what}: they must match by row.")
