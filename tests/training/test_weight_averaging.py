"""Averages made at the ends of epochs, with the batch statistics that belong to them."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pcam_jax.config.files import load_config
from pcam_jax.config.schema import OptimizerConfig
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import open_store
from pcam_jax.inference.forward import Forward
from pcam_jax.inference.predictor import Predictor, build_run_net, load_weights
from pcam_jax.run.folder import open_run
from pcam_jax.runtime.errors import Interrupted, UserError
from pcam_jax.training.averaging import finished_statistics, keeps_average, make_statistics_step

SWA: dict[str, Any] = {
    "train__epochs": 4,
    "optimizer__swa_epochs": 2,
    "optimizer__peak_lr": 0.01,
    "checkpoint__keep": 10,
}
SCHEDULE_FREE: dict[str, Any] = {
    "train__epochs": 2,
    "optimizer__name": "schedule_free_adamw",
    "optimizer__freeze_epochs": 1,
    "checkpoint__keep": 10,
    "optimizer__peak_lr": 0.01,
}


@pytest.fixture(scope="module")
def swa_run(tmp_path_factory: pytest.TempPathFactory, train_tiny: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("swa") / "run"
    train_tiny(path, **SWA)
    return path


@pytest.fixture(scope="module")
def schedule_free_run(tmp_path_factory: pytest.TempPathFactory, train_tiny: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("free") / "run"
    train_tiny(path, **SCHEDULE_FREE)
    return path


def at_epoch_ends(path: Path) -> list[dict[str, np.ndarray]]:
    run = open_run(path)
    return [run.checkpoints.load(int(row["step"])).arrays for row in run.history()]


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def measured(path: Path, store: Path, params: Any, batch_size: int = 8) -> dict[str, np.ndarray]:
    """Mean and variance before the tiny net's normalisation, over the training images that were used."""
    run, data = open_run(path), open_store(store)
    positions = np.flatnonzero(run.split()["split"].to_numpy() == "train")
    order = TrainOrder(data.labels[positions], batch_size, run.config.train.seed)
    used = np.concatenate([order.indices(step) for step in range(order.epoch_end_step(1))])
    images = data.gather(positions[used]).astype(np.float32) / 255
    maps = jax.lax.conv_general_dilated(
        images, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # the tiny net's convolution is followed by a ReLU, then the normalisation
    maps = np.asarray(jnp.maximum(maps + params["bias"], 0), np.float64)
    return {"mean": maps.mean((0, 1, 2)), "var": maps.var((0, 1, 2))}


def test_weights_are_the_mean_over_the_last_epochs(swa_run: Path) -> None:
    ends = at_epoch_ends(swa_run)
    assert [int(arrays["average.count"]) for arrays in ends] == [0, 0, 1, 2]
    third, fourth = (part(arrays, "params.") for arrays in ends[2:])
    found = part(ends[3], "average.params.")
    assert found.keys() == third.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, (third[name] + fourth[name]) / 2, rtol=1e-5, atol=1e-7)
    assert tiny.differing_arrays(part(ends[2], "average.params."), third) == []


def test_statistics_are_those_of_the_averaged_weights(swa_run: Path, tiny_store: Path) -> None:
    arrays = at_epoch_ends(swa_run)[3]
    params, stats = part(arrays, "average.params.conv1."), part(arrays, "average.batch_stats.norm1.")
    expected = measured(swa_run, tiny_store, params)
    np.testing.assert_allclose(stats["mean"], expected["mean"], rtol=1e-4)
    # each batch counts its own variance as n / (n - 1)
    np.testing.assert_allclose(stats["var"], expected["var"], rtol=5e-3)
    running = part(arrays, "batch_stats.norm1.")
    assert not np.allclose(stats["mean"], running["mean"], rtol=1e-3)


def check_validation_figures(path: Path, store: Path, epoch: int) -> None:
    """The history's loss is that of the weights which the run's readers get."""
    run, data = open_run(path), open_store(store)
    net = build_run_net(run)
    weights, step, _ = load_weights(run, net)
    row = run.history()[epoch]
    assert step == row["step"], "the fixture's best epoch has changed: choose other settings"
    predictor = Predictor(net, weights, "unit", run.class_names, _default_point())
    positions = run.positions(data, "validation")
    (logits,) = predictor.logits(data, positions)
    log_probs = jax.nn.log_sigmoid(np.where(data.labels[positions] == 1, 1, -1) * logits[:, 0])
    np.testing.assert_allclose(-np.mean(log_probs), row["validation_loss"], rtol=1e-5)


def _default_point() -> Any:
    from pcam_jax.run.operating_point import OperatingPoint

    return OperatingPoint()


@pytest.mark.parametrize("name", ["swa_run", "schedule_free_run"])
def test_readers_of_a_run_get_what_was_evaluated(
    name: str, request: pytest.FixtureRequest, tiny_store: Path
) -> None:
    path = request.getfixturevalue(name)
    run = open_run(path)
    best = min(range(len(run.history())), key=lambda i: run.history()[i]["validation_loss"])
    check_validation_figures(path, tiny_store, best)
    if name == "schedule_free_run":
        arrays = at_epoch_ends(path)[-1]
        weights, _, _ = load_weights(run, build_run_net(run))
        assert not np.array_equal(weights[0]["conv1"]["kernel"], arrays["params.conv1.kernel"])
        expected = measured(path, tiny_store, part(arrays, "average.params.conv1."))
        np.testing.assert_allclose(arrays["average.batch_stats.norm1.mean"], expected["mean"], rtol=1e-4)


def test_frozen_statistics_are_not_measured_anew(schedule_free_run: Path) -> None:
    first = at_epoch_ends(schedule_free_run)[0]
    assert int(first["average.count"]) == 1
    assert tiny.differing_arrays(part(first, "average.batch_stats."), part(first, "batch_stats.")) == []
    assert (first["batch_stats.norm1.mean"] == 0).all()


def test_only_weights_that_no_step_ran_with_are_kept_beside() -> None:
    statistics = {"norm": {"mean": np.zeros(1), "var": np.ones(1)}}
    schedule_free = OptimizerConfig(name="schedule_free_adamw")
    assert keeps_average(schedule_free, statistics)
    assert not keeps_average(schedule_free, {})
    assert not keeps_average(dataclasses.replace(schedule_free, ema_decay=0.9), statistics)
    assert keeps_average(OptimizerConfig(swa_epochs=1), {})
    assert not keeps_average(OptimizerConfig(ema_decay=0.9), statistics)


def test_a_signal_during_the_evaluation_changes_nothing(
    swa_run: Path, tmp_path: Path, train_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, evaluations = Forward.logits, []

    def interrupted(self: Forward, *arguments: Any) -> np.ndarray:
        evaluations.append(1)
        if len(evaluations) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits(self, *arguments)

    monkeypatch.setattr(Forward, "logits", interrupted)
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_tiny(path, **SWA)
    assert len(open_run(path).history()) == 3
    monkeypatch.undo()
    train_tiny(path, resume=True, **SWA)
    assert tiny.same_history(swa_run, path)
    # the checkpoint made before the evaluation was replaced by that of the decided epoch
    assert tiny.differing_arrays(tiny.final_arrays(swa_run), tiny.final_arrays(path)) == []
    checkpoints = open_run(path).checkpoints
    assert checkpoints.load(checkpoints.steps()[-1]).progress["control"]["epoch"] == 4


def test_variances_join_as_if_all_batches_were_one() -> None:
    tiny.register()
    from pcam_jax.models.registry import build_model

    net = build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=1)
    params, batch_stats = net.init(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (4, 6, *tiny.IMAGE_SHAPE), np.uint8)
    images[2:] //= 3  # batches that differ
    config = load_config(None, {"model.options": {"dropout": 0.0}})
    step = jax.jit(make_statistics_step(net, config))
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    carry = (params, zeros, zeros, jnp.int32(0))
    for batch in images:
        carry = step(carry, batch, np.zeros(6, np.int32))
    joined = finished_statistics(*carry[1:])["norm1"]
    together = images.reshape(-1, *tiny.IMAGE_SHAPE) / np.float32(255)
    alone = jax.jit(net.batch_statistics)(params, batch_stats, together, key=jax.random.key(0))["norm1"]
    np.testing.assert_allclose(joined["mean"], alone["mean"], rtol=1e-5)
    np.testing.assert_allclose(joined["var"], alone["var"], rtol=5e-3)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"optimizer.swa_epochs": 9}, "must not exceed train.epochs"),
        ({"optimizer.swa_epochs": 2, "optimizer.freeze_epochs": 7}, "must not exceed train.epochs"),
        ({"optimizer.swa_epochs": 1, "optimizer.name": "schedule_free_adamw"}, "averages at every step"),
        ({"optimizer.swa_epochs": -1}, "0 or more"),
    ],
)
def test_averages_that_make_no_sense_are_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(None, {"train.epochs": 8, **overrides})


def test_a_run_with_averages_cannot_be_lengthened(swa_run: Path, train_tiny: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="started with other settings"):
        train_tiny(swa_run, resume=True, **{**SWA, "train__epochs": 6})
