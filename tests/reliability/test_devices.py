"""The same run on one, two, four and eight devices: the same batches, the same figures, one checkpoint for all."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pcam_jax.run.folder import open_run

Train = Callable[..., Any]
Verb = Callable[..., subprocess.CompletedProcess[str]]

# statistics over the whole batch, randomness in images and activations, both placements; not Adam, which turns
# the rounding of a gradient that should be zero into a whole step
SETTINGS = {
    "optimizer__name": "sgd",
    "optimizer__momentum": 0.9,
    "augment__horizontal_flip": True,
    "augment__brightness": 0.2,
    "optimizer__peak_lr": 0.05,
    "optimizer__schedule": "constant",
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 9,
}
FIGURES = ["train_loss", "train_accuracy", "validation_loss", "validation_auroc"]


@pytest.fixture(scope="module")
def on_devices(verb: Verb, tiny_store: Path) -> Callable[..., Path]:
    """Trains on some fake devices, in a process of its own."""

    def train(run: Path, devices: int, *extra: str, **overrides: Any) -> Path:
        options = tiny.as_options(tiny.settings(tiny_store, **{**SETTINGS, **overrides}))
        done = verb("--devices", devices, "train", "--workdir", run, *options, *extra)
        assert done.returncode == 0, done.stderr
        assert f"{devices} x CPU" in done.stdout
        return run

    return train


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, train_tiny: Train) -> Path:
    return train_tiny(tmp_path_factory.mktemp("devices") / "one", **SETTINGS).path


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory, on_devices: Callable[..., Path]) -> Path:
    return on_devices(tmp_path_factory.mktemp("devices") / "eight", 8)


def figures(run: Path) -> np.ndarray:
    return np.array([[row[name] for name in FIGURES] for row in open_run(run).history()])


def assert_close(run: Path, other: Path) -> None:
    np.testing.assert_allclose(figures(run), figures(other), rtol=1e-4)
    left, right = tiny.final_arrays(run), tiny.final_arrays(other)
    for name in left:
        if name.startswith(("params", "batch_stats")):
            np.testing.assert_allclose(left[name], right[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_eight_devices_agree_with_one(one: Path, eight: Path) -> None:
    assert_close(one, eight)


@pytest.mark.parametrize(("devices", "placement"), [(2, "device"), (4, "host")])
def test_other_numbers_of_devices_agree_with_one(
    on_devices: Callable[..., Path], one: Path, tmp_path: Path, devices: int, placement: str
) -> None:
    assert_close(one, on_devices(tmp_path / "run", devices, data__placement=placement))


def test_a_recipe_splits_the_cpu_and_a_resumed_run_takes_its_number_up_again(
    verb: Verb, one: Path, tiny_store: Path, tmp_path: Path
) -> None:
    options = tiny.as_options(tiny.settings(tiny_store, train__cpu_devices=2, **SETTINGS))
    whole = verb("train", "--workdir", tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    assert "2 x CPU" in whole.stdout
    assert_close(one, tmp_path / "whole")
    cut = tiny.cut(tmp_path / "whole", tmp_path / "cut", 8)
    resumed = verb("train", cut / "config.toml", "--workdir", cut, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "2 x CPU" in resumed.stdout
    assert "began on" not in resumed.stdout
    assert not tiny.differing_arrays(tiny.final_arrays(tmp_path / "whole"), tiny.final_arrays(cut))


def test_eight_devices_saved_and_one_goes_on(
    eight: Path, one: Path, tmp_path: Path, train_tiny: Train
) -> None:
    said: list[str] = []
    run = tiny.cut(eight, tmp_path / "moved", 8)
    train_tiny(run, resume=True, say=said.append, **SETTINGS)
    assert "Resuming at step 8 of 16." in said
    assert any("began on 8 x CPU" in line and "goes on on 1 x CPU" in line for line in said)
    assert_close(run, eight)


@pytest.mark.parametrize("devices", [2, 8])
def test_one_device_saved_and_several_go_on(
    one: Path, on_devices: Callable[..., Path], tmp_path: Path, devices: int
) -> None:
    assert_close(on_devices(tiny.cut(one, tmp_path / "moved", 8), devices, "--resume"), one)


def test_what_eight_devices_trained_predicts_alike_on_one(
    eight: Path, verb: Verb, tiny_store: Path, tmp_path: Path
) -> None:
    for devices in (1, 8):
        output = tmp_path / f"{devices}.csv"
        done = verb("--devices", devices, "predict", eight, tiny_store, "--output", output)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "8.csv").read_bytes()


def test_a_batch_that_devices_cannot_share_is_refused_before_anything_is_written(
    verb: Verb, tiny_store: Path, tmp_path: Path
) -> None:
    options = tiny.as_options(tiny.settings(tiny_store, train__batch_size=12))
    done = verb("--devices", 8, "train", "--workdir", tmp_path / "run", *options)
    assert done.returncode == 2
    assert "train.batch_size is 12: the 8 devices must share it evenly; take a multiple of 8." in done.stderr
    assert not (tmp_path / "run").exists()
