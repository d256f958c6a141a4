"""``MODEL_CARD.md``: what a model is for, what it was made of, how good it is and where it ends.

The headings follow Mitchell et al. 2019, "Model cards for model reporting" (arXiv:1810.03993).
"""

from __future__ import annotations

from collections.abc import Sequence

from pcam_jax.metrics.report import Metric, metric_label
from pcam_jax.run.folder import Run
from pcam_jax.run.predictions import Evaluation

_LISTED = (
    "auroc",
    "auprc",
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "nll",
    "brier",
    "ece",
)


def model_card(run: Run, evaluations: Sequence[Evaluation], limits: Sequence[str]) -> str:
    """The card as Markdown.

    Args:
        run: the run.
        evaluations: of it, the most telling first.
        limits: what a reader must not conclude, in sentences.
    """
    environment, config = run.environment, run.config
    data = environment["data"]
    classes = ", ".join(f"{number} = {name}" for number, name in enumerate(data["class_names"]))
    height, width, _ = data["image_shape"]
    lines = [
        f"# Model card: {config.model.name}, run {run.path.name}",
        "",
        "**Research use only. Not a medical device.**",
        "",
        "## Model",
        "",
        f"- Network: `{config.model.name}`, {environment['params']:,} parameters, {config.train.precision}.",
        f"- Input: one RGB image of {height} x {width} pixels, 8 bits a channel.",
        f"- Output: calibrated probability of each class ({classes}).",
        f"- Trained: {environment['started']}, by `{environment['command']}`.",
        f"- Weights: those of step {evaluations[0].step}, chosen by {config.train.monitor}.",
        "",
        "## Intended use",
        "",
        "Research and teaching: studying classifiers of microscopic images, comparing methods, checking software.",
        "",
        "Not for diagnosis, not for triage, not for any decision about a patient, and not for images of another kind "
        "than those below.",
        "",
        "## Data",
        "",
        f"- Store `{data['store']}`, digest `{data['digest']}`.",
    ]
    for split, counts in data["examples_by_class"].items():
        by_class = ", ".join(
            f"{count:,} {name}" for count, name in zip(counts, data["class_names"], strict=True)
        )
        lines.append(f"- {split}: {by_class}.")
    lines.append(f"- Slides or patients: {data['groups'] or 'not known'}.")
    lines += ["", "## How good it is", ""]
    for evaluation in evaluations:
        lines += _figures(evaluation)
    lines += ["## Limits", "", *(f"- {limit}" for limit in limits), ""]
    lines += [
        "## More",
        "",
        "`report.html` beside this file holds all figures, curves and heat maps; `config.toml` every setting;",
        "`predictions/` each single prediction behind the figures.",
        "",
    ]
    return "\n".join(lines)


def _figures(evaluation: Evaluation) -> list[str]:
    report = evaluation.report
    binary = report.threshold is not None
    drawn = report.resampling
    how = (
        f"intervals of 95 % from {drawn.resamples:,} bootstrap resamples of {drawn.units:,} {drawn.unit}s"
        if drawn.resamples
        else "without intervals"
    )
    lines = [
        f"On {evaluation.name}, {report.count:,} examples; {how}.",
        "",
        "| figure | value | 95 % interval |",
        "|---|---:|---:|",
    ]
    listed = {name: report.metrics[name] for name in _LISTED if name in report.metrics}
    lines += [
        f"| {metric_label(name, binary)} | {_number(metric.value)} | {_interval(metric)} |"
        for name, metric in listed.items()
    ]
    lines.append("")
    if evaluation.meaning:
        lines += [evaluation.meaning, ""]
    for note in report.notes:
        lines += [f"Note: {note}", ""]
    return lines


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"


def _interval(metric: Metric) -> str:
    return "" if metric.low != metric.low else f"{metric.low:.4f} to {metric.high:.4f}"
