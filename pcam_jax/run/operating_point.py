"""What was chosen after training, on validation data only: temperature, threshold, and a calibration map."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from pcam_jax.metrics.recalibration import IsotonicMap
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import write_json_atomic

FILE = "operating_point.json"


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """How logits become decisions; the defaults are those of a run for which nothing was chosen."""

    temperature: float = 1.0
    """Divides logits before probabilities are taken (Guo et al. 2017, arXiv:1706.04599)."""
    threshold: float = 0.5
    """A probability of class 1 at or above it is called positive."""
    criterion: str = "default"
    """How the threshold was chosen: default, fixed, youden, sensitivity=0.95, ..."""
    meaning: str = ""
    """What the threshold means for patients' patches, in a sentence."""
    tta: str = "none"
    """Test-time augmentation that the threshold was chosen with."""
    step: int | None = None
    """Training step of the weights it was chosen for; None where nothing was chosen."""
    isotonic: IsotonicMap | None = None
    """Maps the probability of class 1 to a calibrated one, for showing it to people. Its ties would lower AUROC,
    so neither thresholds nor submissions use it."""


def read_operating_point(run: Path) -> OperatingPoint:
    """The run's choice, or the defaults.

    Raises:
        UserError: the file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return OperatingPoint()
    try:
        return parse_operating_point(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and evaluate the run again.") from None


def write_operating_point(run: Path, point: OperatingPoint) -> None:
    """Record the choice, completely or not at all."""
    write_json_atomic(run / FILE, dataclasses.asdict(point))


def parse_operating_point(values: dict[str, Any]) -> OperatingPoint:
    """The inverse of `dataclasses.asdict`.

    Raises:
        ValueError: a value is impossible; KeyError, TypeError or AttributeError: the form is another.
    """
    values = {**values}  # a list of nothing is no object either
    isotonic = values.pop("isotonic", None)
    if isotonic is not None:
        knots, heights = (tuple(map(float, isotonic[name])) for name in ("knots", "values"))
        if len(knots) != len(heights) or not knots:
            raise ValueError("an isotonic map needs as many values as knots")
        isotonic = IsotonicMap(knots, heights)
    point = OperatingPoint(**values, isotonic=isotonic)
    if not (0 < float(point.temperature) < math.inf and 0 <= float(point.threshold) <= 1 + 1e-6):
        raise ValueError(f"temperature {point.temperature} or threshold {point.threshold} is impossible")
    return point
