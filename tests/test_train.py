"""Training from the outside: what it says, what it leaves, what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny

from pcam_jax.run.folder import open_run
from pcam_jax.runtime.errors import UserError

Train = Callable[..., Any]
Verb = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]


def options(store: Path, **overrides: Any) -> list[str]:
    return tiny.as_options(tiny.settings(store, **overrides))


def test_a_run_from_the_command_line(verb: Verb, tiny_store: Path, tmp_path: Path) -> None:
    config = tmp_path / "recipe.toml"
    config.write_text("[train]\nepochs = 9\nbatch_size = 16\n")
    settings = options(tiny_store, train__epochs=2, tracking__tensorboard=True)
    done = verb("train", config, "--workdir", tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = open_run(tmp_path / "run")
    # the command line overrides the file
    assert run.config.train.epochs == 2
    assert run.config.train.batch_size == 8
    for words in (
        "conv1",
        "tiny: ",
        "42 train, 18 validation, 14 test",
        "epoch   1",
        "Ended: all 2 epochs done.",
    ):
        assert words in done.stdout
    assert re.search(r"Best: epoch \d, step \d+, by validation_loss", done.stdout)
    assert f"pcam_jax.predict {tmp_path / 'run'} {tiny_store} --split test" in done.stdout
    for name in ("history.csv", "curves.png", "result.json", "split.csv", "tensorboard"):
        assert (tmp_path / "run" / name).exists()
    # the second of two lines: a finished run says so and is left alone
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = verb("train", config, "--workdir", tmp_path / "run", *settings, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{tmp_path / 'run'} is already finished (all 2 epochs done); nothing to do.\n"
    lock = tmp_path / "run/.lock"
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before | {lock: 0} == after | {lock: 0}


def test_the_verb_itself_refuses_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "pcam_jax.train", "--data.store", str(tmp_path / "none")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=path_to_root()
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*none[^\n]*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def path_to_root() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__batch_size": 43}, r"train.batch_size is 43, but the training split has only 42"),
        ({"model__name": "tinny"}, r"There is no model 'tinny' \(did you mean tiny"),
        ({"model__options": {"droput": 0.1}}, r"no option 'droput'"),
        ({"optimizer__name": "schedule_free_adamw", "optimizer__schedule": "cosine"}, r"optimizer.schedule"),
        ({"optimizer__accumulate_steps": 3}, r"train.batch_size is 8: optimizer.accumulate_steps"),
        ({"data__validation_fraction": 0.0}, r"validation"),
        ({"data__train_fraction": 0.001}, r"train"),
    ],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(
    train_tiny: Train, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train_tiny(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_three_classes_need_a_softmax_head(train_tiny: Train, tmp_path: Path) -> None:
    store = tiny.make_tiny_store(tmp_path / "store", classes=3)
    with pytest.raises(UserError, match=r'model.head is "sigmoid" but the data has 3 classes'):
        train_tiny(tmp_path / "run", store=store)


def test_a_workdir_that_is_a_file_is_refused(verb: Verb, tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    done = verb("train", "--workdir", tmp_path / "run", *options(tiny_store))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a file of that name is in the way" in done.stderr
    assert (tmp_path / "run").read_text() == "mine"


def test_both_homes_of_the_images_give_the_same_run(train_tiny: Train, tmp_path: Path) -> None:
    settings = {"data__sampling": "balanced", "augment__horizontal_flip": True}
    for placement in ("host", "device"):
        train_tiny(tmp_path / placement, data__placement=placement, **settings)
    host, device = tmp_path / "host", tmp_path / "device"
    assert not tiny.differing_arrays(tiny.final_arrays(host), tiny.final_arrays(device))
    assert tiny.same_history(host, device)


def test_equal_seeds_give_equal_runs_and_others_do_not(
    train_tiny: Train, tiny_run: Path, tmp_path: Path
) -> None:
    train_tiny(tmp_path / "same", checkpoint__every_steps=1, checkpoint__keep=5)
    assert not tiny.differing_arrays(tiny.final_arrays(tiny_run), tiny.final_arrays(tmp_path / "same"))
    assert tiny.same_history(tiny_run, tmp_path / "same")
    train_tiny(tmp_path / "other", train__seed=1, train__epochs=1)
    assert not tiny.same_history(tiny_run, tmp_path / "other")


def test_the_sums_of_an_epoch_are_over_all_its_examples(train_tiny: Train, tmp_path: Path) -> None:
    # at a rate of nothing the training loss is the loss of the first weights over the batches read
    run = train_tiny(
        tmp_path / "run",
        optimizer__peak_lr=1e-30,
        model__options={"dropout": 0.0, "norm": False},
        train__epochs=2,
    )
    rows = run.history()
    from pcam_jax.data.store import open_store
    from pcam_jax.inference.predictor import Predictor

    predictor, store = Predictor.load(run.path), open_store(run.config.data.store)
    steps = [0, *(int(row["step"]) for row in rows)]
    from pcam_jax.data.order import TrainOrder

    positions = run.positions(store, "train")
    order = TrainOrder(store.labels[positions], run.config.train.batch_size, run.config.train.seed)
    for row, first, last in zip(rows, steps[:-1], steps[1:], strict=True):
        seen = positions[np.concatenate([order.indices(step) for step in range(first, last)])]
        probs, labels = predictor.predict(store, seen).astype(np.float64), store.labels[seen]
        likelihood = np.where(labels == 1, probs, 1 - probs)
        assert row["train_loss"] == pytest.approx(-np.log(likelihood).mean(), rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(np.mean((probs > 0.5) == labels))
    held = run.positions(store, "validation")
    probs, labels = predictor.predict(store, held).astype(np.float64), store.labels[held]
    assert rows[0]["validation_loss"] == pytest.approx(
        -np.log(np.where(labels == 1, probs, 1 - probs)).mean(), rel=1e-5
    )
    above, below = probs[labels == 1][:, None], probs[labels == 0][None]
    assert rows[0]["validation_auroc"] == pytest.approx(np.mean((above > below) + 0.5 * (above == below)))


def test_early_stopping_ends_a_run_and_the_best_stays(train_tiny: Train, tmp_path: Path) -> None:
    said: list[str] = []
    run = train_tiny(
        tmp_path / "run",
        optimizer__peak_lr=1e-30,
        optimizer__schedule="constant",
        train__early_stop_patience=2,
        train__epochs=20,
        checkpoint__keep=1,
        say=said.append,
    )
    assert len(run.history()) == 3
    assert run.result["ended_by"] == "early_stop"
    assert run.checkpoints.steps() == [6, 16]
    assert run.result["best_step"] == 6
    assert any("Ended: validation_loss did not improve for 2 epochs." in line for line in said)


def test_a_plateau_lowers_the_rate_in_the_history(train_tiny: Train, tmp_path: Path) -> None:
    run = train_tiny(
        tmp_path / "run",
        optimizer__name="sgd",
        optimizer__schedule="plateau",
        optimizer__plateau_patience=1,
        optimizer__peak_lr=1e-30,
        optimizer__min_lr=3e-31,
        train__epochs=4,
    )
    rates = [row["learning_rate"] for row in run.history()]
    assert rates == pytest.approx([1e-30, 1e-30, 5e-31, 3e-31])


def test_a_collapsed_run_is_named_with_advice(train_tiny: Train, tmp_path: Path) -> None:
    said: list[str] = []
    run = train_tiny(
        tmp_path / "run",
        model__options={"norm": False, "dropout": 0.0},
        optimizer__name="sgd",
        optimizer__schedule="constant",
        optimizer__peak_lr=1e4,
        optimizer__clip_norm=1.0,
        optimizer__weight_decay=0.0,
        train__epochs=1,
        say=said.append,
    )
    assert run.result["collapsed"]
    assert any("this run has collapsed" in line and "optimizer.peak_lr" in line for line in said)


def test_too_many_steps_without_a_finite_loss_end_the_run(train_tiny: Train, tmp_path: Path) -> None:
    wild = {
        "model__options": {"norm": False, "dropout": 0.0},
        "optimizer__name": "sgd",
        "optimizer__schedule": "constant",
        "optimizer__peak_lr": 1e30,
        "checkpoint__every_steps": 1,
        "train__nan_patience": 3,
    }
    with pytest.raises(UserError, match=r"3 steps in a row .* were skipped: try a lower optimizer.peak_lr"):
        train_tiny(tmp_path / "run", **wild)
    checkpoint, remarks = open_run(tmp_path / "run").checkpoints.load_latest()
    assert checkpoint is not None
    assert not remarks
    assert all(np.isfinite(array).all() for array in checkpoint.arrays.values())
    assert checkpoint.arrays["skipped_in_row"] >= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__schedule": "constant"},
        {"optimizer__schedule": "plateau", "optimizer__plateau_patience": 1, "optimizer__ema_decay": 0.9},
    ],
)
def test_longer_training_equals_training_straight(
    train_tiny: Train, tmp_path: Path, changes: dict[str, Any]
) -> None:
    for epochs in (1, 2, 4):
        train_tiny(tmp_path / "pieces", train__epochs=epochs, resume=True, **changes)
    train_tiny(tmp_path / "straight", train__epochs=4, **changes)
    pieces, straight = tmp_path / "pieces", tmp_path / "straight"
    assert not tiny.differing_arrays(tiny.final_arrays(pieces), tiny.final_arrays(straight))
    assert tiny.same_history(pieces, straight)
    assert [row["epoch"] for row in open_run(pieces).history()] == [1, 2, 3, 4]


def test_a_run_whose_time_ran_out_is_taken_up_again(train_tiny: Train, tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(3):
        run = train_tiny(tmp_path / "run", train__max_seconds=1e-3, resume=True, say=said.append)
    assert run.result["ended_by"] == "epochs"
    assert sum("train.max_seconds (0.001) reached; --resume goes on" in line for line in said) == 2
    assert [row["epoch"] for row in run.history()] == [1, 2, 3]


def test_a_run_can_be_trained_without_the_command_line(tiny_run: Path) -> None:
    import pcam_jax

    run = open_run(tiny_run)
    written = pcam_jax.load_config(tiny_run / "config.toml")
    assert written == run.config
    assert json.loads((tiny_run / "result.json").read_text())["best_step"] in run.checkpoints.steps()
    assert (pd.read_csv(tiny_run / "split.csv").groupby("split").size() > 0).all()


def test_a_step_compiles_once_a_run(
    train_tiny: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    import jax

    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, logger="jax"):
            train_tiny(tmp_path / "run", checkpoint__every_steps=2, train__epochs=3)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    for name in ("jit(step)", "jit(eval_step)", "jit(begin_epoch)"):
        assert sum(name in message for message in compiled) <= 1, name
    assert any("jit(step)" in message for message in compiled)
