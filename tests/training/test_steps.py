from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pcam_jax.config.files import load_config
from pcam_jax.config.schema import Config
from pcam_jax.models.registry import Net, build_model
from pcam_jax.training.optimizer import make_optimizer
from pcam_jax.training.state import TrainState, initial_state, to_named_arrays
from pcam_jax.training.steps import (
    begin_epoch,
    evaluation_weights,
    make_eval_step,
    make_resident_step,
    make_train_step,
)

RNG = np.random.default_rng(2)
IMAGES = RNG.integers(0, 256, (8, *tiny.IMAGE_SHAPE), np.uint8)
LABELS = RNG.integers(0, 2, 8).astype(np.int32)


def configured(**settings: Any) -> Config:
    plain = {"optimizer.schedule": "constant", "optimizer.name": "sgd", "optimizer.peak_lr": 0.5}
    return load_config(None, plain | {name.replace("__", "."): value for name, value in settings.items()})


@pytest.fixture(scope="module", autouse=True)
def known() -> None:
    tiny.register()


def net_and_state(config: Config, **options: Any) -> tuple[Net, Any, TrainState]:
    net = build_model("tiny", image_shape=tiny.IMAGE_SHAPE, outputs=1, **options)
    params, stats = net.init(jax.random.key(config.train.seed))
    optimizer = make_optimizer(config.optimizer, 10, params)
    ema = config.optimizer.ema_decay > 0
    return net, optimizer, initial_state(params, stats, optimizer.init(params), ema=ema)


def make_step(config: Config, net: Any, optimizer: Any) -> Any:
    return jax.jit(make_train_step(net, optimizer, config, classes=2))


@dataclasses.dataclass(frozen=True)
class TwoLayers:
    """Mean colour -> 4 tanh units -> one logit: a net whose gradient fits on a line of numpy."""

    def init(self) -> Any:
        rng = np.random.default_rng(3)
        return {
            "w": rng.normal(size=(3, 4)).astype(np.float32),
            "v": rng.normal(size=(4, 1)).astype(np.float32),
        }

    def apply(
        self,
        params: Any,
        stats: Any,
        x: Any,
        *,
        train: bool = False,
        train_body: bool = True,
        key: Any = None,
    ) -> Any:
        hidden = jnp.tanh(x.mean((1, 2)) @ params["w"])
        return hidden @ params["v"], stats


def float64_gradient(params: Any, images: np.ndarray, labels: np.ndarray) -> Any:
    w, v = (params[name].astype(np.float64) for name in ("w", "v"))
    colour = images.astype(np.float64).mean((1, 2)) / 255
    hidden = np.tanh(colour @ w)
    slope = (1 / (1 + np.exp(-hidden @ v)) - labels[:, None]) / len(labels)
    return {"w": colour.T @ (slope @ v.T * (1 - hidden**2)), "v": hidden.T @ slope}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_gradient_equals_float64_and_parts_equal_the_whole_batch(parts: int) -> None:
    config = configured(optimizer__accumulate_steps=parts, train__batch_size=8)
    net = TwoLayers()
    params = net.init()
    optimizer = make_optimizer(config.optimizer, 10, params)
    state = initial_state(jax.tree.map(jnp.asarray, params), {}, optimizer.init(params), ema=False)
    after, figures = make_step(config, net, optimizer)(state, IMAGES, LABELS)
    for name, expected in float64_gradient(params, IMAGES, LABELS).items():
        found = (params[name] - np.asarray(after.params[name], np.float64)) / 0.5
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    logits = np.tanh(IMAGES.astype(np.float64).mean((1, 2)) / 255 @ params["w"]) @ params["v"]
    expected_loss = np.logaddexp(0, np.where(LABELS, -1, 1) * logits[:, 0]).mean()
    np.testing.assert_allclose(figures["loss"], expected_loss, rtol=1e-5)
    assert after.correct_sum == np.sum((logits[:, 0] > 0) == LABELS)
    assert after.example_count == 8
    np.testing.assert_allclose(after.loss_sum, 8 * expected_loss, rtol=1e-5)


def test_a_step_depends_on_state_batch_and_seed_alone() -> None:
    config = configured(augment__horizontal_flip=True, augment__brightness=0.2)
    net, optimizer, state = net_and_state(config)
    step = make_step(config, net, optimizer)
    once, again = (to_named_arrays(step(state, IMAGES, LABELS)[0]) for _ in range(2))
    assert not tiny.differing_arrays(once, again)
    later = dataclasses.replace(state, step=jnp.int32(5))
    assert tiny.differing_arrays(once, to_named_arrays(step(later, IMAGES, LABELS)[0]))
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert tiny.differing_arrays(
        once, to_named_arrays(make_step(other, net, optimizer)(state, IMAGES, LABELS)[0])
    )


def test_resident_images_give_the_same_step_bit_for_bit() -> None:
    config = configured(augment__rotation_degrees=10.0, optimizer__name="adam")
    net, optimizer, state = net_and_state(config)
    plain = make_train_step(net, optimizer, config, classes=2)
    pool = RNG.integers(0, 256, (20, *tiny.IMAGE_SHAPE), np.uint8)
    pool_labels = RNG.integers(0, 2, 20).astype(np.int32)
    chosen = RNG.permutation(20)[:8].astype(np.int32)
    sent, _ = jax.jit(plain)(state, pool[chosen], pool_labels[chosen])
    gathered, _ = jax.jit(make_resident_step(plain))(state, pool, pool_labels, chosen)
    assert not tiny.differing_arrays(to_named_arrays(sent), to_named_arrays(gathered))


COUNTERS = {"step", "skipped", "skipped_in_row"}


class Breakable(TwoLayers):
    """Black batches give an infinite loss; batches of one grey level 1 an update beyond float32."""

    def apply(
        self,
        params: Any,
        stats: Any,
        x: Any,
        *,
        train: bool = False,
        train_body: bool = True,
        key: Any = None,
    ) -> Any:
        logits, stats = super().apply(params, stats, x)
        broken = jnp.where(jnp.max(x) == 0, jnp.inf, 1.0)
        huge = jnp.where(jnp.max(x) * 255 < 1.5, 3e38, 1.0)
        return logits * broken, {"seen": stats["seen"] + huge * 1e3}


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters() -> None:
    config = configured(optimizer__name="adam", optimizer__ema_decay=0.9)
    net = Breakable()
    params = jax.tree.map(jnp.asarray, net.init())
    optimizer = make_optimizer(config.optimizer, 10, params)
    state = initial_state(params, {"seen": jnp.zeros(())}, optimizer.init(params), ema=True)
    step = make_step(config, net, optimizer)
    state, _ = step(state, IMAGES, LABELS)
    before = to_named_arrays(state)
    for count, bad in enumerate((np.zeros_like(IMAGES), np.ones_like(IMAGES)), start=1):
        state, figures = step(state, bad, LABELS)
        changed = set(tiny.differing_arrays(before, to_named_arrays(state)))
        assert changed == COUNTERS
        assert (int(state.skipped), int(state.skipped_in_row), int(state.step)) == (count, count, 1 + count)
        assert figures["skipped_in_row"] == count
    state, _ = step(state, IMAGES, LABELS)
    assert (int(state.skipped), int(state.skipped_in_row)) == (2, 0)
    changed = set(tiny.differing_arrays(before, to_named_arrays(state)))
    assert {"params.w", "opt_state.0.count", "ema_params.w", "batch_stats.seen"} <= changed


def test_the_average_follows_its_formula() -> None:
    config = configured(optimizer__ema_decay=0.5, optimizer__peak_lr=0.1)
    net, optimizer, state = net_and_state(config)
    step = make_step(config, net, optimizer)
    average = {name: leaf.astype(np.float64) for name, leaf in to_named_arrays(state.params).items()}
    for number in range(12):
        state, _ = step(state, IMAGES, LABELS)
        decay = min(0.5, (1 + number) / (10 + number))
        for name, leaf in to_named_arrays(state.params).items():
            average[name] = decay * average[name] + (1 - decay) * leaf
    for name, leaf in to_named_arrays(state.ema_params).items():
        np.testing.assert_allclose(leaf, average[name], rtol=1e-4, atol=1e-6)
    weights = evaluation_weights(state, optimizer)
    assert weights[0] is state.ema_params
    assert weights[1] is state.ema_batch_stats
    without = dataclasses.replace(state, ema_params={}, ema_batch_stats={})
    assert evaluation_weights(without, optimizer)[0] is state.params


def test_the_plateau_factor_scales_the_step() -> None:
    config = configured()
    net, optimizer, state = net_and_state(config, dropout=0.0)
    step = make_step(config, net, optimizer)
    whole = to_named_arrays(step(state, IMAGES, LABELS)[0].params)
    half = to_named_arrays(step(begin_epoch(state, jnp.float32(0.5)), IMAGES, LABELS)[0].params)
    start = to_named_arrays(state.params)
    for name in start:
        np.testing.assert_allclose(
            2 * (half[name] - start[name]), whole[name] - start[name], rtol=1e-3, atol=1e-6
        )


def test_an_epoch_begins_with_empty_sums_and_keeps_all_else() -> None:
    config = configured()
    net, optimizer, state = net_and_state(config)
    state, _ = make_step(config, net, optimizer)(state, IMAGES, LABELS)
    fresh = begin_epoch(state, jnp.float32(0.25))
    changed = set(tiny.differing_arrays(to_named_arrays(state), to_named_arrays(fresh)))
    assert changed <= {"loss_sum", "correct_sum", "example_count", "lr_scale"}
    assert (fresh.loss_sum, fresh.correct_sum, fresh.example_count, fresh.lr_scale) == (0, 0, 0, 0.25)


def test_a_frozen_body_keeps_weights_and_statistics() -> None:
    config = configured()
    net, optimizer, state = net_and_state(config)
    factors = jax.tree.map(lambda depth: float(depth == 0), net.depths())
    step = jax.jit(make_train_step(net, optimizer, config, classes=2, lr_factors=factors, train_body=False))
    after, _ = step(state, IMAGES, LABELS)
    changed = tiny.differing_arrays(to_named_arrays(state), to_named_arrays(after))
    trained = {name.split(".")[1] for name in changed if name.startswith("params.")}
    assert trained == {"dense1", "output"}
    assert not [name for name in changed if name.startswith("batch_stats.")]


def test_class_weights_scale_the_gradient_of_their_class() -> None:
    config = configured()
    net = TwoLayers()
    params = jax.tree.map(jnp.asarray, net.init())
    optimizer = make_optimizer(config.optimizer, 10, params)
    state = initial_state(params, {}, optimizer.init(params), ema=False)
    ones = np.ones(8, np.int32)
    moved = []
    for weights in (None, (5.0, 3.0)):
        step = make_train_step(net, optimizer, config, classes=2, class_weights=weights)
        after, _ = step(state, IMAGES, ones)
        moved.append(np.asarray(after.params["v"] - params["v"]))
    np.testing.assert_allclose(moved[1], 3 * moved[0], rtol=1e-4)


def test_evaluation_uses_no_dropout_and_no_batch_statistics() -> None:
    config = configured()
    net, _, state = net_and_state(config, dropout=0.5)
    evaluate = jax.jit(make_eval_step(net, "unit"))
    together = evaluate(state.params, state.batch_stats, IMAGES)
    reversed_ = evaluate(state.params, state.batch_stats, IMAGES[::-1].copy())
    np.testing.assert_array_equal(together, reversed_[::-1])
    assert together.shape == (8, 1)
    assert together.dtype == jnp.float32


def test_bfloat16_keeps_the_state_in_float32() -> None:
    config = configured(train__precision="bfloat16")
    net, optimizer, state = net_and_state(config, dtype=jnp.bfloat16)
    after, figures = make_step(config, net, optimizer)(state, IMAGES, LABELS)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(after)}
    assert dtypes == {"float32", "int32"}
    assert np.isfinite(figures["loss"])
