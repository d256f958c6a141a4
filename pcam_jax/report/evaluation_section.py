"""The part of a report that says how good a run is on one set of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pcam_jax.metrics.recalibration import apply_temperature, crossfit_isotonic
from pcam_jax.metrics.report import METRIC_LABELS, Metric, MetricsReport, format_figure, metric_label
from pcam_jax.report import figures, html
from pcam_jax.report.group_figure import draw_groups
from pcam_jax.report.html import Html
from pcam_jax.run.predictions import Evaluation

GROUPS_SHOWN = 10
_MEANINGS = {
    "auroc": "chance that a {positive} patch gets a higher probability than a {negative} one",
    "auprc": "mean precision over all thresholds; its baseline is the share of {positive}",
    "accuracy": "share called right",
    "balanced_accuracy": "mean of the shares found of each class",
    "sensitivity": "share of {positive} patches found",
    "specificity": "share of {negative} patches left alone",
    "precision": "share of the patches called {positive} that are",
    "f1": "harmonic mean of precision and sensitivity",
    "mcc": "correlation of answer and truth, from -1 to 1",
    "sensitivity_at_specificity_95": "found, if 5 % of {negative} patches may be flagged",
    "specificity_at_sensitivity_95": "left alone, if 95 % of {positive} patches must be found",
    "nll": "surprise at the truth, in nats; lower is better",
    "brier": "mean squared error of the probability; lower is better",
    "ece": "gap between probability and frequency; the baseline is what chance alone shows",
    "ece_equal_mass": "the same in bins of equal numbers",
}
_MEANINGS_OF_MORE = _MEANINGS | {
    "auroc": "chance that a patch of a class gets a higher probability of it than another, mean over classes",
    "auprc": "mean precision over all thresholds, mean over classes",
    "precision": "share of the patches given to a class that belong there, mean over classes",
    "f1": "harmonic mean of precision and recall, mean over classes",
    "brier": "squared error of the probabilities, summed over classes; lower is better",
}
_UNIT_RANGE = [name for name in METRIC_LABELS if name != "nll"]


def evaluation_title(evaluation: Evaluation) -> str:
    """What was evaluated, in words."""
    averaged = ", averaged over eight symmetries" if evaluation.tta == "d4" else ""
    return f"Figures on {evaluation.split}{averaged}"


def evaluation_section(evaluation: Evaluation) -> Html:
    """Figures with intervals, confusion matrix, curves, calibration and groups, as HTML."""
    report = evaluation.report
    return html.join(
        html.paragraph(_examples_sentence(evaluation)),
        *(html.paragraph(note, "note") for note in report.notes),
        metric_table(report),
        html.subheading("Right and wrong calls"),
        _confusion(evaluation),
        html.subheading("Curves"),
        _curves(evaluation),
        html.subheading("Calibration"),
        _calibration(evaluation),
        _groups(report),
    )


def headline_cards(evaluation: Evaluation) -> Html:
    """The three or four figures a reader looks for first."""
    report = evaluation.report
    names = ["auroc", "sensitivity", "specificity"] if report.threshold is not None else ["auroc"]
    return html.cards(
        [
            (
                metric_label(name, report.threshold is not None),
                _value(report.metrics[name]),
                _range(report, name),
            )
            for name in [*names, "accuracy"]
        ]
    )


def metric_table(report: MetricsReport) -> Html:
    """All headline figures, each with its interval, its baseline and what it says."""
    binary = report.threshold is not None
    meanings = _MEANINGS if binary else _MEANINGS_OF_MORE
    words = dict(zip(("negative", "positive"), report.class_names, strict=False)) if binary else {}
    rows = []
    for name, metric in report.metrics.items():
        baseline = report.baselines.get(name, math.nan)
        meaning = meanings.get(name, "").format(**words) if words else meanings.get(name, "")
        label = Html(f"{html.text(metric_label(name, binary))}<small>{html.text(meaning)}</small>")
        bar = (
            html.interval_bar(metric.value, metric.low, metric.high, baseline) if name in _UNIT_RANGE else ""
        )
        rows.append(
            [
                label,
                format_figure(metric.value),
                _interval(metric),
                "" if math.isnan(baseline) else format_figure(baseline),
                Html(f'<div class="bar">{bar}</div>'),
            ]
        )
    return html.table(
        "Figures of merit",
        ["figure", "value", "95 % interval", "baseline", ""],
        rows,
        left=(0, 4),
        more=f"{_interval_sentence(report)} The baseline is what knowing nothing reaches. In the small pictures, "
        "from 0 to 1, it is the tick; the dot is the figure, the band its interval.",
        stacked=True,
    )


def _examples_sentence(evaluation: Evaluation) -> str:
    report = evaluation.report
    counts = ", ".join(
        f"{count:,} {name}" for name, count in zip(report.class_names, report.class_counts, strict=True)
    )
    known = len(set(evaluation.groups.tolist()) - {""})
    groups = f", from {known:,} groups (slides or patients)" if known else ""
    return (
        f"{report.count:,} examples of {evaluation.split}: {counts}{groups}. Weights of step {evaluation.step}, "
        f"images from {evaluation.store}."
    )


def _interval_sentence(report: MetricsReport) -> str:
    resampling = report.resampling
    if not resampling.resamples:
        return "No intervals were asked for."
    return (
        f"Intervals of 95 % by bootstrap, {resampling.resamples:,} resamples of {resampling.units:,} "
        f"{resampling.unit}s."
    )


def _confusion(evaluation: Evaluation) -> Html:
    report = evaluation.report
    matrix, names = report.confusion_matrix, report.class_names
    cells = "; ".join(
        f"of {sum(row):,} {name}: "
        + ", ".join(f"{count:,} called {other}" for other, count in zip(names, row, strict=True))
        for name, row in zip(names, matrix, strict=True)
    )
    rows = [
        [
            row.name,
            *map(format_figure, (row.precision, row.recall, row.specificity, row.f1)),
            f"{row.support:,.0f}",
        ]
        for row in report.per_class
    ]
    header = ["class", "precision", "recall", "specificity", "F1", "examples"]
    table = html.table("Each class", header, rows, stacked=True)
    return html.join(
        html.paragraph(evaluation.meaning, "say") if evaluation.meaning else "",
        html.figures(
            [
                html.drawing(
                    figures.draw_confusion_matrix(matrix, names),
                    f"Confusion matrix: {cells}.",
                    "Rows are the true class, columns what the network called it.",
                )
            ],
            "lone",
        ),
        table,
    )


def _curves(evaluation: Evaluation) -> Html:
    report = evaluation.report
    if 0 in report.class_counts and report.threshold is not None:
        return html.paragraph("Curves need examples of both classes.")
    sets = figures.scored_classes(evaluation.labels, evaluation.probs, report.class_names)
    threshold = report.threshold
    auroc, auprc = (format_figure(report.metrics[name].value) for name in ("auroc", "auprc"))
    drawn = [
        html.drawing(
            figures.draw_roc(sets, threshold),
            f"ROC curve: sensitivity against false positive rate, area {auroc}.",
            "ROC: what sensitivity costs in false alarms. The diagonal is guessing.",
        ),
        html.drawing(
            figures.draw_precision_recall(sets, threshold),
            f"Precision-recall curve, average precision {auprc}.",
            "Precision against recall. The dotted line is guessing.",
        ),
    ]
    if threshold is not None:
        sensitivity, specificity = (
            format_figure(report.metrics[name].value) for name in ("sensitivity", "specificity")
        )
        drawn.append(
            html.drawing(
                figures.draw_threshold_curve(evaluation.labels, evaluation.probs, threshold),
                f"Sensitivity, specificity, precision and F1 over the threshold; at {threshold:.3g} sensitivity is "
                f"{sensitivity} and specificity {specificity}.",
                "What another threshold would do.",
            )
        )
    return html.figures(drawn)


def _calibration(evaluation: Evaluation) -> Html:
    maps = {}
    if evaluation.tta == "none":
        maps["as the network says"] = apply_temperature(evaluation.logits, 1.0)
    maps[f"temperature {evaluation.temperature:.3g}"] = evaluation.probs
    isotonic = [row.name for row in evaluation.calibration if row.name.startswith("isotonic (cross")]
    if isotonic:
        groups = evaluation.groups if (evaluation.groups != "").any() else None
        mapped = crossfit_isotonic(evaluation.labels, evaluation.probs, groups)
        maps |= {} if np.isnan(mapped).any() else {"isotonic, cross-fitted": mapped}
    rows = [
        [row.name, *map(format_figure, (row.auroc, row.nll, row.brier, row.ece, row.ece_equal_mass))]
        for row in evaluation.calibration
    ]
    worst = ", ".join(f"{row.name}: ECE {format_figure(row.ece)}" for row in evaluation.calibration)
    return html.join(
        html.paragraph(
            "Do probabilities mean what they say? On the dotted diagonal they do: of all patches given 70 %, seven "
            "in ten are of that class. Bars are 95 % intervals; below is how many patches get each probability."
        ),
        html.figures(
            [
                html.drawing(
                    figures.draw_reliability(evaluation.labels, maps),
                    f"Reliability diagram, observed share against predicted probability; {worst}.",
                )
            ],
            "lone",
        ),
        html.table(
            "Calibration before and after",
            ["probabilities", "AUROC", "NLL", "Brier", "ECE", "ECE, equal mass"],
            rows,
            stacked=True,
        ),
    )


def _groups(report: MetricsReport) -> Html:
    if len(report.groups) < 2:
        return Html("")
    binary = report.threshold is not None
    ordered = sorted(report.groups, key=lambda row: (row.accuracy, row.group))[:GROUPS_SHOWN]
    header = ["group", "examples", "accuracy"]
    header += ["sensitivity", "specificity", "AUROC"] if binary else []
    rows: list[Sequence[str]] = []
    for row in ordered:
        values = (row.accuracy, row.sensitivity, row.specificity, row.auroc) if binary else (row.accuracy,)
        rows.append([row.group, f"{row.count:,}", *map(format_figure, values)])
    accuracies = [row.accuracy for row in report.groups]
    overall = report.metrics["accuracy"].value
    return html.join(
        html.subheading("Groups (slides or patients)"),
        html.drawing(
            draw_groups(report.groups, overall),
            f"Accuracy of each of {len(accuracies)} groups, from {min(accuracies):.3f} to {max(accuracies):.3f}.",
            "Each group's accuracy with its 95 % interval.",
        ),
        html.table(f"The {len(ordered)} groups of lowest accuracy", header, rows, stacked=True),
    )


def _value(metric: Metric) -> str:
    return "-" if math.isnan(metric.value) else f"{metric.value:.3f}"


def _range(report: MetricsReport, name: str) -> list[str]:
    metric, baseline = report.metrics[name], report.baselines.get(name)
    lines = ["no interval" if math.isnan(metric.low) else f"95 %: {metric.low:.3f} to {metric.high:.3f}"]
    return lines if baseline is None else [*lines, f"knowing nothing: {baseline:.3f}"]


def _interval(metric: Metric) -> str:
    return "" if math.isnan(metric.low) else f"{metric.low:.4f} to {metric.high:.4f}"
