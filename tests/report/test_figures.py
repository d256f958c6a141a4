"""The figures: what they show, that they leave no global state, and that files are whole and repeatable."""

import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn import metrics as sk

from pcam_jax.report import canvas, figures
from pcam_jax.runtime.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"


def history(epochs):
    return [
        {
            "epoch": epoch,
            "train_loss": 0.7 / epoch,
            "train_accuracy": 1 - 0.4 / epoch,
            "validation_loss": 0.7 / epoch + 0.02 * epoch,
            "validation_accuracy": 0.9 - 0.3 / epoch,
            "validation_auroc": 0.95 - 0.3 / epoch,
            "learning_rate": 1e-3 * 0.5**epoch,
        }
        for epoch in range(1, epochs + 1)
    ]


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def test_training_curves_show_every_series():
    figure = figures.draw_training_curves(history(8), best_epoch=3)
    drawn = panels(figure)
    assert list(drawn) == ["Loss", "Accuracy and AUROC", "Learning rate"]
    training, validation = drawn["Loss"].lines[:2]
    np.testing.assert_allclose(training.get_ydata(), [row["train_loss"] for row in history(8)])
    np.testing.assert_allclose(validation.get_xdata(), np.arange(1, 9))
    assert drawn["Learning rate"].get_yscale() == "log"
    assert all(axes.get_xlabel() == "epoch" for axes in drawn.values())
    labels = [text.get_text() for text in drawn["Loss"].get_legend().get_texts()]
    assert labels == ["training", "validation", "best: epoch 3"]


def test_training_curves_leave_out_what_is_missing():
    rows = [
        {"epoch": 1, "train_loss": 0.7, "validation_loss": None, "learning_rate": ""},
        {"epoch": 2, "train_loss": math.nan, "validation_loss": "0.5"},
        {"epoch": 3, "train_loss": math.inf},
    ]
    drawn = panels(figures.draw_training_curves(rows))
    assert list(drawn) == ["Loss"]
    training, validation = drawn["Loss"].lines
    assert list(training.get_xdata()) == [1]
    assert list(validation.get_ydata()) == [0.5]


@pytest.mark.parametrize("rows", [[], history(1), history(100)])
def test_training_curves_are_written_for_any_length(tmp_path, rows):
    figures.write_training_curves(tmp_path / "curves.png", rows)
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, name):
    figures.write_training_curves(tmp_path / name, history(3))
    first = (tmp_path / name).read_bytes()
    figures.write_training_curves(tmp_path / name, history(3))
    assert (tmp_path / name).read_bytes() == first


def test_another_suffix_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"\.png or \.svg"):
        canvas.write_figure(Figure(), tmp_path / "curves.bmp")
    assert not list(tmp_path.iterdir())


def test_no_global_plotting_state_and_no_jax():
    code = (
        "import sys, pcam_jax.report.figures as f; f.draw_training_curves([]);"
        "assert 'matplotlib.pyplot' not in sys.modules and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def predictions(count=2000, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.4).astype(int)
    return labels, 1 / (1 + np.exp(-2 * rng.normal(size=count) - 3 * (labels - 0.5)))


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_roc_shows_the_curve_its_area_and_the_operating_point():
    labels, probs = predictions()
    sets = [figures.ScoredSet("ours", labels, probs), figures.ScoredSet("coin", labels, np.full(2000, 0.5))]
    (axes,) = figures.draw_roc(sets, threshold=0.3).axes
    area = sk.roc_auc_score(labels, probs)
    assert legend(axes) == [
        "chance: 0.500", f"ours: AUROC {area:.3f}", "at threshold 0.3", "coin: AUROC 0.500"
    ]  # fmt: skip
    curve, point = axes.lines[1], axes.lines[2]
    assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(area, abs=2e-3)
    assert point.get_ydata()[0] == pytest.approx(np.mean(probs[labels == 1] >= 0.3))
    assert point.get_xdata()[0] == pytest.approx(np.mean(probs[labels == 0] >= 0.3))
    assert axes.get_xlabel().startswith("1 - specificity")


def test_precision_recall_steps_enclose_the_average_precision():
    labels, probs = predictions()
    (axes,) = figures.draw_precision_recall([figures.ScoredSet("ours", labels, probs)], threshold=0.3).axes
    line = next(line for line in axes.lines if line.get_label().startswith("ours"))
    x, y = line.get_data()
    assert line.get_drawstyle() == "steps-pre"
    assert np.all(np.diff(x) >= 0)
    assert np.sum(np.diff(x) * y[1:]) == pytest.approx(sk.average_precision_score(labels, probs), abs=2e-3)
    point = next(line for line in axes.lines if line.get_label() == "at threshold 0.3")
    assert point.get_ydata()[0] == pytest.approx(np.mean(labels[probs >= 0.3]))


def test_a_class_without_examples_is_named_instead_of_drawn():
    sets = figures.scored_classes([0, 1, 0], np.eye(3)[[0, 1, 1]], ["a", "b", "c"])
    assert [one.name for one in sets] == ["a", "b", "c"]
    for draw in (figures.draw_roc, figures.draw_precision_recall):
        assert "c: one class only" in legend(draw(sets, threshold=0.5).axes[0])
    assert [one.name for one in figures.scored_classes([0, 1], [0.2, 0.7], ["n", "t"])] == ["t"]


def test_threshold_curve_holds_between_the_probabilities():
    labels, probs = np.array([0, 1, 0, 1]), np.array([0.2, 0.4, 0.6, 0.8])
    (axes,) = figures.draw_threshold_curve(labels, probs, threshold=0.5).axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["sensitivity"].get_data(), [probs, [1, 1, 0.5, 0.5]])
    np.testing.assert_allclose(lines["specificity"].get_ydata(), [0, 0.5, 0.5, 1])
    np.testing.assert_allclose(lines["precision"].get_ydata(), [0.5, 2 / 3, 0.5, 1])
    np.testing.assert_allclose(lines["F1"].get_ydata(), [2 / 3, 0.8, 0.5, 2 / 3])
    assert "chosen: 0.5" in lines
    with pytest.raises(UserError, match="there are 3"):
        figures.draw_threshold_curve([0, 1], np.eye(3)[:2])


def test_reliability_shows_before_and_after():
    labels, probs = predictions()
    figure = figures.draw_reliability(labels, {"before": probs, "after": probs**2})
    upper, lower = figure.axes
    assert legend(upper)[0] == "perfectly calibrated"
    assert legend(upper)[1].startswith("before: ECE 0.")
    before = upper.containers[0].lines[0]
    first = probs <= 1 / 15
    assert before.get_xdata()[0] == pytest.approx(probs[first].mean())
    assert before.get_ydata()[0] == pytest.approx(labels[first].mean())
    assert sum(lower.patches[0].get_data().values) == pytest.approx(1)
    top = figures.draw_reliability([0, 1, 2], {"run": np.eye(3)}).axes
    assert top[0].get_ylabel() == "share predicted right"


def test_confusion_matrix_shows_counts_and_shares():
    (axes, _) = figures.draw_confusion_matrix([[1500, 500], [0, 0]], ["normal", "tumour"]).axes
    assert [text.get_text() for text in axes.texts] == ["1,500\n75.0%", "500\n25.0%", "0\n0.0%", "0\n0.0%"]
    assert axes.texts[0].get_color() == "white"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["normal", "tumour"]


def test_vector_files_of_many_predictions_stay_small(tmp_path):
    labels, probs = predictions(57_458)
    canvas.write_figure(figures.draw_roc([figures.ScoredSet("ours", labels, probs)]), tmp_path / "roc.svg")
    assert (tmp_path / "roc.svg").stat().st_size < 200_000


def test_series_colors_stay_apart_for_colour_blind_readers():
    # simulated deuteranopia and protanopia (Viénot et al. 1999), distance in linear RGB
    colors = np.array(
        [[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in canvas.SERIES_COLORS]
    )
    linear = colors**2.2
    deuteranope = np.array([[0.292, 0.708, 0], [0.292, 0.708, 0], [-0.022, 0.022, 1]])
    protanope = np.array([[0.112, 0.888, 0], [0.112, 0.888, 0], [0.004, -0.004, 1]])
    for matrix in (np.eye(3), deuteranope, protanope):
        seen = (linear @ matrix.T).clip(0) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen, axis=-1) + 9 * np.eye(len(seen))
        assert distance.min() > 0.1
