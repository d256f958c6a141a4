"""An explanation as files in the run: a strip of pictures for each example, a table, and the figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

from pcam_jax.inference.explanation import Explained, Explanation
from pcam_jax.report.overlay import as_png, draw_strip
from pcam_jax.run.folder import Run
from pcam_jax.run.predictions import Evaluation
from pcam_jax.runtime.files import atomic_write, sync_folder, write_json_atomic

FOLDER = "explain"
TABLE, SUMMARY = "examples.csv", "summary.json"
_FORMAT = 3  # earlier ones knew other heat maps and checks


@dataclasses.dataclass(frozen=True)
class StoredExplanation:
    """What `write_explanation` wrote.

    Attributes:
        folder: where the pictures are.
        summary: methods, step, shares and checks; see `explanation_summary`.
        rows: of the table, one per example.
    """

    folder: Path
    summary: dict[str, Any]
    rows: list[dict[str, str]]


def write_explanation(run: Run, explanation: Explanation) -> Path:
    """Write ``explain/<evaluation>/``, completely or not at all, in place of an earlier one; returns the folder."""
    folder = run.path / FOLDER / explanation.evaluation.name
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for example in explanation.examples:
        strip = draw_strip(
            example.image, [example.heat[method] for method in explanation.methods], explanation.central_side
        )
        (partial / picture_name(example)).write_bytes(as_png(strip))
    with atomic_write(partial / TABLE) as file:
        _write_table(file, run, explanation)
    write_json_atomic(partial / SUMMARY, explanation_summary(explanation))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync_folder(folder.parent)
    return folder


def read_explanation(run: Run, evaluation: Evaluation) -> StoredExplanation | None:
    """The explanation of an evaluation, or None where there is none for these weights, examples and threshold."""
    folder = run.path / FOLDER / evaluation.name
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        with open(folder / TABLE, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if summary["of"] != explained_state(evaluation) or summary["format"] != _FORMAT:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # it is made anew by one command, so damage is not worth a halt
    return StoredExplanation(folder, summary, rows)


def explained_state(evaluation: Evaluation) -> dict[str, Any]:
    """What decides which examples are worth looking at, and what a net sees in them."""
    return {
        "step": evaluation.step,
        "examples_digest": evaluation.examples_digest,
        "threshold": evaluation.report.threshold,
    }


def explanation_summary(explanation: Explanation) -> dict[str, Any]:
    """The figures as plain values, None where one does not exist."""
    values = {
        "format": _FORMAT,
        "of": explained_state(explanation.evaluation),
        "methods": list(explanation.methods),
        "central_side": explanation.central_side,
        "central_chance": explanation.central_chance,
        "sample_size": explanation.sample_size,
        "categories": [
            {"name": category.name, "title": category.title, "count": len(category.members)}
            for category in explanation.categories
        ],
    }
    for name in ("central_share", "pointing"):
        found = getattr(explanation, name)
        values[name] = {method: dataclasses.asdict(value) for method, value in found.items()}
    values["deletion"] = {
        method: [dataclasses.asdict(fall) for fall in falls] for method, falls in explanation.deletion.items()
    }
    return _plain(values)


def picture_name(example: Explained) -> str:
    """A file name that sorts by category and rank, without what file systems refuse."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", example.id)[-40:].lstrip(".")
    return f"{example.category}-{example.rank:02d}-{readable}.png"


def _write_table(file: Any, run: Run, explanation: Explanation) -> None:
    writer = csv.writer(file, lineterminator="\n")
    shares = [f"central_share_{method}" for method in explanation.methods]
    columns = ["category", "rank", "id", "group", "label", "predicted", "prob", "loss", "heat_for"]
    writer.writerow([*columns, *shares, "picture"])
    names = run.class_names
    for example in explanation.examples:
        figures = [example.prob, example.loss]
        central = [example.central_share[method] for method in explanation.methods]
        writer.writerow(
            [
                *(example.category, example.rank, example.id, example.group),
                *(names[example.label], names[example.predicted]),
                *(f"{value:.6g}" for value in figures),
                names[example.target],
                *("" if value != value else f"{value:.4f}" for value in central),
                picture_name(example),
            ]
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and value != value else value
