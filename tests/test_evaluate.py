"""Evaluate as a user runs it: figures equal scikit-learn's on the same CSV, choices on validation only."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import tiny
from sklearn import metrics as sk

from pcam_jax.inference.evaluation import evaluate_ensemble, evaluate_run
from pcam_jax.inference.fitted_point import fitted_point, parse_threshold
from pcam_jax.inference.predictor import Predictor
from pcam_jax.metrics.threshold import predicted_classes
from pcam_jax.run.folder import open_run
from pcam_jax.run.operating_point import OperatingPoint, read_operating_point
from pcam_jax.run.predictions import evaluation_names, read_evaluation, write_evaluation
from pcam_jax.runtime.errors import UserError


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy that a test may change."""
    return open_run(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def labelled_store(tmp_path_factory):
    """The tiny store's images with labels on all of them, and a split of its own."""
    return tiny.make_tiny_store(tmp_path_factory.mktemp("labelled") / "store", labelled=74, test=0, seed=5)


def test_command_writes_figures_that_equal_scikit_learn(run, verb):
    done = verb("evaluate", run.path, "--threshold", "sensitivity=0.8", "--isotonic", "--resamples", 100)
    assert done.returncode == 0, done.stderr
    assert "AUROC" in done.stdout
    assert "isotonic (cross-fitted" in done.stdout
    assert "of 1,000 class1 patches" in done.stdout
    table = pd.read_csv(run.path / "predictions/validation.csv")
    figures = json.loads((run.path / "predictions/validation.json").read_text())["figures"]
    labels, probs = table["label"], table["prob"]
    point = read_operating_point(run.path)
    called = probs >= point.threshold
    expected = {
        "auroc": sk.roc_auc_score(labels, probs),
        "auprc": sk.average_precision_score(labels, probs),
        "accuracy": sk.accuracy_score(labels, called),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called),
        "sensitivity": sk.recall_score(labels, called),
        "specificity": sk.recall_score(labels, called, pos_label=0),
        "precision": sk.precision_score(labels, called),
        "f1": sk.f1_score(labels, called),
        "mcc": sk.matthews_corrcoef(labels, called),
        "nll": sk.log_loss(labels, probs),
        "brier": sk.brier_score_loss(labels, probs),
    }
    for name, value in expected.items():
        assert figures["metrics"][name]["value"] == pytest.approx(value, abs=1e-6), name
        assert figures["metrics"][name]["low"] <= value + 1e-12, name
    assert figures["confusion_matrix"] == sk.confusion_matrix(labels, called).tolist()
    by_slide = {row["group"]: row for row in figures["groups"]}
    for slide, rows in table.groupby("group"):
        assert by_slide[slide]["accuracy"] == pytest.approx(
            np.mean(rows["label"] == called[rows.index]), abs=1e-6
        )
    assert figures["metrics"]["sensitivity"]["value"] >= 0.8
    assert point.criterion == "sensitivity=0.8"
    assert point.isotonic is not None
    # the probabilities are those that predict writes
    with_temperature = Predictor.load(run.path)
    logits = table["logit"].to_numpy(np.float32)[:, None]
    np.testing.assert_allclose(with_temperature.average([logits]), probs, atol=1e-7)


def test_what_is_written_reads_back_equal(run):
    evaluation = evaluate_run(run, resamples=100)
    again = read_evaluation(run, "validation")
    for field in dataclasses.fields(evaluation):
        one, other = getattr(evaluation, field.name), getattr(again, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        elif field.name == "report":
            assert one.to_dict() == other.to_dict()
        else:
            assert one == other, field.name
    assert evaluation_names(run) == ["validation"]
    assert evaluation.criterion == "default"
    assert evaluation.report.threshold == 0.5
    assert "of 1,000 class1 patches" in evaluation.meaning


def test_damaged_or_missing_predictions_are_named(run):
    with pytest.raises(UserError, match="not evaluated on 'test' yet"):
        read_evaluation(run, "test")
    evaluation = evaluate_run(run, resamples=0)
    table = run.path / "predictions/validation.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="do not belong together"):
        read_evaluation(run, "validation")
    write_evaluation(run, evaluation)
    read_evaluation(run, "validation")
    table.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        read_evaluation(run, "validation")


def test_choices_are_made_on_validation_and_kept(run, labelled_store):
    chosen = evaluate_run(run, threshold="youden", resamples=0)
    before = read_operating_point(run.path)
    assert before.criterion == "youden"
    assert before.step == chosen.step
    # another store's labelled examples change nothing
    other = evaluate_run(run, store=str(labelled_store), split="all", resamples=0)
    assert read_operating_point(run.path) == before
    assert other.report.threshold == before.threshold
    assert any("were trained on" in note for note in other.report.notes)  # equal ids
    # without a rule the run's own is applied again; a number and the default are choices too
    assert evaluate_run(run, resamples=0).criterion == "youden"
    assert evaluate_run(run, threshold="0.3", resamples=0).criterion == "fixed"
    assert evaluate_run(run, resamples=0).report.threshold == 0.3
    assert evaluate_run(run, threshold="0.5", resamples=0).criterion == "default"


def test_test_examples_choose_nothing(run, labelled_store):
    for options in ({"threshold": "youden"}, {"isotonic": True}):
        with pytest.raises(UserError, match="on validation examples only"):
            evaluate_run(run, store=str(labelled_store), split="all", **options)
    with pytest.raises(UserError, match="has no labels"):
        evaluate_run(run, split="test")


def test_averaging_over_symmetries_keeps_the_threshold_of_the_plain_way(run):
    plain = evaluate_run(run, threshold="youden", resamples=0)
    turned = evaluate_run(run, tta="d4", resamples=0)
    assert not np.array_equal(plain.probs, turned.probs)
    assert turned.report.threshold == plain.report.threshold
    assert read_operating_point(run.path).tta == "none"
    assert evaluation_names(run) == ["validation", "validation-d4"]
    assert any("--tta" in remark for remark in Predictor.load(run.path, tta="d4").remarks)
    evaluate_run(run, tta="d4", threshold="youden", resamples=0)
    assert read_operating_point(run.path).tta == "d4"
    assert Predictor.load(run.path, tta="d4").remarks == []


def test_a_rule_is_applied_again_to_new_weights():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    logits = [(rng.normal(size=(200, 1)) + labels[:, None]).astype(np.float32)]
    ask = {"tta": "none", "isotonic": False, "names": ("a", "b")}
    first = fitted_point(OperatingPoint(), logits, labels, "specificity", 0.9, step=10, **ask)
    assert np.mean(predicted_classes(_probs(logits, first), first.threshold)[labels == 0] == 0) >= 0.9
    shifted = [2 * logits[0] + 1]
    later = fitted_point(first, shifted, labels, "", None, step=20, **ask)
    assert later.criterion == "specificity=0.9"
    assert later.threshold != first.threshold
    assert 0.9 <= np.mean(_probs(shifted, later)[labels == 0] < later.threshold) < 0.95
    assert later.step == 20
    assert "flagged" in later.meaning


def _probs(logits, point):
    return 1 / (1 + np.exp(-logits[0][:, 0].astype(np.float64) / point.temperature))


def test_ensembles_need_the_same_examples(run, labelled_store):
    one = evaluate_run(run, resamples=0)
    report = evaluate_ensemble([one, one], run.class_names, resamples=0)
    assert report.metrics["auroc"].value == one.report.metrics["auroc"].value
    other = evaluate_run(run, store=str(labelled_store), split="all", resamples=0)
    with pytest.raises(UserError, match="different examples"):
        evaluate_ensemble([one, other], run.class_names)


def test_more_classes(train_tiny, tmp_path):
    store = tiny.make_tiny_store(tmp_path / "store", classes=3)
    run = train_tiny(tmp_path / "run", store=store, model__head="softmax", train__epochs=1)
    evaluation = evaluate_run(run, resamples=100)
    assert evaluation.report.threshold is None
    assert evaluation.meaning == ""
    np.testing.assert_allclose(evaluation.probs.sum(axis=1), 1)
    again = read_evaluation(run, "validation")
    np.testing.assert_array_equal(again.probs, evaluation.probs)
    expected = sk.roc_auc_score(evaluation.labels, evaluation.probs, multi_class="ovr")
    assert evaluation.report.metrics["auroc"].value == pytest.approx(expected)
    with pytest.raises(UserError, match="two classes"):
        evaluate_run(run, threshold="youden")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", ("", None)),
        ("youden", ("youden", None)),
        ("sensitivity=0.95", ("sensitivity", 0.95)),
        ("cost=5", ("cost", 5.0)),
        ("0.3", ("fixed", 0.3)),
    ],
)
def test_threshold_rules(text, parsed):
    assert parse_threshold(text) == parsed


@pytest.mark.parametrize("text", ["best", "1.5", "-0.1", "sensitivity=high", "nan"])
def test_unknown_threshold_rules(text):
    with pytest.raises(UserError, match="--threshold is"):
        parse_threshold(text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Give one or more run folders"),
    ],
)
def test_mistakes_are_one_sentence(verb, arguments, sentence):
    done = verb("evaluate", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
