"""Signals, seconds, and two commands on one workdir, with real processes."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from pcam_jax.inference.forward import Forward
from pcam_jax.run.folder import open_run
from pcam_jax.runtime.errors import Interrupted

Train = Callable[..., Any]
ROOT = Path(__file__).parents[2]
# long enough to be interrupted anywhere; the epochs that are left are never trained
LONG = {"train__epochs": 100_000, "optimizer__schedule": "constant", "checkpoint__every_steps": 20}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a verb in a process of its own, which does not outlive the test."""
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-W", "error", ROOT / "tests/tiny.py", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read its output up to a line with these words."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}: {process.communicate()[1]}")


@pytest.fixture
def training(
    start: Callable[..., subprocess.Popen[str]], tiny_store: Path, tmp_path: Path
) -> tuple[subprocess.Popen[str], Path]:
    """A run that has just finished its first epoch."""
    run = tmp_path / "run"
    process = start("train", "--workdir", run, *tiny.as_options(tiny.settings(tiny_store, **LONG)))
    wait_for(process, "epoch   1")
    return process, run


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_leaves(
    training: tuple[subprocess.Popen[str], Path], train_tiny: Train, tmp_path: Path, signum: int, code: int
) -> None:
    process, run = training
    time.sleep(0.3)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    found = re.fullmatch(r"Stopped at step (\d+) of \d+; everything is saved\. Go on with --resume\.\n", said)
    assert found, said
    step = int(found[1])
    assert open_run(run).checkpoints.steps()[-1] == step
    # nothing was lost: the state is that of a run that was simply told to save there
    checkpoint = open_run(run).checkpoints.load(step)
    epochs = checkpoint.progress["control"]["epoch"]
    straight = train_tiny(
        tmp_path / "straight",
        **{**LONG, "train__epochs": epochs + 1, "checkpoint__every_steps": step, "checkpoint__keep": 99},
    )
    expected = straight.checkpoints.load(step).arrays
    differing = set(tiny.differing_arrays(checkpoint.arrays, expected))
    last = straight.history()[-1]
    if last["step"] == step:  # stopped before this epoch's evaluation, which reports its sums and clears them
        sums = checkpoint.arrays
        assert float(sums["loss_sum"]) / float(sums["example_count"]) == pytest.approx(last["train_loss"])
        differing -= {"loss_sum", "correct_sum", "example_count"}
    assert not differing


def test_a_second_training_on_one_workdir_is_refused(
    training: tuple[subprocess.Popen[str], Path], verb: Callable[..., Any], tiny_store: Path
) -> None:
    process, run = training
    for extra in ([], ["--resume"]):
        done = verb("train", "--workdir", run, *tiny.as_options(tiny.settings(tiny_store, **LONG)), *extra)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {run} is in use by a training run (process {process.pid}): wait for it to end, or choose "
            "another folder.\n"
        )
    assert process.poll() is None
    # the first one goes on, and others may read
    done = verb("predict", run, tiny_store, "--output", run / "out.csv")
    assert done.returncode == 0, done.stderr
    process.terminate()
    assert process.wait(60) == 143


@pytest.mark.parametrize("settings", [{}, {"optimizer__swa_epochs": 3}])
def test_a_signal_in_evaluation_loses_nothing(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    straight = train_tiny(tmp_path / "straight", **settings).path
    real = Forward.logits

    def interrupted(*arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **named)

    run, said = tmp_path / "run", list[str]()
    for epoch in (1, 2, 3):
        # the evaluation of each epoch is interrupted once, then done again
        with monkeypatch.context() as patch:
            patch.setattr(Forward, "logits", interrupted)
            with pytest.raises(Interrupted, match="everything is saved"):
                train_tiny(run, resume=True, say=said.append, **settings)
        assert len(open_run(run).history()) == epoch - 1
        if epoch < 3:
            with monkeypatch.context() as patch:
                patch.setattr(Forward, "logits", after_one_more(real))
                with pytest.raises(Interrupted):
                    train_tiny(run, resume=True, **settings)
    train_tiny(run, resume=True, **settings)
    assert not tiny.differing_arrays(tiny.final_arrays(run), tiny.final_arrays(straight))
    assert tiny.same_history(run, straight)


def after_one_more(real: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluate once, then be interrupted in the next epoch's evaluation."""
    seen: list[int] = []

    def logits(*arguments: Any, **named: Any) -> Any:
        seen.append(1)
        if len(seen) > 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **named)

    return logits


def test_a_signal_in_prediction_leaves_nothing_half_written(
    tiny_run: Path, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pcam_jax.predict import main

    real = Forward.run

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(Forward, "run", interrupted)
    monkeypatch.setattr("pcam_jax.inference.predictor.BATCH_SIZE", 4)
    (tmp_path / "out.csv").write_text("old")
    with pytest.raises(Interrupted) as interruption:
        main([str(tiny_run), str(tiny_store), "--output", str(tmp_path / "out.csv")])
    assert interruption.value.signum == signal.SIGINT
    assert (tmp_path / "out.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_verb_evaluate_leaves_the_run_as_it_was(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    from pcam_jax.evaluate import main

    real = Forward.run

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signum)
        return real(*arguments)

    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(Forward, "run", interrupted)
    monkeypatch.setattr("pcam_jax.inference.predictor.BATCH_SIZE", 4)
    with pytest.raises(Interrupted) as interruption:
        main([str(run), "--threshold", "youden"])
    assert interruption.value.signum == signum
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
