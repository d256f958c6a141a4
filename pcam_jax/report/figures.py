"""Figures of a run: training curves, ROC, precision-recall, threshold, reliability, confusion matrix.

Every ``draw_*`` function returns a `matplotlib.figure.Figure`, which `pcam_jax.report.canvas.write_figure` puts into
a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from pcam_jax.metrics import ranking
from pcam_jax.metrics.calibration import DEFAULT_BINS, ece, reliability_curve
from pcam_jax.metrics.inputs import check_predictions
from pcam_jax.report.canvas import (
    GREY,
    LEGEND_POINTS,
    SERIES_COLORS,
    SERIES_STYLES,
    new_axes,
    plain_axes,
    write_figure,
)
from pcam_jax.runtime.errors import UserError

# ---------------------------------------------------------------------------------------------- training

TRAINING_PANELS = (
    ("Loss", (("train_loss", "training"), ("validation_loss", "validation"))),
    (
        "Accuracy and AUROC",
        (
            ("train_accuracy", "training accuracy"),
            ("validation_accuracy", "validation accuracy"),
            ("validation_auroc", "validation AUROC"),
        ),
    ),
    ("Learning rate", (("learning_rate", "learning rate"),)),
)


def draw_training_curves(
    history_rows: Sequence[Mapping[str, Any]],
    best_epoch: float | None = None,
    title: str = "",
    only: str | None = None,
) -> Figure:
    """Draw loss, accuracy and learning rate over the epochs.

    Args:
        history_rows: one mapping per evaluation with ``epoch`` and any of ``train_loss``, ``train_accuracy``,
            ``validation_loss``, ``validation_accuracy``, ``validation_auroc`` and ``learning_rate``. Values
            that are missing, empty or not finite are left out, and so are panels without any value.
        best_epoch: marked with a vertical line.
        title: above all panels.
        only: name of a single panel of `TRAINING_PANELS` to draw.
    """
    series = {key: _finite_points(history_rows, key) for _, lines in TRAINING_PANELS for key, _ in lines}
    wanted = [panel for panel in TRAINING_PANELS if only in (None, panel[0])]
    panels = [panel for panel in wanted if any(series[key][0] for key, _ in panel[1])]
    figure, all_axes = new_axes(columns=max(1, len(panels)))
    if not panels:
        all_axes[0].text(0.5, 0.5, "no epoch has ended yet", ha="center", transform=all_axes[0].transAxes)
    for axes, (label, lines) in zip(all_axes, panels, strict=False):
        drawn = 0
        for place, (key, name) in enumerate(lines):
            epochs, values = series[key]
            if epochs:
                marker = "os^"[place] if len(epochs) <= 40 else None  # more of them hide the line
                axes.plot(
                    epochs, values, SERIES_STYLES[place] if len(epochs) > 1 else "", marker=marker or "",
                    markersize=4, color=SERIES_COLORS[place], label=name,
                )  # fmt: skip
                drawn += 1
        if label == "Learning rate" and _spans_decades(series["learning_rate"][1]):
            axes.set_yscale("log")
        if best_epoch is not None:
            axes.axvline(
                best_epoch, color=GREY, linewidth=1, linestyle=":", label=f"best: epoch {best_epoch:g}"
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if drawn > 1 or best_epoch is not None:
            axes.legend(frameon=False, fontsize=LEGEND_POINTS)
    if title:
        figure.suptitle(title)
    return figure


def write_training_curves(
    path: str | os.PathLike[str],
    history_rows: Sequence[Mapping[str, Any]],
    best_epoch: float | None = None,
    title: str = "",
) -> None:
    """Draw the training curves (`draw_training_curves`) into a PNG or SVG file, atomically."""
    write_figure(draw_training_curves(history_rows, best_epoch, title), path)


def _finite_points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = []
    for row in rows:
        value = row.get(key)
        if value is not None and value != "" and math.isfinite(float(value)):
            points.append((float(row["epoch"]), float(value)))
    return [epoch for epoch, _ in points], [value for _, value in points]


def _spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


# -------------------------------------------------------------------------------------------- evaluation


class ScoredSet(NamedTuple):
    """One line of a ROC or precision-recall figure: a model, or one class against the others.

    Attributes:
        name: for the legend.
        labels: `[N]` of 0 and 1.
        scores: `[N]`, higher for class 1.
    """

    name: str
    labels: ArrayLike
    scores: ArrayLike


def scored_classes(labels: ArrayLike, probs: ArrayLike, class_names: Sequence[str]) -> list[ScoredSet]:
    """Split predictions into lines of a figure: class 1 of two classes, or each of K > 2 against the rest.

    Args:
        labels: `[N]` class numbers.
        probs: `[N]`, `[N, 2]` or `[N, K]`.
        class_names: one per class.

    Raises:
        UserError: as `pcam_jax.metrics.inputs.check_predictions`.
    """
    predictions = check_predictions(labels, probs)
    if predictions.binary:
        return [ScoredSet(class_names[1], predictions.labels, predictions.probs)]
    return [
        ScoredSet(name, predictions.labels == number, predictions.probs[:, number])
        for number, name in enumerate(class_names)
    ]


def draw_roc(sets: Sequence[ScoredSet], threshold: float | None = None, title: str = "") -> Figure:
    """Draw ROC curves, with AUROC in the legend and the operating point at ``threshold`` where given.

    A set with one class only has no curve and says so.
    """
    figure, (axes,) = new_axes(width=5, height=4.6)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance: 0.500")
    for place, one in enumerate(sets):
        area = ranking.auroc(one.labels, one.scores)
        curve = ranking.roc_curve(one.labels, one.scores)
        x, y = curve.false_positive_rate, curve.true_positive_rate
        plot_line(axes, x, y, place, _legend_entry(one.name, "AUROC", area))
        if threshold is not None and math.isfinite(area):
            called = int(np.count_nonzero(curve.thresholds >= threshold)) - 1
            _operating_point(axes, x[called], y[called], place, threshold)
    _unit_square(axes, "1 - specificity (false positive rate)", "sensitivity (true positive rate)", title)
    axes.legend(loc="lower right", frameon=False, fontsize=LEGEND_POINTS)
    return figure


def draw_precision_recall(
    sets: Sequence[ScoredSet], threshold: float | None = None, title: str = ""
) -> Figure:
    """Draw precision against recall, with average precision in the legend and each set's prevalence as a line."""
    figure, (axes,) = new_axes(width=5, height=4.6)
    for place, one in enumerate(sets):
        area = ranking.auprc(one.labels, one.scores)
        curve = ranking.precision_recall_curve(one.labels, one.scores)
        prevalence = float(np.mean(np.asarray(one.labels) == 1))
        # from one threshold to the next recall rises at the precision of the lower one: no sloping lines
        entry = _legend_entry(one.name, "AUPRC", area)
        plot_line(axes, curve.recall[::-1], curve.precision[::-1], place, entry, steps=True)
        axes.axhline(prevalence, color=_color(place), linewidth=0.8, linestyle=":")
        if threshold is not None and math.isfinite(area):
            called = int(np.searchsorted(curve.thresholds, threshold, side="left"))
            if called < len(curve.thresholds):
                _operating_point(axes, curve.recall[called], curve.precision[called], place, threshold)
    axes.plot([], [], color=GREY, linewidth=0.8, linestyle=":", label="prevalence (no skill)")
    _unit_square(axes, "recall (sensitivity)", "precision", title)
    axes.legend(loc="lower left", frameon=False, fontsize=LEGEND_POINTS)
    return figure


def draw_threshold_curve(
    labels: ArrayLike, probs: ArrayLike, threshold: float | None = None, title: str = ""
) -> Figure:
    """Draw sensitivity, specificity, precision and F1 over the threshold of two classes.

    Args:
        labels: `[N]` of 0 and 1, both present.
        probs: `[N]` or `[N, 2]`.
        threshold: marked with a vertical line.
        title: above the axes.

    Raises:
        UserError: as `check_predictions`; more than two classes.
    """
    predictions = check_predictions(labels, probs)
    if not predictions.binary:
        raise UserError(f"A threshold curve is for two classes, but there are {predictions.class_count}.")
    ranked = ranking.Ranking(predictions.labels == 1, predictions.probs)
    counts = ranked.cumulate(np.ones(len(predictions)))
    with np.errstate(invalid="ignore"):
        sensitivity = counts.found / counts.found[-1]
        specificity = 1 - counts.flagged / counts.flagged[-1]
    lines = {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": counts.found / counts.called,
        "F1": 2 * counts.found / (counts.found[-1] + counts.called),
    }
    figure, (axes,) = new_axes(width=5.6, height=4.2)
    for place, (name, values) in enumerate(lines.items()):
        plot_line(axes, ranked.thresholds[::-1], values[::-1], place, name, steps=True)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1, label=f"chosen: {threshold:.3g}")
    _unit_square(axes, "threshold (probability from which on an example is called positive)", "share", title)
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=LEGEND_POINTS, loc="lower center", ncols=2)
    return figure


def draw_reliability(
    labels: ArrayLike, probs_by_name: Mapping[str, ArrayLike], bins: int = DEFAULT_BINS, title: str = ""
) -> Figure:
    """Draw how often an event happened against how probable it was said to be, with 95 % Wilson intervals.

    Below stands the share of examples by confidence. With more than two classes the confidence is that of the
    predicted class, and the event that it is right.

    Args:
        labels: `[N]` class numbers.
        probs_by_name: `[N]` or `[N, K]` each, such as ``{"before": ..., "after temperature 1.7": ...}``.
        bins: of equal width.
        title: above the axes.

    Raises:
        UserError: as `check_predictions`.
    """
    figure = Figure(figsize=(4.6, 5.2), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for axes in (upper, lower):
        plain_axes(axes)
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
    binary = True
    for place, (name, probs) in enumerate(probs_by_name.items()):
        predictions = check_predictions(labels, probs)
        binary = predictions.binary
        curve = reliability_curve(labels, probs, bins)
        error = ece(labels, probs, bins)
        bars = np.maximum([curve.frequency - curve.low, curve.high - curve.frequency], 0)
        upper.errorbar(
            curve.confidence, curve.frequency, bars, color=_color(place), marker="os^Dv"[place % 5], markersize=4,
            linestyle=SERIES_STYLES[place % len(SERIES_STYLES)], linewidth=1.2, elinewidth=0.8, capsize=2,
            label=f"{name}: ECE {error:.3f}",
        )  # fmt: skip
        confidence = predictions.probs if binary else predictions.probs.max(axis=1)
        shares, edges = np.histogram(confidence, bins=bins, range=(0, 1))
        lower.stairs(
            shares / len(confidence),
            edges,
            color=_color(place),
            linestyle=SERIES_STYLES[place % len(SERIES_STYLES)],
            linewidth=1.2,
        )
    _unit_square(upper, "", "observed share" if binary else "share predicted right", title)
    upper.legend(loc="upper left", frameon=False, fontsize=LEGEND_POINTS)
    lower.set_xlabel("predicted probability" if binary else "probability of the predicted class")
    lower.set_ylabel("examples")
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def draw_confusion_matrix(matrix: ArrayLike, class_names: Sequence[str], title: str = "") -> Figure:
    """Draw counts and the share of each true class; darker is more of the row.

    Args:
        matrix: `[K, K]`, row = true class, column = predicted class.
        class_names: K names.
        title: above the axes.
    """
    counts = np.asarray(matrix)
    classes = len(counts)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    size = 2.4 + 0.9 * classes
    figure = Figure(figsize=(size + 0.6, size), layout="constrained", facecolor="white")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(classes):
        for column in range(classes):
            axes.text(
                column, row, f"{counts[row, column]:,}\n{shares[row, column]:.1%}", ha="center", va="center",
                color="white" if shares[row, column] > 0.55 else "black", fontsize=9 if classes <= 5 else 7,
            )  # fmt: skip
    axes.set_xticks(range(classes), class_names, rotation=0 if classes <= 3 else 45)
    axes.set_yticks(range(classes), class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if title:
        axes.set_title(title)
    return figure


def plot_line(
    axes: Axes, x: NDArray[Any], y: NDArray[Any], place: int, label: str, steps: bool = False
) -> None:
    """Plot a line over rising x, thinned to what the eye can tell apart so that a vector file stays small.

    With ``steps`` each value holds from the x before it up to its own.
    """
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        axes.plot([], [], color=_color(place), label=label)
        return
    fine = np.round(np.stack([x, y]) * 1000)
    kept = np.any(np.diff(fine, axis=1, prepend=np.nan) != 0, axis=0)
    kept |= np.roll(kept, -1)  # also the last point before each move, or a corner would be cut
    kept[-1] = True
    axes.plot(
        x[kept], y[kept], color=_color(place), linestyle=SERIES_STYLES[place % len(SERIES_STYLES)], linewidth=1.5,
        drawstyle="steps-pre" if steps else "default", label=label,
    )  # fmt: skip


def _operating_point(axes: Axes, x: float, y: float, place: int, threshold: float) -> None:
    axes.plot(
        [x], [y], marker="o", markersize=7, markerfacecolor="white", markeredgecolor=_color(place),
        markeredgewidth=2, linestyle="", label=None if place else f"at threshold {threshold:.3g}",
    )  # fmt: skip


def _unit_square(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title)


def _legend_entry(name: str, figure_name: str, value: float) -> str:
    return f"{name}: {figure_name} {value:.3f}" if math.isfinite(value) else f"{name}: one class only"


def _color(place: int) -> str:
    return SERIES_COLORS[place % len(SERIES_COLORS)]
