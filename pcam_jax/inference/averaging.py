"""Means of several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pcam_jax.data.loader import ImageSource
from pcam_jax.inference.predictor import Predictor, Tta
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import Stop


def load_predictors(runs: Sequence[str | Path], *, tta: Tta = "none") -> list[Predictor]:
    """The predictors of several runs that answer the same question.

    Raises:
        UserError: a run cannot be loaded, or their classes or image shapes differ.
    """
    predictors = [Predictor.load(run, tta=tta) for run in runs]
    first = predictors[0]
    for run, predictor in zip(runs, predictors, strict=True):
        if predictor.class_names != first.class_names or predictor.image_shape != first.image_shape:
            raise UserError(
                f"{run} cannot be averaged with {runs[0]}: it tells {', '.join(predictor.class_names)} apart on "
                f"{predictor.image_shape} images, not {', '.join(first.class_names)} on {first.image_shape}."
            )
    return predictors


def mean_probabilities(
    predictors: Sequence[Predictor],
    source: ImageSource,
    positions: np.ndarray,
    stop: Stop | None = None,
) -> np.ndarray:
    """Mean calibrated probabilities, ``[N]`` or ``[N, K] float32``."""
    total = sum(predictor.predict(source, positions, stop).astype(np.float64) for predictor in predictors)
    return np.asarray(total / len(predictors), np.float32)
