"""The report on a set of predictions: its parts, as JSON, and as a table for the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pcam_jax.metrics.groups import GroupRow
from pcam_jax.metrics.threshold import ClassRow

METRIC_LABELS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "mcc": "MCC",
    "sensitivity_at_specificity_95": "sensitivity at 95 % specificity",
    "specificity_at_sensitivity_95": "specificity at 95 % sensitivity",
    "nll": "NLL (nats)",
    "brier": "Brier score",
    "ece": "ECE (15 equal widths)",
    "ece_equal_mass": "ECE (15 equal masses)",
}
MACRO_METRICS = ("auroc", "auprc", "precision", "f1")
GROUPS_SHOWN = 5
LINE_WIDTH = 100


@dataclass(frozen=True)
class Metric:
    """A figure with the ends of its 95 % interval; NaN where a figure or an interval does not exist."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """How the intervals came about.

    Attributes:
        level: .95.
        resamples: number of resamples; 0 where no intervals were asked for.
        unit: what was drawn, ``example`` or ``group``.
        units: how many of them there are.
        lacking: resamples left out since a class was missing from them.
        seed: of the draws.
    """

    level: float
    resamples: int
    unit: str
    units: int
    lacking: int
    seed: int


@dataclass(frozen=True)
class MetricsReport:
    """Everything `evaluate_predictions` finds; `to_dict` makes it JSON.

    Attributes:
        count: number of examples.
        class_names: by class number.
        class_counts: examples by true class.
        threshold: probability of class 1 from which on an example is called class 1; None with more classes.
        metrics: the headline figures by name, in the order of a table. With more than two classes AUROC, AUPRC,
            precision and F1 are means over classes (macro, one versus rest).
        confusion_matrix: `[K][K]`, row = true class, column = predicted class.
        per_class: precision, recall, specificity, F1 and support of each class.
        baselines: what a model without any knowledge reaches, by metric: always the most frequent class for
            ``accuracy``, its share for ``auprc``, the shares of the classes as probabilities for ``nll`` and
            ``brier``; and for ``ece`` what a perfectly calibrated model would show on as many examples.
        majority_class: name of the most frequent class.
        resampling: how the intervals came about.
        groups: figures per group, empty where there are none.
        notes: what a reader must know, in sentences.
    """

    count: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    threshold: float | None
    metrics: dict[str, Metric]
    confusion_matrix: tuple[tuple[int, ...], ...]
    per_class: tuple[ClassRow, ...]
    baselines: dict[str, float]
    majority_class: str
    resampling: Resampling
    groups: tuple[GroupRow, ...]
    notes: tuple[str, ...]

    @property
    def decision_threshold(self) -> float:
        """``threshold`` (0 is one: it flags everybody), or .5 with more classes, where none plays a part."""
        return 0.5 if self.threshold is None else self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dictionaries and numbers for `json.dump`, None for figures that do not exist."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MetricsReport:
        """Rebuild a report from `to_dict` (or its JSON)."""

        def known(row: dict[str, Any]) -> dict[str, Any]:
            return {key: math.nan if value is None else value for key, value in row.items()}

        groups = [known(row) for row in values["groups"]]
        for row in groups:
            row["class_counts"] = tuple(row["class_counts"])
            row["predicted_counts"] = tuple(row["predicted_counts"])
        return cls(
            count=values["count"],
            class_names=tuple(values["class_names"]),
            class_counts=tuple(values["class_counts"]),
            threshold=values["threshold"],
            metrics={name: Metric(**known(row)) for name, row in values["metrics"].items()},
            confusion_matrix=tuple(tuple(row) for row in values["confusion_matrix"]),
            per_class=tuple(ClassRow(**known(row)) for row in values["per_class"]),
            baselines=known(values["baselines"]),
            majority_class=values["majority_class"],
            resampling=Resampling(**values["resampling"]),
            groups=tuple(GroupRow(**row) for row in groups),
            notes=tuple(values["notes"]),
        )


def format_report(report: MetricsReport) -> str:
    """Lay out a report for a terminal, in plain characters.

    The baseline column says what knowing nothing would reach, for ECE what perfect calibration would.
    """
    parts = [_headline(report), _confusion(report), _classes(report)]
    if report.groups:
        parts.append(_groups(report.groups, binary=report.threshold is not None))
    if report.notes:
        parts.append("\n".join(_wrapped(f"note: {note}") for note in report.notes))
    return "\n\n".join(parts) + "\n"


def metric_label(name: str, binary: bool = True) -> str:
    """Name of a headline figure as a reader knows it."""
    label = METRIC_LABELS.get(name, name)
    return label if binary or name not in MACRO_METRICS else f"{label} (macro)"


def format_figure(value: float) -> str:
    """Four decimals, or a dash for a figure that does not exist."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def _headline(report: MetricsReport) -> str:
    binary = report.threshold is not None
    counts = ", ".join(
        f"{count:,} {name}" for name, count in zip(report.class_names, report.class_counts, strict=True)
    )
    lines = [f"{report.count:,} examples: {counts}"]
    if binary:
        lines.append(f"called {report.class_names[1]!r} from a probability of {report.threshold:.4g} on")
    resampling = report.resampling
    if resampling.resamples:
        lines.append(
            f"95 % intervals: {resampling.resamples:,} bootstrap resamples of {resampling.units:,} "
            f"{resampling.unit}s, seed {resampling.seed}"
        )
    remarks = {
        "accuracy": f" (always {report.majority_class!r})",
        "ece": " (if calibrated)",
        "ece_equal_mass": " (if calibrated)",
    }
    rows = []
    for name, metric in report.metrics.items():
        interval = "" if math.isnan(metric.low) else f"{metric.low:.4f} to {metric.high:.4f}"
        baseline = format_figure(report.baselines[name]) if name in report.baselines else ""
        baseline += remarks.get(name, "")
        rows.append([metric_label(name, binary), format_figure(metric.value), interval, baseline])
    return "\n".join([*map(_wrapped, lines), "", *_columns(["", "value", "95 % interval", "baseline"], rows)])


def _confusion(report: MetricsReport) -> str:
    rows = [
        [name, *(f"{cell:,}" for cell in row)]
        for name, row in zip(report.class_names, report.confusion_matrix, strict=True)
    ]
    return "\n".join(_columns(["true \\ predicted", *report.class_names], rows, right=True))


def _classes(report: MetricsReport) -> str:
    rows = [
        [
            row.name,
            *map(format_figure, (row.precision, row.recall, row.specificity, row.f1)),
            f"{row.support:,.0f}",
        ]
        for row in report.per_class
    ]
    header = ["class", "precision", "recall", "specificity", "F1", "support"]
    return "\n".join(_columns(header, rows, right=True))


def _groups(groups: Sequence[GroupRow], binary: bool) -> str:
    accuracies = sorted(row.accuracy for row in groups)
    middle = (accuracies[(len(groups) - 1) // 2] + accuracies[len(groups) // 2]) / 2
    shown = sorted(groups, key=lambda row: (row.accuracy, row.group))[:GROUPS_SHOWN]
    header = ["lowest accuracy", "examples", "accuracy"]
    header += ["sensitivity", "specificity", "AUROC"] if binary else []
    rows = []
    for row in shown:
        figures = (row.accuracy, row.sensitivity, row.specificity, row.auroc) if binary else (row.accuracy,)
        rows.append([row.group, f"{row.count:,}", *map(format_figure, figures)])
    lowest, highest = format_figure(accuracies[0]), format_figure(accuracies[-1])
    summary = f"{len(groups):,} groups: accuracy from {lowest} to {highest}, median {format_figure(middle)}"
    return "\n".join([summary, "", *_columns(header, rows, right=True)])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, LINE_WIDTH, subsequent_indent="      ", break_long_words=False)


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Pad cells to columns; the first to the left, the others to the right where ``right``."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [
        line(table[0]),
        "-" * len(line(table[0]).ljust(sum(widths) + 2 * len(widths) - 2)),
        *map(line, table[1:]),
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
