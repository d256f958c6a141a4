"""Explain as a user runs it: from a run that was only trained to pictures and a report."""

import csv
import shutil

import pytest

from pcam_jax.explain import main
from pcam_jax.runtime.errors import UserError


def test_one_command_evaluates_explains_and_reports(tiny_run, tmp_path, verb):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    done = verb("explain", run, "--count", 2, "--sample", 4, "--check", "--removal", "white")
    assert done.returncode == 0, done.stderr
    assert "Missed: class1, called class0" in done.stdout
    assert "beyond a random place" in done.stdout
    assert "made white" in done.stdout
    folder = run / "explain/validation"
    with open(folder / "examples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all((folder / row["picture"]).is_file() for row in rows)
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/jpeg') == len(rows)
    assert "What the network looked at" in page
    assert "Not a medical device" in (run / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--check", "--sample", "1"], "--check needs a --sample"),
        ([], "There is no run"),
    ],
)
def test_mistakes(arguments, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        main([str(tmp_path / "nowhere"), *arguments])


def test_a_split_that_was_not_evaluated(tiny_run):
    with pytest.raises(UserError, match="not evaluated on 'test' yet"):
        main([str(tiny_run), "--split", "test"])
