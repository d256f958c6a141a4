"""A run's report, looked at in a real browser, and its model card."""

from __future__ import annotations

import shutil

import pytest
import tiny
from page_checks import look_at

from pcam_jax.inference.evaluation import evaluate_run
from pcam_jax.inference.explanation import explain_run
from pcam_jax.report.explanations import write_explanation
from pcam_jax.report.run_report import heat_verdict, limits, write_report
from pcam_jax.run.folder import open_run
from pcam_jax.run.predictions import evaluation_names, read_evaluation
from pcam_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """Evaluated twice, with an isotonic map, and explained."""
    run = open_run(shutil.copytree(tiny_run, tmp_path_factory.mktemp("reported") / "run"))
    evaluation = evaluate_run(run, threshold="sensitivity=0.8", isotonic=True, resamples=200)
    evaluate_run(run, tta="d4", resamples=100)
    explanation = explain_run(run, evaluation, methods=("grad_cam",), count=3, sample_size=6)
    write_explanation(run, explanation)
    write_report(run)
    return run


def test_report_in_a_browser(run):
    measured = look_at(run.path / "report.html")
    text = measured["text"]
    evaluation = read_evaluation(run, "validation")
    for metric in evaluation.report.metrics.values():
        assert f"{metric.value:.4f}" in text
    assert f"{evaluation.report.metrics['auroc'].low:.4f} to" in text
    assert evaluation.meaning in text
    assert "isotonic (cross-fitted" in text
    assert "averaged over eight symmetries" in text
    assert "Research use only. Not a medical device." in text
    assert run.environment["data"]["digest"] in text
    assert "Grad-CAM (HiResCAM): not checked." in text
    assert "pcam_jax.train" in text or "pytest" in text  # the command as it was typed
    for row in evaluation.report.groups:
        assert row.group in text
    with open(run.path / "explain/validation/examples.csv") as file:
        pictures = len(file.readlines()) - 1
    # training 3, then for each evaluation confusion, ROC, PR, threshold, reliability and groups
    assert measured["images"] == 3 + 2 * 6 + pictures


def test_the_same_run_gives_the_same_report(run):
    def without_time():
        return [line for line in (run.path / "report.html").read_text().splitlines() if "written" not in line]

    before = without_time()
    write_report(run)
    assert without_time() == before


@pytest.mark.parametrize(
    ("random", "elsewhere", "said"),
    [
        (0.2, 0.1, ": checked."),
        (0.2, -0.1, "check failed"),
        (-0.2, 0.1, "check failed"),
        (0.2, None, "failed"),
    ],
)
def test_heat_maps_are_judged(random, elsewhere, said):
    """Both comparisons must lie above 0 with their whole intervals; one that cannot be told is not passed."""
    found = {"above_moved": random, "above_elsewhere": elsewhere}
    fall = {name: {"value": 0.3, "low": low, "high": 0.5} for name, low in found.items()}
    falls = [{**fall, "removal": removal} for removal in ("blur", "white")]
    assert said in heat_verdict({"deletion": {"grad_cam": falls}}, "grad_cam")
    held = {name: {"value": 0.3, "low": 0.1, "high": 0.5} for name in found} | {"removal": "white"}
    said = "checked." if "failed" not in said else "check is undecided"
    assert said in heat_verdict({"deletion": {"grad_cam": [falls[0], held]}}, "grad_cam")
    assert "not checked" in heat_verdict({"deletion": {}}, "grad_cam")


def test_card(run):
    card = (run.path / "MODEL_CARD.md").read_text()
    for heading in ("Model", "Intended use", "Data", "How good it is", "Limits", "More"):
        assert f"\n## {heading}\n" in card
    evaluation = read_evaluation(run, "validation")
    assert f"| AUROC | {evaluation.report.metrics['auroc'].value:.4f} |" in card
    assert "Not for diagnosis" in card
    assert run.environment["data"]["digest"] in card


def test_limits_say_what_the_data_lack(run):
    evaluations = [read_evaluation(run, name) for name in evaluation_names(run)]
    said = " ".join(limits(run, evaluations))
    assert "both sides of the split" in said  # the tiny run is split by example
    assert "validation figures only" in said


def test_a_run_that_was_not_evaluated(tiny_run, tmp_path):
    run = open_run(shutil.copytree(tiny_run, tmp_path / "run"))
    with pytest.raises(UserError, match="not evaluated yet"):
        write_report(run)


def test_more_classes(train_tiny, tmp_path):
    """Class names that are markup, three classes, no groups shown where a class is absent."""
    store = tiny.make_tiny_store(tmp_path / "store", classes=3)
    run = train_tiny(tmp_path / "run", store=store, model__head="softmax", train__epochs=1)
    evaluate_run(run, resamples=100)
    measured = look_at(write_report(run), widths=(360,))
    assert "AUROC (macro)" in measured["text"]
