"""What is fitted and chosen on validation: temperature, threshold and calibration map, and how they did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pcam_jax.metrics import calibration
from pcam_jax.metrics.ranking import macro_auroc
from pcam_jax.metrics.recalibration import apply_temperature, crossfit_isotonic, fit_isotonic, fit_temperature
from pcam_jax.metrics.threshold import THRESHOLD_RULES, choose_threshold, describe_threshold
from pcam_jax.run.operating_point import OperatingPoint
from pcam_jax.run.predictions import CalibrationRow
from pcam_jax.runtime.errors import UserError

DEFAULT_THRESHOLD = 0.5


def parse_threshold(text: str) -> tuple[str, float | None]:
    """``youden``, ``sensitivity=0.95``, ``cost=5`` or ``0.3`` as (rule, target); empty gives ("", None).

    Raises:
        UserError: neither a known rule nor a number between 0 and 1.
    """
    rule, _, value = text.partition("=")
    if not text or (rule in THRESHOLD_RULES and not value):
        return text, None
    try:
        number = float(value if rule in THRESHOLD_RULES else text)
    except ValueError:
        raise UserError(
            f"--threshold is {text!r}: give a number or one of {', '.join(THRESHOLD_RULES)}, such as "
            "sensitivity=0.95."
        ) from None
    if rule in THRESHOLD_RULES:
        return rule, number
    if not 0 <= number <= 1:
        raise UserError(f"--threshold is {text}: a probability lies between 0 and 1.")
    return "fixed", number


def mean_probs(logits: Sequence[np.ndarray], temperature: float) -> np.ndarray:
    """Mean probabilities over symmetries, ``[N]`` (of class 1) or ``[N, K] float64``.

    They keep float64: a float32 sigmoid reaches 1 at a logit of 17, which would make two sure examples level.
    """
    return np.mean([apply_temperature(one, temperature) for one in logits], axis=0)


def fitted_point(
    point: OperatingPoint,
    logits: Sequence[np.ndarray],
    labels: np.ndarray,
    rule: str,
    target: float | None,
    *,
    tta: str,
    step: int,
    isotonic: bool,
    names: Sequence[str],
) -> OperatingPoint:
    """The operating point after looking at validation.

    A rule given now counts; without one, the rule of the run is applied again where its weights have changed,
    or where it was chosen in the way that is evaluated now.

    Args:
        point: the run's so far.
        logits: `[N, outputs]` for each symmetry, the plain images first.
        labels: `[N]`.
        rule: see `parse_threshold`.
        target: its target.
        tta: how the probabilities are averaged.
        step: of the weights.
        isotonic: also fit that map; one that the run has already is fitted again in any case.
        names: of the classes.
    """
    fit = fit_temperature(logits[0], labels)
    # a fit at its bound means logits without signal or without error: no temperature helps either
    temperature = 1.0 if fit.at_bound else fit.temperature
    probs = mean_probs(logits, temperature)
    by_rule = point.criterion not in ("default", "fixed")
    if rule or not (by_rule and point.step == step and point.tta != tta):
        if by_rule and not rule:
            rule, target = parse_threshold(point.criterion)
        point = dataclasses.replace(with_threshold(point, rule, target, labels, probs), tta=tta)
        point = dataclasses.replace(point, meaning=threshold_meaning(labels, probs, point, names))
    keep_map = isotonic or point.isotonic is not None
    return dataclasses.replace(
        point,
        temperature=temperature,
        step=step,
        isotonic=fit_isotonic(labels, probs) if keep_map else None,
    )


def with_threshold(
    point: OperatingPoint, rule: str, target: float | None, labels: np.ndarray, probs: np.ndarray
) -> OperatingPoint:
    """The point with the threshold that a rule chooses; without a rule as it is."""
    if rule == "fixed":
        value = DEFAULT_THRESHOLD if target is None else target
        criterion = "default" if value == DEFAULT_THRESHOLD else "fixed"
        return dataclasses.replace(point, threshold=value, criterion=criterion)
    if not rule:
        return point
    choice = choose_threshold(labels, probs, rule, target)
    criterion = rule if target is None else f"{rule}={target:g}"
    return dataclasses.replace(point, threshold=choice.threshold, criterion=criterion)


def threshold_meaning(
    labels: np.ndarray, probs: np.ndarray, point: OperatingPoint, names: Sequence[str]
) -> str:
    """What the threshold does on these examples; empty where they do not hold two classes."""
    if probs.ndim > 1 or len(np.unique(labels)) < 2:
        return ""
    return describe_threshold(labels, probs, point.threshold).sentence(names)


def calibration_rows(
    labels: np.ndarray,
    logits: Sequence[np.ndarray],
    point: OperatingPoint,
    groups: np.ndarray | None,
    *,
    fitted_here: bool,
) -> tuple[CalibrationRow, ...]:
    """How calibrated the probabilities are before and after the temperature, and under the isotonic map.

    Args:
        labels: `[N]`.
        logits: `[N, outputs]` for each symmetry.
        point: the run's.
        groups: names `[N]`, or None.
        fitted_here: the map was fitted on these very examples, so it is judged by cross-fitting.
    """
    calibrated = mean_probs(logits, point.temperature)
    maps = {
        "as the network says": mean_probs(logits, 1.0),
        f"temperature {point.temperature:.3g}": calibrated,
    }
    if point.isotonic is not None and fitted_here:
        maps["isotonic (cross-fitted in 5 folds)"] = crossfit_isotonic(labels, calibrated, groups)
    elif point.isotonic is not None:
        maps["isotonic"] = point.isotonic(calibrated)
    return tuple(_calibration_row(name, labels, probs) for name, probs in maps.items())


def _calibration_row(name: str, labels: np.ndarray, probs: np.ndarray) -> CalibrationRow:
    if np.isnan(probs).any():
        return CalibrationRow(name, *[float("nan")] * 5)
    return CalibrationRow(
        name=name,
        auroc=macro_auroc(labels, probs),
        nll=calibration.nll(labels, probs),
        brier=calibration.brier(labels, probs),
        ece=calibration.ece(labels, probs),
        ece_equal_mass=calibration.ece(labels, probs, scheme="equal_mass"),
    )
