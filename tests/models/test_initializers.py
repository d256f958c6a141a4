from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcam_jax.models import initializers

KERNEL = (3, 3, 16, 64)
FAN_IN, FAN_OUT = 9 * 16, 9 * 64


@pytest.mark.parametrize(
    ("init", "limit"),
    [
        (initializers.glorot_uniform, np.sqrt(6 / (FAN_IN + FAN_OUT))),
        (initializers.he_uniform, np.sqrt(6 / FAN_IN)),
        (initializers.uniform_within(0.25), 0.25),
    ],
)
def test_uniform_kernels_fill_their_interval(init, limit):
    values = initializers.draw(jax.random.key(0), {"a": (init, KERNEL)})["a"]
    assert values.shape == KERNEL
    assert values.dtype == jnp.float32
    assert 0.995 * limit < float(jnp.abs(values).max()) <= limit
    assert abs(float(values.std()) / (limit / np.sqrt(3)) - 1) < 0.03
    assert abs(float(values.mean())) < 0.03 * limit


@pytest.mark.parametrize(
    ("init", "std"),
    [(initializers.he_normal, np.sqrt(2 / FAN_IN)), (initializers.he_normal_fan_out, np.sqrt(2 / FAN_OUT))],
)
def test_normal_kernels_have_their_deviation(init, std):
    values = np.asarray(initializers.draw(jax.random.key(0), {"a": (init, KERNEL)})["a"])
    assert abs(values.std() / std - 1) < 0.03
    # Untruncated: some of 9,216 values lie beyond three deviations, about 25 of them.
    assert 10 < (np.abs(values) > 3 * std).sum() < 50


def test_values_depend_on_key_path_and_shape_alone():
    a, b = (initializers.he_normal, (40, 300)), (initializers.glorot_uniform, (7, 3))
    both = initializers.draw(jax.random.key(1), {"x.kernel": a, "y.kernel": b})
    swapped = initializers.draw(jax.random.key(1), {"y.kernel": b, "x.kernel": a})
    alone = initializers.draw(jax.random.key(1), {"x.kernel": a})
    np.testing.assert_array_equal(both["x.kernel"], swapped["x.kernel"])
    np.testing.assert_array_equal(both["y.kernel"], swapped["y.kernel"])
    np.testing.assert_array_equal(both["x.kernel"], alone["x.kernel"])
    renamed = initializers.draw(jax.random.key(1), {"z.kernel": a})
    assert not np.array_equal(both["x.kernel"], renamed["z.kernel"])
    assert not np.array_equal(
        both["x.kernel"], initializers.draw(jax.random.key(2), {"x.kernel": a})["x.kernel"]
    )


def test_blocks_of_one_parameter_differ():
    flat = np.asarray(
        initializers.draw(jax.random.key(0), {"a": (initializers.he_normal, (100, 100))})["a"]
    ).ravel()
    assert len(np.unique(flat)) > 9_900


def test_constants_are_constant():
    drawn = initializers.draw(
        jax.random.key(0), {"a": (initializers.ones, (3,)), "b": (initializers.zeros, (2, 2))}
    )
    assert float(drawn["a"].sum()) == 3
    assert not drawn["b"].any()
