"""What is promised of a GPU; skipped where there is none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import tiny

from pcam_jax.data.sample import write_sample_store
from pcam_jax.run.folder import open_run

Verb = Callable[..., subprocess.CompletedProcess[str]]
# gradients of pools and of gathers, which GPUs by default add in any order
SETTINGS = {
    "model__name": "pcam_cnn3",
    "augment__d4": True,
    "augment__rotation_degrees": 15.0,
    "augment__mixup_alpha": 0.2,
    "optimizer__name": "adamw",
    "optimizer__ema_decay": 0.9,
    "train__batch_size": 16,
    "train__deterministic": True,
    "checkpoint__every_steps": 5,
    "checkpoint__keep": 99,
}


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU here")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "store"
    write_sample_store(path, count=160, test_count=40, slides=8, image_size=32)
    return path


@pytest.fixture(scope="module")
def train(verb: Verb, store: Path) -> Callable[..., None]:
    """Trains in a process of its own, since XLA reads its flags once."""

    def run(workdir: Path, *extra: str, **options: Any) -> None:
        settings = tiny.as_options(tiny.settings(store, **SETTINGS))
        done = verb("train", "--workdir", workdir, *settings, *extra, **options)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., None]) -> Path:
    run = tmp_path_factory.mktemp("gpu") / "straight"
    train(run)
    return run


@pytest.mark.parametrize("programs", ["kept", "compiled anew"])
def test_a_resumed_run_is_the_run_bit_for_bit(
    train: Callable[..., None], straight: Path, tmp_path: Path, programs: str
) -> None:
    environment = dict(os.environ)
    if programs == "compiled anew":  # the choice of kernels must not lie in the cache alone
        environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "xla")
    run = tiny.cut(straight, tmp_path / "run", 10)
    train(run, "--resume", env=environment)
    assert not tiny.differing_arrays(tiny.final_arrays(run), tiny.final_arrays(straight))
    assert tiny.same_history(run, straight)


def test_a_gpus_run_predicts_and_goes_on_on_the_cpu(
    verb: Verb, train: Callable[..., None], straight: Path, store: Path, tmp_path: Path
) -> None:
    on_cpu = {**os.environ, "JAX_PLATFORMS": "cpu"}
    probs = []
    for name, environment in (("gpu", dict(os.environ)), ("cpu", on_cpu)):
        output = tmp_path / f"{name}.csv"
        done = verb("predict", straight, store, "--output", output, env=environment)
        assert done.returncode == 0, done.stderr
        probs.append(pd.read_csv(output)["label"].to_numpy())
    np.testing.assert_allclose(probs[0], probs[1], atol=2e-3)  # a GPU may multiply in TF32
    run = tiny.cut(straight, tmp_path / "run", 10)
    train(run, "--resume", env=on_cpu)
    assert [row["epoch"] for row in open_run(run).history()] == [1, 2, 3]
