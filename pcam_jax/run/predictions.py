"""Predictions of a run on labelled examples, and what was found in them: a table and a JSON file each.

``predictions/<name>.csv`` holds a row per example, ``predictions/<name>.json`` how they were made and every
figure. The name is the split, with ``-d4`` where symmetries were averaged.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_jax.metrics.report import MetricsReport
from pcam_jax.run.folder import Run
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import atomic_write, write_json_atomic

FOLDER = "predictions"


@dataclasses.dataclass(frozen=True)
class CalibrationRow:
    """How well probabilities mean what they say under one map.

    Attributes:
        name: of the map, in words.
        auroc: which a map that makes ties lowers.
        nll: nats.
        brier: mean squared error.
        ece: expected calibration error, 15 bins of equal width.
        ece_equal_mass: with bins of equal mass.
    """

    name: str
    auroc: float
    nll: float
    brier: float
    ece: float
    ece_equal_mass: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A run's predictions on labelled examples, and the figures.

    Attributes:
        split: which examples.
        tta: ``none`` or ``d4``.
        step: of the weights.
        store: where the images were.
        ids: `[N]` str.
        groups: `[N]` str, "" where unknown.
        labels: `[N]` int.
        logits: `[N, outputs] float32`, uncalibrated, of the images as they are.
        probs: `[N]` (of class 1) or `[N, K] float64`, calibrated, averaged over symmetries where asked.
        report: the figures of ``probs``.
        calibration: before, after, and under other maps.
        temperature: that made ``probs`` of logits.
        criterion: how the threshold was chosen.
        meaning: what the threshold means, in a sentence.
        images_per_second: of prediction, reading included and compilation not; None for a single batch.
    """

    split: str
    tta: str
    step: int
    store: str
    ids: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    probs: np.ndarray
    report: MetricsReport
    calibration: tuple[CalibrationRow, ...] = ()
    temperature: float = 1.0
    criterion: str = "default"
    meaning: str = ""
    images_per_second: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return evaluation_name(self.split, self.tta)

    @property
    def examples_digest(self) -> str:
        """Equal for equal examples in the same order."""
        text = "\n".join(f"{name},{label}" for name, label in zip(self.ids, self.labels, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()


def evaluation_name(split: str, tta: str) -> str:
    """The name that an evaluation's files bear."""
    return split if tta == "none" else f"{split}-{tta}"


_STORED_FIELDS = (
    "split",
    "tta",
    "step",
    "store",
    "temperature",
    "criterion",
    "meaning",
    "images_per_second",
)


def write_evaluation(run: Run, evaluation: Evaluation) -> Path:
    """Write the table and the figures; returns the path of the table."""
    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    table = folder / f"{evaluation.name}.csv"
    logits, probs = evaluation.logits, evaluation.probs.reshape(len(evaluation.ids), -1)
    columns = ["id", "group", "label"]
    columns += _column_names("logit", logits.shape[1], run.class_names)
    columns += _column_names("prob", probs.shape[1], run.class_names)
    with atomic_write(table) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in zip(evaluation.ids, evaluation.groups, evaluation.labels, logits, probs, strict=True):
            logit_cells, prob_cells = (
                (f"{value:.9g}" for value in row[3]),
                (repr(float(value)) for value in row[4]),
            )
            writer.writerow([*row[:3], *logit_cells, *prob_cells])
    values: dict[str, Any] = {name: getattr(evaluation, name) for name in _STORED_FIELDS}
    values["examples_digest"] = evaluation.examples_digest
    values["calibration"] = [
        {key: None if value != value else value for key, value in dataclasses.asdict(row).items()}
        for row in evaluation.calibration
    ]
    values["figures"] = evaluation.report.to_dict()
    write_json_atomic(folder / f"{evaluation.name}.json", values)
    return table


def evaluation_names(run: Run) -> list[str]:
    """What the run was evaluated on: validation first, then by name."""
    folder = run.path / FOLDER
    found = {path.stem for path in folder.glob("*.json") if path.with_suffix(".csv").is_file()}
    return sorted(found, key=lambda name: (not name.startswith("validation"), name))


def read_evaluation(run: Run, name: str) -> Evaluation:
    """What `write_evaluation` wrote.

    Raises:
        UserError: it is not there, or damaged.
    """
    table, figures = (run.path / FOLDER / f"{name}{suffix}" for suffix in (".csv", ".json"))
    if not (table.is_file() and figures.is_file()):
        raise UserError(
            f"{run.path} was not evaluated on {name!r} yet: run `python -m pcam_jax.evaluate {run.path}` first."
        )
    try:
        values = json.loads(figures.read_text(encoding="utf-8"))
        # numbers are read by numpy, which rounds them right; pandas 2 does not
        rows = pd.read_csv(table, dtype=str, keep_default_na=False)
        logits, probs = (
            rows[[name for name in rows if name.startswith(kind)]].to_numpy(np.str_).astype(np.float64)
            for kind in ("logit", "prob")
        )
        evaluation = Evaluation(
            ids=rows["id"].to_numpy(np.str_),
            groups=rows["group"].to_numpy(np.str_),
            labels=rows["label"].to_numpy(np.int64),
            logits=logits.astype(np.float32),
            probs=probs[:, 0] if probs.shape[1] == 1 else probs,
            report=MetricsReport.from_dict(values["figures"]),
            calibration=tuple(map(_calibration_row, values["calibration"])),
            **{name: values[name] for name in _STORED_FIELDS},
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{figures} or its table is damaged ({error}): evaluate the run again.") from None
    if evaluation.examples_digest != values["examples_digest"]:
        raise UserError(f"{table} and {figures.name} do not belong together: evaluate the run again.")
    return evaluation


def _column_names(kind: str, count: int, class_names: tuple[str, ...]) -> list[str]:
    return [kind] if count == 1 else [f"{kind}_{name}" for name in class_names]


def _calibration_row(values: dict[str, Any]) -> CalibrationRow:
    known: dict[str, Any] = {key: np.nan if value is None else value for key, value in values.items()}
    return CalibrationRow(**known)
