from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pcam_jax.config.schema import OptimizerConfig
from pcam_jax.runtime.errors import UserError
from pcam_jax.training.optimizer import learning_rate_factors, make_optimizer, make_schedule, staged_schedule

RNG = np.random.default_rng(1)
PARAMS = {
    "kernel": RNG.normal(size=(3, 4)).astype(np.float32),
    "conv": RNG.normal(size=(2, 2, 3, 5)).astype(np.float32),
    "bias": RNG.normal(size=4).astype(np.float32),
}
GRADS = [
    {name: RNG.normal(size=leaf.shape).astype(np.float32) for name, leaf in PARAMS.items()} for _ in range(4)
]
BASE = OptimizerConfig(name="adam", peak_lr=0.01, schedule="constant")


def follow(config: OptimizerConfig) -> dict[str, np.ndarray]:
    """The params after all gradients."""
    optimizer = make_optimizer(config, 100, PARAMS)
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step, grads in enumerate(GRADS):
        updates, state = update(grads, state, params, optimizer.schedule(step))
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(leaf) for name, leaf in params.items()}


def clipped(grads: dict[str, np.ndarray], norm: float) -> dict[str, np.ndarray]:
    wide = {name: leaf.astype(np.float64) for name, leaf in grads.items()}
    total = np.sqrt(sum(np.sum(leaf**2) for leaf in wide.values()))
    return {name: leaf * min(1.0, norm / total) if norm else leaf for name, leaf in wide.items()}


def reference(config: OptimizerConfig) -> dict[str, np.ndarray]:
    """The update rules as their papers and Keras write them, in float64."""
    params = {name: leaf.astype(np.float64) for name, leaf in PARAMS.items()}
    first = {name: np.zeros(leaf.shape) for name, leaf in params.items()}
    second = {name: np.zeros(leaf.shape) for name, leaf in params.items()}
    rate = config.peak_lr
    for step, raw in enumerate(GRADS, start=1):
        for name, grad in clipped(raw, config.clip_norm).items():
            value = params[name]
            decay = config.weight_decay if value.ndim >= 2 else 0.0
            if config.name != "adamw":
                grad = grad + decay * value
            if config.name in ("adam", "adamw"):
                first[name] = config.beta1 * first[name] + (1 - config.beta1) * grad
                second[name] = config.beta2 * second[name] + (1 - config.beta2) * grad**2
                corrected = second[name] / (1 - config.beta2**step)
                direction = first[name] / (1 - config.beta1**step) / (np.sqrt(corrected) + config.epsilon)
            elif config.name == "rmsprop":
                second[name] = 0.9 * second[name] + 0.1 * grad**2
                direction = grad / np.sqrt(second[name] + config.epsilon)
                first[name] = config.momentum * first[name] + direction
                direction = first[name]
            else:
                first[name] = config.momentum * first[name] + grad
                direction = grad + config.momentum * first[name] if config.nesterov else first[name]
            if config.name == "adamw":
                direction = direction + decay * value
            params[name] = value - rate * direction
    return params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epsilon": 0.1},
        {"beta1": 0.5, "beta2": 0.9},
        {"weight_decay": 0.1},
        {"name": "adamw", "weight_decay": 0.1},
        {"name": "adamw", "weight_decay": 0.1, "clip_norm": 0.5},
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9},
        {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"name": "rmsprop"},
        {"name": "rmsprop", "momentum": 0.9, "epsilon": 0.01, "clip_norm": 1.0},
    ],
)
def test_update_rules_follow_their_formulas(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(BASE, **changes)
    found, expected = follow(config), reference(config)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon", "schedule_free_adamw"])
def test_biases_never_decay(name: Any) -> None:
    zero = {key: np.zeros_like(leaf) for key, leaf in PARAMS.items()}
    config = dataclasses.replace(BASE, name=name, weight_decay=0.5)
    optimizer = make_optimizer(config, 100, PARAMS)
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(params), params, 0.1)
    np.testing.assert_allclose(updates["bias"], 0, atol=1e-7)
    assert np.all(np.asarray(updates["kernel"]) * PARAMS["kernel"] < 0)


def test_muon_steps_are_orthogonal_for_kernels_and_adams_for_biases() -> None:
    config = dataclasses.replace(BASE, name="muon")
    optimizer = make_optimizer(config, 100, PARAMS)
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = optimizer.update(GRADS[0], optimizer.init(params), params, 1.0)
    for name in ("kernel", "conv"):
        matrix = np.asarray(updates[name]).reshape(-1, PARAMS[name].shape[-1])
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.min() > 0.4 * singular.max()
    np.testing.assert_allclose(updates["bias"], -np.sign(GRADS[0]["bias"]), rtol=1e-3)


def test_schedule_free_evaluates_other_params_than_it_trains() -> None:
    config = dataclasses.replace(BASE, name="schedule_free_adamw", peak_lr=0.1)
    optimizer = make_optimizer(config, 100, PARAMS)
    params: Any = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for grads in GRADS:
        updates, state = optimizer.update(grads, state, params, 0.1)
        params = optax.apply_updates(params, updates)
    evaluated = optimizer.eval_params(state, params)
    assert not np.allclose(evaluated["kernel"], params["kernel"])
    other = make_optimizer(BASE, 100, PARAMS)
    assert other.eval_params(other.init(params), params) is params


def test_schedule_free_refuses_a_schedule() -> None:
    config = dataclasses.replace(BASE, name="schedule_free_adamw", schedule="cosine")
    with pytest.raises(UserError, match=r"optimizer.schedule is 'cosine'"):
        make_optimizer(config, 100, PARAMS)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "plateau"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 40])
def test_schedules_stay_between_floor_and_peak(schedule: Any, warmup: float, total: int) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_fraction=warmup, peak_lr=0.3, min_lr=1e-3)
    rate = make_schedule(config, total)
    rates = np.array([rate(step) for step in range(total + 2)], np.float64)
    assert rates.max() <= 0.3 * (1 + 1e-5)
    assert rates.min() >= 0
    assert rates[-1] >= 1e-3 * (1 - 1e-5)
    if schedule in ("constant", "plateau"):
        assert (rates == np.float32(0.3)).all()


def test_cosine_rises_linearly_and_falls_along_a_half_cosine() -> None:
    config = OptimizerConfig(schedule="cosine", peak_lr=1.0, min_lr=0.1, warmup_fraction=0.2)
    rate = make_schedule(config, 100)
    np.testing.assert_allclose([rate(0), rate(10), rate(20)], [0, 0.5, 1], rtol=1e-6)
    np.testing.assert_allclose(rate(60), 0.1 + 0.9 * 0.5, rtol=1e-5)
    np.testing.assert_allclose([rate(100), rate(1000)], 0.1, rtol=1e-5)
    without = make_schedule(dataclasses.replace(config, warmup_fraction=0.0), 100)
    np.testing.assert_allclose(without(0), 1)


def test_one_cycle_goes_up_and_down() -> None:
    config = OptimizerConfig(schedule="one_cycle", peak_lr=1.0, min_lr=0.01)
    rate = make_schedule(config, 100)
    np.testing.assert_allclose([rate(0), rate(30), rate(100)], [1 / 25, 1, 0.01], rtol=1e-5)
    rates = np.array([rate(step) for step in range(101)])
    assert (np.diff(rates[:31]) > 0).all()
    assert (np.diff(rates[30:]) < 0).all()


def test_a_frozen_beginning_has_a_schedule_of_its_own() -> None:
    config = OptimizerConfig(schedule="one_cycle", peak_lr=1.0, freeze_epochs=1, freeze_lr=0.1)
    rate = staged_schedule(config, 150, 50)
    alone = make_schedule(config, 50, 0.1)
    after = make_schedule(config, 100)
    for step in (0, 15, 49):
        np.testing.assert_allclose(rate(jnp.int32(step)), alone(step), rtol=1e-6)
    for step in (50, 80, 149):
        np.testing.assert_allclose(rate(jnp.int32(step)), after(step - 50), rtol=1e-6)


def test_factors_freeze_the_body_and_slow_the_stem() -> None:
    depths = {"stem": 2, "stage": 1, "head": 0}
    config = OptimizerConfig(layer_decay=0.5)
    assert learning_rate_factors(config, depths, frozen=True) == {"stem": 0.0, "stage": 0.0, "head": 1.0}
    assert learning_rate_factors(config, depths, frozen=False) == {"stem": 0.25, "stage": 0.5, "head": 1.0}
    assert learning_rate_factors(OptimizerConfig(), depths, frozen=False) is None
