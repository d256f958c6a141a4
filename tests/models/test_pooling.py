from __future__ import annotations

import float64_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pcam_jax.models import pooling

# Few values, so that windows are full of ties, and NaN among them.
tied_images = st.sampled_from([(1, 2, 2, 1), (2, 5, 4, 3), (1, 7, 9, 2)]).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.sampled_from([-1.0, 0.0, 0.5, float("nan")]))
)


def pool_and_gradient(pool, x, grad):
    output, pull_back = jax.vjp(pool, x)
    return output, pull_back(grad)[0]


@pytest.mark.parametrize(
    ("pool", "window", "padding"), [(pooling.max_pool_2x2, 2, 0), (pooling.max_pool_3x3, 3, 1)]
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(x=tied_images)
def test_gradient_goes_to_the_first_largest_tap_as_in_float64(pool, window, padding, x):
    rows, columns = ((n + 2 * padding - window) // 2 + 1 for n in x.shape[1:3])
    grad = np.arange(1, x.shape[0] * rows * columns * x.shape[3] + 1, dtype=np.float32)
    grad = grad.reshape(x.shape[0], rows, columns, x.shape[3])
    expected, expected_grad = reference.max_pool(x, window, 2, padding, grad)
    output, grad_x = jax.jit(pool_and_gradient, static_argnums=0)(pool, x, grad)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(grad_x, expected_grad)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 3, 0)])
def test_every_form_agrees_with_reduce_window(window, stride, padding, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 11, 8, 3)), dtype)
    plain = pooling.max_pool_plain(x, window, stride, padding)
    grad = jnp.asarray(rng.normal(size=plain.shape), dtype)
    chosen = pool_and_gradient(lambda x: pooling.max_pool(x, window, stride, padding), x, grad)
    default = pool_and_gradient(lambda x: pooling.max_pool_plain(x, window, stride, padding), x, grad)
    assert chosen[0].dtype == chosen[1].dtype == dtype
    np.testing.assert_array_equal(chosen[0], default[0])
    # Overlapping windows add their gradients in an order of their own.
    tolerance = 0 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(
        chosen[1].astype(jnp.float32), default[1].astype(jnp.float32), rtol=1e-6, atol=tolerance
    )


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 1)])
def test_average_pool_is_the_mean_of_each_window(window, stride):
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 3)).astype(np.float32)
    view = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (window, window), axis=(1, 2))
    expected = view[:, ::stride, ::stride].mean((-1, -2))
    np.testing.assert_allclose(pooling.avg_pool(jnp.asarray(x), window, stride), expected, atol=1e-6)
