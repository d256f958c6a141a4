"""Compare as a user runs it: one table, one figure, paired tests, and no comparison of unlike examples."""

from __future__ import annotations

import shutil

import pytest
from page_checks import look_at

from pcam_jax.compare import main
from pcam_jax.inference.evaluation import evaluate_run
from pcam_jax.metrics.comparison import delong_test
from pcam_jax.run.comparison import compare_runs
from pcam_jax.run.folder import open_run
from pcam_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def runs(tiny_run, train_tiny, tmp_path_factory):
    """Two evaluated runs of the same examples."""
    folder = tmp_path_factory.mktemp("compared")
    first = open_run(shutil.copytree(tiny_run, folder / "first"))
    second = train_tiny(folder / "second", train__seed=1)
    for run in (first, second):
        evaluate_run(run, resamples=100)
    return [first, second]


def test_command_prints_a_table_and_writes_a_page(runs, tmp_path, verb):
    page = tmp_path / "comparison.html"
    done = verb("compare", *(run.path for run in runs), "--resamples", 200, "--output", page)
    assert done.returncode == 0, done.stderr
    for run in runs:
        auroc = f"{evaluation(run).report.metrics['auroc'].value:.4f}"
        assert auroc in done.stdout
    assert "DeLong p" in done.stdout
    assert "McNemar p" in done.stdout
    measured = look_at(page)
    text = measured["text"]
    assert measured["images"] == 2 + 3  # AUROCs, training, ROC, precision-recall, reliability: each its own
    assert "first" in text
    assert "second" in text
    assert f"{runs[0].environment['params']:,}" in text


def evaluation(run):
    from pcam_jax.run.predictions import read_evaluation

    return read_evaluation(run, "validation")


def test_the_reference_is_the_best_and_tests_are_paired(runs):
    comparison = compare_runs(runs, resamples=200)
    merits = {one.name: one.evaluation.report.metrics["auroc"].value for one in comparison.runs}
    assert merits[comparison.reference.name] == max(merits.values())
    (test,) = comparison.tests
    best, other = (
        comparison.reference.evaluation,
        next(one.evaluation for one in comparison.runs if one is not comparison.reference),
    )
    again = delong_test(best.labels, best.probs, other.probs, best.groups)
    assert test.delong == again
    assert test.delong_adjusted == again.p_value  # one test needs no adjusting
    assert test.differences["auroc"].value == pytest.approx(max(merits.values()) - min(merits.values()))
    assert comparison.grouped
    assert {one.epochs for one in comparison.runs} == {3}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_figure_alone(runs, tmp_path, suffix):
    main([*(str(run.path) for run in runs), "--resamples", "0", "--output", str(tmp_path / f"c{suffix}")])
    assert (tmp_path / f"c{suffix}").stat().st_size > 5000


def test_runs_on_different_examples_are_refused(runs, train_tiny, tmp_path):
    other = train_tiny(tmp_path / "other", train__epochs=1, data__split_seed=3)
    evaluate_run(other, resamples=0)
    with pytest.raises(UserError, match=r"different examples \(18 and 18, \d+ shared\)"):
        compare_runs([runs[0], other])


def test_runs_that_were_not_evaluated_or_are_the_same(runs):
    with pytest.raises(UserError, match="not evaluated on 'validation-d4' yet"):
        compare_runs(runs, tta="d4")
    with pytest.raises(UserError, match="two or more different runs"):
        compare_runs([runs[0], runs[0]])


def test_folders_of_one_name_keep_their_paths(runs, tmp_path):
    twin = open_run(shutil.copytree(runs[1].path, tmp_path / "first"))
    names = [one.name for one in compare_runs([runs[0], twin], resamples=0).runs]
    assert names == [str(runs[0].path), str(twin.path)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--output", "x.pdf"], "must end in .html, .png or .svg"),
        (["--output", "no/where/x.html"], "There is no folder no/where"),
        (["--resamples", "7"], "must be 0, or at least 100"),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(UserError, match=sentence):
        main(["one", "two", *options])
    with pytest.raises(UserError, match="Give two or more"):
        main(["one"])
