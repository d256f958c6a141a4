"""``report.html`` and ``MODEL_CARD.md``: everything a run says of itself, in one page and one text.

Both are made of what lies in the run folder alone, so they can be made again anywhere.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pcam_jax.config.files import changed_settings, config_to_toml
from pcam_jax.config.schema import Config
from pcam_jax.inference.saliency import METHOD_LABELS
from pcam_jax.metrics.report import Metric
from pcam_jax.report import figures, html
from pcam_jax.report.card import model_card
from pcam_jax.report.evaluation_section import evaluation_section, evaluation_title, headline_cards
from pcam_jax.report.explanations import StoredExplanation, read_explanation
from pcam_jax.report.html import Html
from pcam_jax.report.overlay import as_jpeg
from pcam_jax.run.folder import Run
from pcam_jax.run.predictions import Evaluation, evaluation_names, read_evaluation
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import write_text_atomic
from pcam_jax.training.control import HistoryRow

REPORT, CARD = "report.html", "MODEL_CARD.md"
TILE_PIXELS = 192
_REMOVED = {"blur": "blurred away", "white": "made white"}
"""Height of the heat-map pictures inside the page; the files in ``explain/`` may be larger."""


def write_report(run: Run) -> Path:
    """Write the report and the model card of a run; returns the report's path.

    Raises:
        UserError: the run was not evaluated yet, or a file of it is damaged.
    """
    evaluations = [read_evaluation(run, name) for name in evaluation_names(run)]
    if not evaluations:
        raise UserError(
            f"{run.path} was not evaluated yet: run `python -m pcam_jax.evaluate {run.path}` first."
        )
    path = run.path / REPORT
    write_text_atomic(path, report_page(run, evaluations))
    write_text_atomic(run.path / CARD, model_card(run, evaluations, limits(run, evaluations)))
    return path


def report_page(run: Run, evaluations: list[Evaluation]) -> str:
    """The report as one HTML text; `pcam_jax.report.html` says what it may hold."""
    environment, config = run.environment, run.config
    begun = environment["started"][:16].replace("T", " ")
    sections = [("summary", "In short", _summary(run, evaluations[0]))]
    sections.append(("data", "Data", _data(run)))
    sections.append(("training", "Training", _training(run)))
    for evaluation in evaluations:
        name = f"evaluation-{evaluation.name}"
        sections.append((name, evaluation_title(evaluation), evaluation_section(evaluation)))
    for evaluation in evaluations:
        explanation = read_explanation(run, evaluation)
        if explanation is not None:
            heading = "What the network looked at"
            heading += f" ({evaluation.name})" if len(evaluations) > 1 else ""
            sections.append((f"heat-{evaluation.name}", heading, _explanation(explanation)))
    sections.append(("limits", "Limits", html.bullets(limits(run, evaluations))))
    sections.append(("repeat", "To repeat it", _repeat(run)))
    return html.page(
        f"Report on {config.model.name}, run {run.path.name}",
        f"What the network {config.model.name} was trained on, and how good it is.",
        f"Trained on {Path(environment['data']['store']).name}, begun {begun} UTC; "
        f"written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        sections,
    )


def _summary(run: Run, evaluation: Evaluation) -> Html:
    data = run.environment["data"]
    trained = sum(data["examples_by_class"]["train"])
    classes = " from ".join(reversed(evaluation.report.class_names)) if len(data["class_names"]) == 2 else ""
    what = f"tells {classes}" if classes else f"tells {len(data['class_names'])} classes apart"
    result = run.result or {}
    warning = "This run has collapsed: every validation example got the same probability."
    return html.join(
        html.paragraph(
            f"A network {run.config.model.name} with {run.environment['params']:,} parameters that {what}, trained "
            f"on {trained:,} images. The figures below are those on {evaluation.split}, {evaluation.report.count:,} "
            "images that it was not trained on."
            if evaluation.split != "train"
            else "The figures below are those on its own training images."
        ),
        headline_cards(evaluation),
        html.paragraph(evaluation.meaning, "say") if evaluation.meaning else "",
        html.paragraph(warning, "note") if result.get("collapsed") else "",
    )


def _data(run: Run) -> Html:
    environment, config = run.environment, run.config
    data = environment["data"]
    counts: dict[str, list[int]] = data["examples_by_class"]
    rows = [
        [split, *(f"{n:,}" for n in by_class), f"{sum(by_class):,}"] for split, by_class in counts.items()
    ]
    height, width, channels = data["image_shape"]
    groups = f"{data['groups']:,} (slides or patients)" if data["groups"] else "not known"
    return html.join(
        html.table("Labelled images by split and class", ["split", *data["class_names"], "all"], rows),
        html.facts(
            {
                "Images": f"{height} x {width} pixels, {channels} channels",
                "Groups": groups,
                "Split": _split_in_words(config, bool(data["groups"])),
                "Store": data["store"],
                "Its digest": data["digest"],
            }
        ),
    )


def _split_in_words(config: Config, grouped: bool) -> str:
    settings = config.data
    if settings.split_file:
        return f"given by {settings.split_file}"
    how = f"{100 * settings.validation_fraction:g} % held out"
    if settings.folds:
        how = f"fold {settings.fold} of {settings.folds}"
    if grouped and settings.split_by == "group":
        return f"{how}; a slide or patient is never on both sides; seed {settings.split_seed}"
    return f"{how}; by single images, so that images of one slide may be on both sides; seed {settings.split_seed}"


def _training(run: Run) -> Html:
    history, config, result = run.history(), run.config, run.result or {}
    if not history:
        return html.paragraph("No epoch has ended yet.")
    best_step = result.get("best_step") or history[-1]["step"]
    best = next((row for row in history if row["step"] == best_step), history[-1])
    seconds = sum(row["seconds"] for row in history)
    speed = float(np.median([row["images_per_second"] for row in history]))
    drawn = [
        html.drawing(
            figures.draw_training_curves(history, best["epoch"], only=panel), _curve_in_words(panel, history)
        )
        for panel, _ in figures.TRAINING_PANELS
    ]
    return html.join(
        html.figures(drawn, "small"),
        html.facts(
            {
                "Best epoch": f"{best['epoch']:.0f} of {len(history)} (step {best['step']:.0f}), by "
                f"{config.train.monitor}",
                "Ended": result.get("reason", "not yet"),
                "Time": f"{_duration(seconds)} of training, {speed:,.0f} images a second (median epoch)",
                "Devices": run.environment["devices"],
                "Settings changed": ", ".join(changed_settings(Config(), config)) or "none",
            }
        ),
    )


def _curve_in_words(panel: str, history: list[HistoryRow]) -> str:
    first, last = history[0], history[-1]
    lines = dict(figures.TRAINING_PANELS)[panel]
    ends = "; ".join(f"{name} from {first[key]:.3g} to {last[key]:.3g}" for key, name in lines)
    return f"{panel} over {len(history)} epochs: {ends}."


def _explanation(explanation: StoredExplanation) -> Html:
    summary = explanation.summary
    methods = [METHOD_LABELS[name] for name in summary["methods"]]
    parts = [
        html.paragraph(
            f"From left to right: the image, then the heat of {' and of '.join(methods)}. Yellow is where the "
            "evidence is strongest, clear where there is none; colours are scaled to each image, so they tell where, "
            "not how much. A heat map shows what the network used, not what is there."
            + (" The square is the centre that alone decides the label." if summary["central_side"] else "")
        ),
        *(heat_verdict(summary, method) for method in summary["methods"]),
        _heat_figures(summary),
    ]
    for category in summary["categories"]:
        rows = [row for row in explanation.rows if row["category"] == category["name"]]
        if rows:
            parts.append(html.subheading(category["title"]))
            parts.append(html.tiles([_tile(explanation, row) for row in rows], 1 + len(methods)))
        elif category["name"] in ("missed", "false_alarms", "mistaken"):
            parts.append(html.subheading(category["title"]))
            parts.append(html.paragraph("None."))
    return html.join(*parts)


def heat_verdict(summary: dict[str, Any], method: str) -> Html:
    """Whether a method's maps may be believed for this network, by the deletion check."""
    label, falls = METHOD_LABELS[method], summary["deletion"].get(method, [])
    if not falls:
        return html.paragraph(
            f"{label}: not checked. Do not believe these maps before `python -m pcam_jax.explain RUN --check` has "
            "shown that the score hangs on what they call hot.",
            "note",
        )
    passed = [fall["removal"] for fall in falls if _passed(fall)]
    if len(passed) == len(falls):
        return html.paragraph(
            f"{label}: checked. Taking away what these maps call hot lowers the score more than taking away "
            "the same region at a random place, and more than taking away the hot places of another image.",
            "say",
        )
    if passed:
        return html.paragraph(
            f"{label}: the check is undecided. What these maps call hot lowers the score more than as much elsewhere "
            f"where it is {_REMOVED[passed[0]]}, but not in the other way: read them with care.",
            "note",
        )
    return html.paragraph(
        f"{label}: the check failed. Taking away what these maps call hot does not surely lower the score more "
        "than taking away as much elsewhere: do not read them as what the network looked at.",
        "note",
    )


def _passed(fall: dict[str, Any]) -> bool:
    lows = [Metric(**fall[name]).low for name in ("above_moved", "above_elsewhere")]
    return all(low is not None and low > 0 for low in lows)


def _tile(explanation: StoredExplanation, row: dict[str, str]) -> Html:
    with Image.open(explanation.folder / row["picture"]) as picture:
        scale = min(1.0, TILE_PIXELS / picture.height)
        small = picture.convert("RGB").resize((round(picture.width * scale), round(picture.height * scale)))
    methods = explanation.summary["methods"]
    shares = [row[f"central_share_{method}"] for method in methods]
    inside = " and ".join(f"{100 * float(share):.0f} %" for share in shares if share)
    caption = f"{row['label']}, called {row['predicted']} ({float(row['prob']):.3f})"
    square = (
        f"heat in the square: {inside}"
        if inside
        else "no heat"
        if explanation.summary["central_side"]
        else ""
    )
    alt = f"Image {row['id']}: {caption}. {square}".strip()
    lines = [html.text(caption + (f"; {square}" if square else ""))]
    lines.append(f"{html.text(row['group'])} <code>{html.text(row['id'][:20])}</code>".strip())
    return html.picture(as_jpeg(small), "jpeg", alt, Html("<br>".join(lines)))


def _heat_figures(summary: dict[str, Any]) -> Html:
    rows = []
    for method in summary["methods"]:
        label = METHOD_LABELS[method]
        if method in summary["central_share"]:
            rows.append(
                [
                    f"{label}: share of heat in the central square",
                    *_cells(summary["central_share"][method]),
                    f"{summary['central_chance']:.3f} if heat were even",
                ]
            )
        pointing = summary["pointing"].get(method)
        if pointing:
            chance = Metric(**pointing["chance"]).value
            rows.append(
                [
                    f"{label}: hottest pixel lies in tumour",
                    *_cells(pointing["hit_rate"]),
                    f"{chance:.3f} by chance",
                ]
            )
        for fall in summary["deletion"].get(method, []):
            for name, versus in (
                ("above_moved", "the same region at a random place"),
                ("above_elsewhere", "another image's hottest tenth"),
                ("above_scattered", "a tenth of the pixels, scattered"),
            ):
                how = f"fall of the score if the hottest tenth is {_REMOVED[fall['removal']]}"
                rows.append(
                    [
                        f"{label}: {how}, beyond that of {versus}",
                        *_cells(fall[name]),
                        "0 if heat meant nothing",
                    ]
                )
    if not rows:
        return Html("")
    binary = summary["categories"][0]["name"] == "missed"
    kind = "the positive class" if binary else "all classes"
    return html.table(
        f"Means over {summary['sample_size']:,} images of {kind}; falls of the score in log-odds",
        ["what", "mean", "95 % interval", "compare"],
        rows,
        left=(0, 3),
        stacked=True,
    )


def _cells(metric: dict[str, float | None]) -> tuple[str, str]:
    value, low, high = (metric[name] for name in ("value", "low", "high"))
    return ("-" if value is None else f"{value:.3f}", "" if low is None else f"{low:.3f} to {high:.3f}")


def limits(run: Run, evaluations: list[Evaluation]) -> list[str]:
    """What a reader must not conclude, in sentences."""
    data = run.environment["data"]
    found = [
        "It was made for research and teaching. It has no approval as a medical device and must not take part in the "
        "care of a patient.",
        "It answers for images like those it was trained on: the same kind of tissue, stain, scanner, magnification "
        "and size. On others its probabilities mean nothing, and it does not notice.",
    ]
    if len(data["class_names"]) == 2:
        found.append(
            "Its predictive values hold for the share of positives in these data, which is not that of a clinic."
        )
    if not data["groups"]:
        found.append(
            "The data name no slide or patient: images of one slide may be on both sides of the split, which "
            "flatters all figures, and intervals are too narrow."
        )
    elif run.config.data.split_by != "group":
        found.append("Slides or patients are on both sides of the split, which flatters all figures.")
    if all(evaluation.split == "validation" for evaluation in evaluations):
        found.append(
            "There are validation figures only: the epoch, the temperature and the threshold were chosen on the same "
            "images, so expect a little less on new ones."
        )
    if Path(data["store"]).name.startswith("sample"):
        found.append("The images are synthetic: nothing here says anything about medicine.")
    return found


def _repeat(run: Run) -> Html:
    environment = run.environment
    facts = {"Commit": environment["commit"] or "not from a source tree", "Python": environment["python"]}
    facts |= {"Platform": environment["platform"], "Devices": environment["devices"]}
    facts |= environment["packages"]
    return html.join(
        html.subheading("Command"),
        html.code(environment["command"], wrapped=True),
        html.subheading("Environment"),
        html.facts(facts),
        html.subheading("Settings"),
        html.details("All settings (config.toml)", html.code(config_to_toml(run.config))),
    )


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "an unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
