"""Which examples are shown, and what is said of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

from pcam_jax.inference.evaluation import evaluate_run
from pcam_jax.inference.explanation import choose_categories, example_losses, explain_run
from pcam_jax.metrics.summary import evaluate_predictions
from pcam_jax.report.explanations import read_explanation, write_explanation
from pcam_jax.report.overlay import draw_strip, overlay
from pcam_jax.run.folder import open_run
from pcam_jax.run.predictions import Evaluation
from pcam_jax.runtime.errors import UserError


def evaluation_of(labels, probs, names=("normal", "tumour"), threshold=0.5):
    labels, probs = np.array(labels), np.array(probs)
    report = evaluate_predictions(labels, probs, class_names=names, threshold=threshold, resamples=0)
    ids = np.array([f"id{number}" for number in range(len(labels))])
    groups = np.full(len(labels), "")
    return Evaluation(
        "validation", "none", 1, "nowhere", ids, groups, labels, probs.reshape(len(labels), -1), probs, report
    )


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    return open_run(shutil.copytree(tiny_run, tmp_path_factory.mktemp("explained") / "run"))


@pytest.fixture(scope="module")
def explained(run):
    evaluation = evaluate_run(run, threshold="0.45", resamples=100)
    return evaluation, explain_run(run, evaluation, count=3, sample_size=6, check=True)


def test_missed_positives_come_first_and_the_most_mistaken_of_them():
    labels = [1, 1, 1, 0, 0, 0, 1, 0]
    probs = [0.4, 0.1, 0.9, 0.2, 0.7, 0.95, 0.55, 0.05]
    categories = choose_categories(evaluation_of(labels, probs), ("normal", "tumour"), 2)
    assert [category.name for category in categories] == [
        "missed",
        "false_alarms",
        "uncertain",
        "certain_positive",
        "certain_negative",
    ]
    assert [category.members.tolist() for category in categories] == [[1, 0], [5, 4], [6, 0], [2, 6], [7, 3]]
    assert categories[0].title == "Missed: tumour, called normal"
    losses = example_losses(evaluation_of(labels, probs))
    np.testing.assert_allclose(losses[[0, 5]], [-np.log(0.4), -np.log(0.05)])


def test_the_threshold_decides_what_is_missed():
    evaluation = evaluation_of([1, 0], [0.4, 0.3], threshold=0.35)
    missed, false_alarms, uncertain, *_ = choose_categories(evaluation, ("normal", "tumour"), 5)
    assert len(missed.members) == len(false_alarms.members) == 0
    np.testing.assert_allclose(np.abs(evaluation.probs[uncertain.members] - 0.35), 0.05)


def test_a_threshold_of_zero_flags_everybody():
    missed, false_alarms, *_ = choose_categories(
        evaluation_of([1, 0], [0.4, 0.3], threshold=0.0), ("normal", "tumour"), 5
    )
    assert (missed.members.tolist(), false_alarms.members.tolist()) == ([], [1])


def test_more_classes():
    probs = [[0.8, 0.1, 0.1], [0.1, 0.45, 0.45], [0.6, 0.3, 0.1], [0.0, 0.1, 0.9]]
    evaluation = evaluation_of([0, 1, 1, 2], probs, names=("a", "b", "c"))
    mistaken, uncertain, certain = choose_categories(evaluation, ("a", "b", "c"), 2)
    assert mistaken.members.tolist() == [2]
    assert uncertain.members.tolist() == [1, 0]
    assert certain.members.tolist() == [3, 0]


def test_examples_are_the_evaluations_own(run, explained):
    evaluation, explanation = explained
    assert explanation.sample_size == 6
    place = {name: row for row, name in enumerate(evaluation.ids)}
    for example in explanation.examples:
        row = place[example.id]
        assert example.label == evaluation.labels[row]
        assert example.prob == evaluation.probs[row]
        assert example.predicted == int(example.prob >= 0.45)
        assert example.target == 1
        assert example.image.shape == tiny.IMAGE_SHAPE
        assert set(example.heat) == {"grad_cam", "integrated_gradients"}
        assert all(np.isnan(share) for share in example.central_share.values())  # 12 pixels have no square
    assert set(explanation.deletion) == {"grad_cam", "integrated_gradients"}
    for falls in explanation.deletion.values():
        assert [fall.removal for fall in falls] == ["blur", "white"]
    assert explanation.pointing == {}  # the tiny store has no masks


def test_what_is_written_is_read_back_until_it_is_stale(run, explained):
    evaluation, explanation = explained
    folder = write_explanation(run, explanation)
    with open(folder / "examples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [example.id for example in explanation.examples]
    for row in rows:
        with Image.open(folder / row["picture"]) as picture:
            assert picture.height == 192
            assert picture.width == 3 * 192 + 2 * 4
    assert {path.name for path in folder.glob("*.png")} == {row["picture"] for row in rows}
    stored = read_explanation(run, evaluation)
    assert stored.summary["sample_size"] == 6
    assert stored.summary["deletion"]["grad_cam"][1]["above_moved"]["value"] == pytest.approx(
        explanation.deletion["grad_cam"][1].above_moved.value
    )
    assert read_explanation(run, dataclasses.replace(evaluation, step=evaluation.step + 1)) is None
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "format": 1}))
    assert read_explanation(run, evaluation) is None  # maps of another kind
    (folder / "summary.json").write_text(json.dumps(summary))
    other = dataclasses.replace(evaluation.report, threshold=0.3)
    assert read_explanation(run, dataclasses.replace(evaluation, report=other)) is None
    (folder / "summary.json").write_text("{")
    assert read_explanation(run, evaluation) is None
    assert write_explanation(run, explanation) == folder  # in place of the old one
    assert read_explanation(run, evaluation) is not None


def test_an_evaluation_of_other_weights_is_refused(run, explained):
    evaluation, _ = explained
    with pytest.raises(UserError, match="evaluate it again"):
        explain_run(run, dataclasses.replace(evaluation, step=1))
    lost = np.array(["gone", *evaluation.ids[1:]])
    with pytest.raises(UserError, match=r"lacks .* of the evaluated examples"):
        explain_run(run, dataclasses.replace(evaluation, ids=lost), count=len(lost))


def test_overlay_leaves_cold_tissue_as_it_is():
    image = np.full((8, 8, 3), 100, np.uint8)
    np.testing.assert_array_equal(overlay(image, np.zeros((8, 8))), image)
    heat = np.zeros((8, 8))
    heat[2, 3] = 5
    covered = overlay(image, heat)
    assert np.flatnonzero((covered != image).any(axis=2)).tolist() == [2 * 8 + 3]


def test_strips_outline_the_centre_and_shrink_large_pictures():
    strip = draw_strip(np.full((96, 96, 3), 128, np.uint8), [np.zeros((96, 96))], central_side=32)
    assert strip.size == (2 * 192 + 4, 192)
    assert strip.getpixel((64, 64)) == (255, 255, 255)
    assert strip.getpixel((63, 80)) == (0, 0, 0)
    assert strip.getpixel((96, 96)) == (128, 128, 128)
    assert draw_strip(np.zeros((500, 400, 3), np.uint8), []).size == (307, 384)
