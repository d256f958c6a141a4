from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pcam_jax.models import layers
from pcam_jax.runtime.errors import UserError


def images(shape=(4, 5, 6, 3), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(3.0, 2.0, shape).astype(np.float32))


@pytest.mark.parametrize("bessel", [False, True])
def test_batch_norm_uses_and_remembers_the_batch_in_training(bessel):
    norm = layers.BatchNorm(3, momentum=0.9, epsilon=1e-3, bessel=bessel)
    norm.scale[...] = jnp.array([1.0, 2.0, 0.5])
    norm.bias[...] = jnp.array([0.0, -1.0, 4.0])
    x = images()
    wide = np.asarray(x, np.float64)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2), ddof=0)
    expected = (wide - mean) / np.sqrt(var + 1e-3) * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(x, train=True), expected, atol=2e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)
    running = wide.var((0, 1, 2), ddof=1 if bessel else 0)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * running, rtol=1e-5)


def test_batch_norm_in_evaluation_uses_the_running_statistics_and_leaves_them():
    norm = layers.BatchNorm(3)
    norm.mean[...], norm.var[...] = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 9.0, 1.0])
    x = images()
    expected = (np.asarray(x) - [1, 2, 3]) / np.sqrt(np.array([4, 9, 1]) + 1e-3)
    np.testing.assert_allclose(norm(x, train=False), expected, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], [1, 2, 3])


def test_batch_norm_gradient_against_float64_differences():
    graphdef, state = nnx.split(layers.BatchNorm(2, epsilon=1e-3))
    state = nnx.to_pure_dict(state)
    x = images((3, 2, 2, 2), seed=1)
    weights = np.random.default_rng(2).normal(size=x.shape)

    def exact(x):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return ((x - mean) / np.sqrt(var + 1e-3) * weights).sum()

    grad = jax.grad(lambda x: (nnx.merge(graphdef, state)(x, train=True) * weights).sum())(x)
    wide = np.asarray(x, np.float64)
    for index in [(0, 0, 0, 0), (1, 1, 0, 1), (2, 0, 1, 0)]:
        step = np.zeros(x.shape)
        step[index] = 1e-5
        slope = (exact(wide + step) - exact(wide - step)) / 2e-5
        assert abs(float(grad[index]) - slope) < 1e-4


def test_batch_norm_of_a_large_offset_stays_finite():
    norm = layers.BatchNorm(1)
    y = norm(jnp.full((4, 3, 3, 1), 1e4), train=True)
    assert bool(jnp.isfinite(y).all())


def test_batch_norm_statistics_are_float32_for_bfloat16_maps():
    norm = layers.BatchNorm(3, dtype=jnp.bfloat16)
    y = norm(images((64, 8, 8, 3)).astype(jnp.bfloat16), train=True)
    assert y.dtype == jnp.bfloat16
    assert norm.mean[...].dtype == jnp.float32
    np.testing.assert_allclose(norm.mean[...], 0.01 * 3.0, rtol=0.05)


def test_batch_norm_over_a_sharded_batch_is_global():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    graphdef, state = nnx.split(layers.BatchNorm(3))
    state = nnx.to_pure_dict(state)
    x = images((8, 3, 3, 3))
    run = jax.jit(lambda x: nnx.merge(graphdef, state)(x, train=True))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(run(sharded), run(x), atol=1e-6)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    drop = layers.Dropout(0.25)
    x = jnp.ones((100, 200))
    y = drop(x, train=True, key=jax.random.key(0))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float((y == 0).mean()) - 0.25) < 0.01
    assert drop(x, train=False, key=None) is x
    np.testing.assert_array_equal(y, drop(x, train=True, key=jax.random.key(0)))
    assert not np.array_equal(y, drop(x, train=True, key=jax.random.key(1)))


def test_dropout_in_training_without_a_key_is_an_error():
    with pytest.raises(ValueError, match="key="):
        layers.Dropout(0.5)(jnp.ones((2, 2)), train=True, key=None)


@pytest.mark.parametrize(
    "layer", [layers.Conv(3, 4, 3), layers.MaxPool(3), layers.AvgPool(3)], ids=["conv", "max", "avg"]
)
def test_a_window_larger_than_its_map_is_a_users_error(layer):
    with pytest.raises(UserError, match="too deep for its image"):
        layer(jnp.ones((1, 2, 5, 3)))


def test_dense_and_flatten_compute_what_they_say():
    x = images((2, 2, 3, 2))
    flat = layers.Flatten()(x)
    np.testing.assert_array_equal(flat, np.asarray(x).reshape(2, 12))
    dense = layers.Dense(12, 5)
    dense.kernel[...] = jnp.asarray(np.random.default_rng(1).normal(size=(12, 5)), jnp.float32)
    dense.bias[...] = jnp.arange(5.0)
    expected = np.asarray(flat, np.float64) @ np.asarray(dense.kernel[...], np.float64) + np.arange(5)
    np.testing.assert_allclose(dense(flat), expected, rtol=1e-4)
    np.testing.assert_allclose(layers.GlobalAvgPool()(x), np.asarray(x).mean((1, 2)), rtol=1e-5)


def test_recording_lists_outermost_calls_in_order():
    class Block(nnx.Module):
        def __init__(self):
            self.inner = layers.Conv(3, 4, 1)

        @layers.recorded
        def __call__(self, x):
            return self.inner(x)

    block, pool = Block(), layers.MaxPool(2)
    with layers.recording() as rows:
        pool(block(jnp.ones((1, 4, 4, 3))))
    assert rows == [(block, (1, 4, 4, 4)), (pool, (1, 2, 2, 4))]
