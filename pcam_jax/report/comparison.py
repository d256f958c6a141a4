"""A comparison of runs as text, as one figure, and as a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pcam_jax.metrics.ranking import roc_curve
from pcam_jax.metrics.report import LINE_WIDTH, Metric, format_figure, metric_label
from pcam_jax.report import figures, html
from pcam_jax.report.canvas import LEGEND_POINTS, SERIES_COLORS, SERIES_STYLES, new_axes
from pcam_jax.report.html import Html
from pcam_jax.run.comparison import ComparedRun, Comparison

_TESTED = ("auroc", "auprc", "accuracy", "sensitivity", "specificity", "nll", "brier")
# calibration errors are biased, each by its own amount, so the interval of their difference says little
_NOT_TESTED = ("ece", "ece_equal_mass")


def comparison_text(comparison: Comparison) -> str:
    """The table of costs and figures, and the tests, in plain characters; runs are columns."""
    runs = comparison.runs
    table = [["", *(run.name for run in runs)], *_cost_rows(runs), *_metric_rows(runs)]
    lines = [_columns(table), "", _wrapped(_tests_in_words(comparison)), ""]
    tests = [["reference minus", "figure", "difference", "95 % interval", "p (bootstrap)"]]
    for test in comparison.tests:
        for name in _TESTED:
            if name in test.differences:
                difference = test.differences[name]
                tests.append(
                    [
                        test.name,
                        metric_label(name, _binary(comparison)),
                        _signed(difference.value),
                        f"{_signed(difference.low)} to {_signed(difference.high)}",
                        _p_value(difference.p_value),
                    ]
                )
    if len(tests) > 1:
        lines += [_columns(tests, left=2), ""]
    lines += [_wrapped(_exact_tests(comparison, number)) for number in range(len(comparison.tests))]
    return "\n".join(lines).rstrip()


def draw_comparison(comparison: Comparison) -> Figure:
    """ROC curves, AUROCs with their intervals, and validation AUROC over training time, in one figure.

    With more than two classes there are no ROC curves.
    """
    drawn = [_draw_aurocs, _draw_training]
    if _binary(comparison):
        drawn.insert(0, _draw_roc)
    figure, panels = new_axes(columns=len(drawn), width=4.8, height=4.2)
    for draw, axes in zip(drawn, panels, strict=True):
        draw(comparison, axes)
    return figure


def _draw_roc(comparison: Comparison, axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color="#666666", linewidth=1, linestyle=":")
    for place, run in enumerate(comparison.runs):
        curve = roc_curve(run.evaluation.labels, run.evaluation.probs)
        figures.plot_line(axes, curve.false_positive_rate, curve.true_positive_rate, place, run.name)
    axes.set_xlabel("1 - specificity (false positive rate)")
    axes.set_ylabel("sensitivity (true positive rate)")
    axes.legend(frameon=False, fontsize=LEGEND_POINTS, loc="lower right")


def _draw_aurocs(comparison: Comparison, axes: Axes) -> None:
    runs = comparison.runs
    places = np.arange(len(runs))[::-1]
    for number, (place, run) in enumerate(zip(places, runs, strict=True)):
        metric = run.evaluation.report.metrics["auroc"]
        color = SERIES_COLORS[number % len(SERIES_COLORS)]
        if not math.isnan(metric.low):
            axes.plot([metric.low, metric.high], [place, place], color=color, linewidth=4, alpha=0.45)
        axes.plot([metric.value], [place], "o", color=color)
    axes.set_yticks(places, [run.name for run in runs])
    axes.set_ylim(-0.7, len(runs) - 0.3)
    axes.set_xlabel(f"{metric_label('auroc', _binary(comparison))} on {comparison.split}, 95 % interval")


def _draw_training(comparison: Comparison, axes: Axes) -> None:
    for number, run in enumerate(comparison.runs):
        history = run.run.history()
        axes.plot(
            np.cumsum([row["seconds"] for row in history]) / 60,
            [row["validation_auroc"] for row in history],
            color=SERIES_COLORS[number % len(SERIES_COLORS)],
            linestyle=SERIES_STYLES[number % len(SERIES_STYLES)],
            marker="o",
            markersize=3,
            label=run.name,
        )
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("validation AUROC of each epoch")
    axes.legend(frameon=False, fontsize=LEGEND_POINTS, loc="lower right")


def comparison_page(comparison: Comparison) -> str:
    """The comparison as one self-contained HTML text."""
    runs = comparison.runs
    first = runs[0].evaluation
    header = ["", *(run.name for run in runs)]
    areas = "; ".join(
        f"{run.name} {format_figure(run.evaluation.report.metrics['auroc'].value)}" for run in runs
    )
    drawn = []
    for draw, shown in (
        (_draw_aurocs, f"AUROC of each run with its interval: {areas}."),
        (_draw_training, "Validation AUROC of each run after each epoch, over minutes of training."),
    ):
        figure, (axes,) = new_axes()  # each alone, so that a phone shows it large enough
        draw(comparison, axes)
        drawn.append(html.drawing(figure, shown))
    sections = [
        ("table", "Side by side", html.join(
            html.table("What each run cost", header, _cost_rows(runs), stacked=True),
            html.table("How good each run is, with 95 % intervals", header, _metric_rows(runs), stacked=True),
            html.figures(drawn),
        )),
        ("tests", "Do they differ?", _tests(comparison)),
        ("curves", "Curves", _curves(comparison)),
    ]  # fmt: skip
    return html.page(
        f"Comparison of {len(runs)} runs",
        "Runs of pcam_jax on the same examples, side by side.",
        f"On {comparison.split}, {len(first.labels):,} examples, the same for all; {datetime.now(UTC):%Y-%m-%d}.",
        sections,
    )


def _cost_rows(runs: Sequence[ComparedRun]) -> list[list[str]]:
    return [
        ["network", *(run.run.config.model.name for run in runs)],
        ["parameters", *(f"{run.run.environment['params']:,}" for run in runs)],
        ["epochs", *(f"{run.epochs}" for run in runs)],
        ["training, minutes", *(f"{run.train_seconds / 60:.1f}" for run in runs)],
        ["training, images/s", *(_rate(run.train_rate) for run in runs)],
        ["prediction, images/s", *(_rate(run.evaluation.images_per_second) for run in runs)],
        ["threshold", *(_threshold(run) for run in runs)],
    ]


def _metric_rows(runs: Sequence[ComparedRun]) -> list[list[str]]:
    reports = [run.evaluation.report for run in runs]
    binary = reports[0].threshold is not None
    return [
        [metric_label(name, binary), *(_with_interval(report.metrics[name]) for report in reports)]
        for name in reports[0].metrics
    ]


def _tests(comparison: Comparison) -> Html:
    parts = [html.paragraph(_tests_in_words(comparison))]
    for number, test in enumerate(comparison.tests):
        rows = [
            [
                metric_label(name, _binary(comparison)),
                _signed(difference.value),
                f"{_signed(difference.low)} to {_signed(difference.high)}",
                _p_value(difference.p_value),
            ]
            for name, difference in test.differences.items()
            if name not in _NOT_TESTED
        ]
        parts.append(html.subheading(f"{comparison.reference.name} minus {test.name}"))
        parts.append(html.paragraph(_exact_tests(comparison, number)))
        if rows:
            parts.append(
                html.table(
                    f"Differences between {comparison.reference.name} and {test.name}, by paired bootstrap",
                    ["figure", "difference", "95 % interval", "p"],
                    rows,
                    stacked=True,
                )
            )
    return html.join(*parts)


def _curves(comparison: Comparison) -> Html:
    runs = comparison.runs
    if not _binary(comparison):
        return html.paragraph("Curves of several classes are in each run's own report.")
    sets = [figures.ScoredSet(run.name, run.evaluation.labels, run.evaluation.probs) for run in runs]
    probs = {run.name: run.evaluation.probs for run in runs}
    labels = runs[0].evaluation.labels
    return html.figures(
        [
            html.drawing(figures.draw_roc(sets), "ROC curves of all runs."),
            html.drawing(figures.draw_precision_recall(sets), "Precision-recall curves of all runs."),
            html.drawing(figures.draw_reliability(labels, probs), "Reliability of all runs' probabilities."),
        ]
    )


def _tests_in_words(comparison: Comparison) -> str:
    grouped = (
        "Whole groups (slides or patients) are drawn."
        if comparison.grouped
        else "Examples count as independent, as no groups are known: p-values are too small where they are not."
    )
    return (
        f"The reference is {comparison.reference.name}, of the highest AUROC; each other run is tested against it on "
        f"the same examples. {grouped} The reference was picked by these very figures, which favours it."
    )


def _exact_tests(comparison: Comparison, number: int) -> str:
    test = comparison.tests[number]
    sentences = []
    if test.delong is not None:
        delong, tests = test.delong, len(comparison.tests)
        adjusted = f", adjusted for {tests} tests {_p_value(test.delong_adjusted)}" if tests > 1 else ""
        sentences.append(
            f"AUROC {delong.auroc_a:.4f} against {delong.auroc_b:.4f} of {test.name}: difference "
            f"{_signed(delong.difference)} ({_signed(delong.low)} to {_signed(delong.high)}), DeLong p "
            f"{_p_value(delong.p_value)}{adjusted}."
        )
    sentences.append(
        f"Only {comparison.reference.name} is right on {test.mcnemar.only_a_right:,} examples, only {test.name} on "
        f"{test.mcnemar.only_b_right:,} (McNemar p {_p_value(test.mcnemar.p_value)}"
        + ("; it takes examples as independent)." if comparison.grouped else ").")
    )
    return " ".join(sentences)


def _binary(comparison: Comparison) -> bool:
    return comparison.reference.evaluation.probs.ndim == 1


def _with_interval(metric: Metric) -> str:
    if math.isnan(metric.low):
        return format_figure(metric.value)
    return f"{format_figure(metric.value)} ({metric.low:.3f} to {metric.high:.3f})"


def _threshold(run: ComparedRun) -> str:
    threshold = run.evaluation.report.threshold
    return "-" if threshold is None else f"{threshold:.3g} ({run.evaluation.criterion})"


def _rate(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.0f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}"


def _p_value(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, LINE_WIDTH, break_long_words=False, break_on_hyphens=False)


def _columns(table: Sequence[Sequence[str]], left: int = 1) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )
