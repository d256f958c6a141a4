"""The verb `tune`: searches that stop, go on, end hopeless trials, and say what they found."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

from pcam_jax.__main__ import dispatch
from pcam_jax.config.files import load_config
from pcam_jax.config.schema import Config
from pcam_jax.run.search_space import read_space
from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.runtime.files import folder_lock
from pcam_jax.tune import open_study

ROOT = Path(__file__).parents[1]
optuna = pytest.importorskip("optuna")
SPACE = """
[optimizer.peak_lr]
low = 1e-4
high = 1e-1
log = true

[model.options.dropout]
low = 0.0
high = 0.5
step = 0.1

[train.batch_size]
choices = [8, 16]
"""


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.toml"
    path.write_text(SPACE)
    return path


@pytest.fixture
def tune(tiny_store: Path, tmp_path: Path, space: Path):
    tiny.register()

    def search(trials: int, *extra: object, **overrides: object) -> None:
        from pcam_jax.tune import main

        settings = tiny.as_options(tiny.settings(tiny_store, **{"train__epochs": 2, **overrides}))
        main([*settings, "--space", str(space), "--trials", str(trials), "--folder", str(tmp_path / "study"),
              "--search-seed", "0", *map(str, extra)])  # fmt: skip

    return search


def trials(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "study/trials.csv").read_text().splitlines()))


def test_the_verb_searches_goes_on_and_writes_a_recipe(verb, tiny_store, space, tmp_path, capsys):
    options = tiny.as_options(tiny.settings(tiny_store, train__epochs=1))
    folder = tmp_path / "study"
    command = ["tune", *options, "--space", space, "--folder", folder, "--search-seed", 0]
    done = verb(*command, "--trials", 2)
    assert done.returncode == 0, done
    assert done.stdout.count("validation_auroc 0.") + done.stdout.count("validation_auroc 1.") == 2
    assert f"train {folder / 'best.toml'}" in done.stdout
    tiny.register()
    dispatch([*map(str, command), "--trials", "3"])
    again = capsys.readouterr().out
    assert "trial-0002" in again
    assert "trial-0001" not in again
    rows = trials(tmp_path)
    assert [row["state"] for row in rows] == ["complete"] * 3
    best = max(rows, key=lambda row: float(row["validation_auroc"]))
    config = load_config(folder / "best.toml")
    assert config.optimizer.peak_lr == float(best["optimizer.peak_lr"])
    assert config.train.batch_size == int(best["train.batch_size"])
    assert config.model.options["dropout"] == float(best["model.options.dropout"])
    kept = [path.name for path in folder.iterdir() if path.is_dir()]
    assert kept == [f"trial-{int(best['trial']):04d}"]
    report = (folder / "report.md").read_text()
    assert "3 trials: 3 to the end" in report
    assert "## What mattered" in report


def test_trials_that_lag_behind_end_early(tune, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: optuna.pruners.ThresholdPruner(lower=2.0))
    with pytest.raises(UserError, match="No trial of"):
        tune(2)
    assert [(row["state"], row["epochs"]) for row in trials(tmp_path)] == [("pruned", "1")] * 2
    assert capsys.readouterr().out.count("ended early") == 2


def test_a_stopped_search_begins_with_the_interrupted_trial(tune, tmp_path, monkeypatch):
    import pcam_jax.train

    run_training, calls = pcam_jax.train.run_training, []

    def stopped(*arguments: object, **options: object) -> object:
        calls.append(arguments[0])
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_training(*arguments, **options)

    monkeypatch.setattr(pcam_jax.train, "run_training", stopped)
    with pytest.raises(Interrupted):
        tune(2, train__epochs=1)
    assert len(trials(tmp_path)) == 1
    tune(2, train__epochs=1)
    assert len(trials(tmp_path)) == 2
    assert calls[2] == calls[1]


def test_a_killed_search_begins_with_the_killed_trial(tune, tiny_store, space, tmp_path):
    settings = tiny.as_options(tiny.settings(tiny_store, train__epochs=100_000))
    folder = tmp_path / "study"
    command = [sys.executable, ROOT / "tests/tiny.py", "tune", *settings, "--space", space, "--trials", 2]
    process = subprocess.Popen([*map(str, command), "--folder", str(folder)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (folder / "trial-0000/history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with (
        pytest.raises(UserError, match=r"trial-0000 is in use"),
        folder_lock(folder / "trial-0000", "a test"),
    ):
        pass
    tune(1, train__epochs=1)  # beside it; the trial that runs is left alone
    assert [row["trial"] for row in trials(tmp_path)] == ["1"]
    process.kill()
    process.wait()
    tune(2, train__epochs=1)
    ended = {row["trial"]: row for row in trials(tmp_path)}
    assert [row["state"] for row in ended.values()] == ["complete"] * 2
    study = optuna.load_study(study_name="tune-default", storage=f"sqlite:///{folder}/study.db")
    killed, again = (study.trials[number] for number in (0, 2))
    assert killed.state.name == "FAIL"
    assert again.params == killed.params
    assert not (folder / "trial-0000").exists()


def test_several_begin_a_study_at_the_same_moment(tmp_path):
    for number in range(3):
        together, opened = threading.Barrier(4), list[str]()

        def begin(address: str, together=together, opened=opened) -> None:
            together.wait()
            opened.append(open_study(address, "one").study_name)

        threads = [
            threading.Thread(target=begin, args=(f"sqlite:///{tmp_path}/{number}.db",)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert opened == ["one"] * 4


def test_hyperband_searches_too(tune, tmp_path):
    tune(3, "--pruner", "hyperband", train__epochs=3)
    assert {row["state"] for row in trials(tmp_path)} <= {"complete", "pruned"}
    assert len(trials(tmp_path)) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[optimizer.peak_lr.low_lr]\nlow = 0.1\nhigh = 0.2\n", "peak_lr is a setting, not a table"),
        ("[a]\nchoices = " + "[" * 5000, "nested too deeply"),
    ],
)
def test_a_space_that_is_none(tmp_path, text, sentence):
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_space(tmp_path / "space.toml", Config())


def test_failed_trials_are_told_and_a_hopeless_search_ends(tune, space, tmp_path, capsys):
    space.write_text("[model.options.no_such]\nlow = 0.0\nhigh = 1.0\n")
    with pytest.raises(UserError, match=r"The first 3 trials failed.*no_such"):
        tune(9)
    assert [row["state"] for row in trials(tmp_path)] == ["fail"] * 3
    assert "## Failures" in (tmp_path / "study/report.md").read_text()
    space.write_text(SPACE)
    with pytest.raises(UserError, match="searches another space"):
        tune(9)
    with pytest.raises(UserError, match="database cannot be opened"):
        tune(9, "--storage", f"sqlite:///{tmp_path}/none/study.db")
    with pytest.raises(UserError, match="needs the package pymssql"):
        tune(9, "--storage", "mssql+pymssql://host/name")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "varies nothing"),
        ("[optimizer", "not valid TOML"),
        ("[optimizer]\npeak_lr = 1", "is no table"),
        ("[optimizer.peak_lrr]\nlow = 1.0\nhigh = 2.0", "Unknown key 'optimizer.peak_lrr'.*peak_lr"),
        ("[optimizer.peak_lr]\nlow = 1.0", "must have low and high"),
        ("[optimizer.peak_lr]\nlow = 2.0\nhigh = 1.0", "low must be below high"),
        ("[optimizer.peak_lr]\nlow = 0.0\nhigh = 1.0\nlog = true", "above 0 with log"),
        ("[optimizer.peak_lr]\nlow = 0.1\nhigh = 1.0\nlog = true\nstep = 0.1", "exclude each other"),
        ("[optimizer.peak_lr]\nlow = -1.0\nhigh = 1.0", "optimizer.peak_lr is -1.0"),
        ("[optimizer.name]\nchoices = []", "at least one value"),
        ("[optimizer.name]\nchoices = ['adam', 'adem']", "'adem'.*must be one of"),
        ("[optimizer.name]\nchoices = ['adam']\nlow = 1", "choices alone"),
        ("[train.batch_size]\nlow = 1.5\nhigh = 4.5", "must be of type int"),
    ],
)  # fmt: skip
def test_spaces_that_make_no_sense(space, text, said):
    space.write_text(text)
    with pytest.raises(UserError, match=said):
        read_space(space, load_config(None))
