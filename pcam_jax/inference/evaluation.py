"""Evaluate a run: predict labelled examples, fit what is fitted on validation, and compute every figure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pcam_jax.data.named import open_named_store
from pcam_jax.data.split import split_warning
from pcam_jax.data.store import Store
from pcam_jax.inference.fitted_point import (
    calibration_rows,
    fitted_point,
    mean_probs,
    parse_threshold,
    threshold_meaning,
    with_threshold,
)
from pcam_jax.inference.predictor import Predictor, Tta
from pcam_jax.metrics.report import MetricsReport
from pcam_jax.metrics.summary import evaluate_predictions
from pcam_jax.run.folder import Run
from pcam_jax.run.operating_point import OperatingPoint, write_operating_point
from pcam_jax.run.predictions import Evaluation, write_evaluation
from pcam_jax.runtime import distributed
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.signals import Stop


@dataclasses.dataclass(frozen=True)
class Examples:
    """Labelled examples of a store.

    Attributes:
        store: where they are.
        positions: `[N] int64` in the store.
        split: what they are called.
        own: whether they are those of the run's own split, on which validation choices may be made.
        notes: what a reader of their figures must know, in sentences.
    """

    store: Store
    positions: np.ndarray
    split: str
    own: bool
    notes: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """`[N] int32`."""
        return self.store.labels[self.positions]

    @property
    def groups(self) -> np.ndarray:
        """`[N] str`, "" where unknown."""
        return self.store.groups[self.positions]


def find_examples(run: Run, store: str = "", split: str = "validation") -> Examples:
    """The examples of one of the run's splits; or, in another store, of a split that the store itself dictates.

    Args:
        run: from `open_run`.
        store: another store than the one the run was trained on.
        split: name of a split, or ``all`` for every labelled example.

    Raises:
        UserError: there are none, they have no labels, or the images have another shape.
    """
    data = open_named_store(store or run.environment["data"]["store"])
    if data.image_shape != run.image_shape:
        raise UserError(
            f"{data.path} has images of {data.image_shape}; {run.path} was trained on {run.image_shape}."
        )
    if len(data.class_names) != len(run.class_names):
        raise UserError(
            f"{data.path} tells {len(data.class_names)} classes apart, {run.path} {len(run.class_names)}: they do "
            "not fit together."
        )
    trained_on_it = data.digest == run.environment["data"]["digest"]
    table = run.split()
    wanted = table.loc[table["split"] == split, "id"].to_numpy(dtype=str)
    own = bool(len(wanted)) and (trained_on_it or bool(pd.Index(wanted).isin(data.ids).all()))
    if split == "all":
        positions, own = np.flatnonzero(data.labels >= 0), False
    elif own or trained_on_it or not (data.splits == split).any():
        positions = run.positions(data, split)
    else:
        positions = np.flatnonzero(data.splits == split)
    if not len(positions) or (data.labels[positions] < 0).any():
        raise UserError(
            f"The split {split!r} in {data.path} has no labels: predict it instead of evaluating."
        )
    notes = _notes(run, data, table, positions, split, own and trained_on_it)
    return Examples(data, positions, split, own, notes)


def _examples_to_choose_on(run: Run, store: str, split: str, threshold: str, isotonic: bool) -> Examples:
    """`find_examples`, which must be the run's own validation examples where something is chosen on them."""
    chosen = [name for name, wanted in (("--threshold", threshold), ("--isotonic", isotonic)) if wanted]
    if chosen and split != "validation":
        raise UserError(f"{chosen[0]} chooses on validation examples only, never on {split!r}: leave it out.")
    examples = find_examples(run, store, split)
    if chosen and not examples.own:
        raise UserError(
            f"{chosen[0]} chooses on the validation examples of {run.path}, which {examples.store.path} lacks."
        )
    return examples


def evaluate_run(
    run: Run,
    *,
    store: str = "",
    split: str = "validation",
    tta: Tta = "none",
    threshold: str = "",
    isotonic: bool = False,
    resamples: int = 2000,
    stop: Stop | None = None,
) -> Evaluation:
    """Evaluate one run and write its predictions and figures into ``predictions/``.

    On the run's own validation examples the temperature is fitted, the threshold chosen where a rule is known
    (given now, or when the run was evaluated before), and both are stored in the run. Several processes share the
    images; the first one alone resamples and writes.

    Args:
        run: from `open_run`.
        store: a store other than the one it was trained on.
        split: see `find_examples`.
        tta: test-time augmentation.
        threshold: how to choose the threshold (`parse_threshold`), on validation only.
        isotonic: also fit an isotonic calibration map, on validation only, and store it in the run.
        resamples: bootstrap resamples for the intervals; 0 leaves them out.
        stop: polled between batches.

    Raises:
        UserError: the split is empty or has no labels, the store does not fit, or a choice was asked for on
            other than validation examples.
    """
    rule, target = parse_threshold(threshold)
    examples = _examples_to_choose_on(run, store, split, threshold, isotonic)
    labels, groups = examples.labels, examples.groups
    known_groups = groups if (groups != "").any() else None
    predictor = Predictor.load(run.path, tta=tta)
    clock = _Clock(stop)
    logits = predictor.logits(examples.store, examples.positions, predictor.symmetries(), clock)
    images_per_second = clock.rate(len(labels))
    point = predictor.operating_point
    notes = list(examples.notes)
    if split == "validation" and examples.own:
        step = predictor.step or 0
        point = fitted_point(
            point, logits, labels, rule, target, tta=tta, step=step, isotonic=isotonic, names=run.class_names
        )
        if distributed.is_first():
            write_operating_point(run.path, point)
        notes.append(_fitted_here(point))
    probs = mean_probs(logits, point.temperature)
    report = evaluate_predictions(
        labels,
        probs,
        class_names=run.class_names,
        threshold=point.threshold,
        groups=known_groups,
        resamples=resamples if distributed.is_first() else 0,
    )
    evaluation = Evaluation(
        split=split,
        tta=tta,
        step=predictor.step or 0,
        store=str(examples.store.path),
        ids=examples.store.ids[examples.positions],
        groups=groups,
        labels=labels,
        logits=logits[0],
        probs=probs,
        report=dataclasses.replace(report, notes=(*report.notes, *notes)),
        calibration=calibration_rows(labels, logits, point, known_groups, fitted_here=split == "validation"),
        temperature=point.temperature,
        criterion=point.criterion,
        meaning=threshold_meaning(labels, probs, point, run.class_names),
        images_per_second=images_per_second,
    )
    if distributed.is_first():
        write_evaluation(run, evaluation)
    return evaluation


def evaluate_ensemble(
    evaluations: Sequence[Evaluation], class_names: Sequence[str], threshold: str = "", resamples: int = 2000
) -> MetricsReport:
    """Figures of the mean probabilities of several runs on the same examples.

    Args:
        evaluations: of each run.
        class_names: by label.
        threshold: rule to choose the mean's own threshold by (`parse_threshold`); .5 without one.
        resamples: see `evaluate_run`.

    Raises:
        UserError: the examples differ.
    """
    first = evaluations[0]
    if any(other.examples_digest != first.examples_digest for other in evaluations):
        raise UserError("The runs were evaluated on different examples: a mean needs the same ones.")
    probs = np.mean([evaluation.probs for evaluation in evaluations], axis=0)
    rule, target = parse_threshold(threshold)
    value = with_threshold(OperatingPoint(), rule, target, first.labels, probs).threshold
    return evaluate_predictions(
        first.labels,
        probs,
        class_names=class_names,
        threshold=value,
        groups=first.groups if (first.groups != "").any() else None,
        resamples=resamples,
    )


def _fitted_here(point: OperatingPoint) -> str:
    if point.criterion in ("default", "fixed"):
        return "The temperature was fitted on these examples, so NLL, Brier score and ECE flatter a little."
    return (
        f"The temperature was fitted and the threshold chosen ({point.criterion}) on these examples, so what hangs "
        "on them flatters a little."
    )


def _notes(
    run: Run, data: Store, table: pd.DataFrame, positions: np.ndarray, split: str, own: bool
) -> tuple[str, ...]:
    notes = []
    if own and split == "validation":
        warning = split_warning(data.index, run.config.data, table["split"].to_numpy(dtype=str))
        if warning:
            notes.append(warning)
    trained_on = table.loc[table["split"] == "train", "id"]
    if split == "train":
        notes.append("These examples were trained on: the figures say nothing about new ones.")
    elif seen := int(np.isin(data.ids[positions], trained_on.to_numpy(dtype=str)).sum()):
        notes.append(
            f"{seen:,} of these {len(positions):,} examples were trained on: the figures overstate what the model "
            "does on new ones."
        )
    return tuple(notes)


class _Clock:
    """Takes the time from the second batch on, when all is compiled; polls a stop on the way."""

    def __init__(self, stop: Stop | None) -> None:
        self._stop = stop
        self._batches = 0
        self._since = 0.0

    def check(self) -> None:
        """Called before each batch."""
        self._batches += 1
        if self._batches == 2:
            self._since = time.monotonic()
        if self._stop is not None:
            self._stop.check()

    def rate(self, count: int) -> float | None:
        """Images per second, or None for a single batch, which waited for the compiler."""
        if self._batches < 2:
            return None
        # the first batch was dispatched before, but computed after: all of them count
        return count / max(time.monotonic() - self._since, 1e-9)
