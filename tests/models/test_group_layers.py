from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orientations import act, act_on_map, largest_error, orbit

from pcam_jax.models import group_layers

GROUPS: list[group_layers.Group] = ["p4", "p4m"]


def test_the_eight_elements_are_the_group() -> None:
    square = np.arange(9).reshape(3, 3)
    assert len({group_layers.act(square, g).tobytes() for g in range(8)}) == 8
    for first in range(8):
        np.testing.assert_array_equal(
            group_layers.act(group_layers.act(square, first), group_layers.inverse(first)), square
        )
        for second in range(8):
            both = group_layers.act(group_layers.act(square, second), first)
            np.testing.assert_array_equal(both, group_layers.act(square, group_layers.compose(first, second)))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lifting", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_full_kernel_is_the_parameter_in_all_orientations(
    group: group_layers.Group, lifting: bool, size: int
) -> None:
    elements = group_layers.GROUP_SIZE[group]
    layer = group_layers.GroupConv(group, 3, 2, size, lifting=lifting)
    values = np.random.default_rng(0).normal(size=layer.kernel[...].shape).astype(np.float32)
    layer.kernel[...] = jnp.asarray(values)
    full = np.asarray(layer.effective_kernel())
    planes = 1 if lifting else elements
    assert full.shape == (size, size, planes * 3, elements * 2)
    apart = values.reshape(size, size, planes, 3, 2)
    full = full.reshape(size, size, planes, 3, elements, 2)
    for g in range(elements):
        for h in range(planes):
            source = 0 if lifting else group_layers.compose(group_layers.inverse(g), h)
            np.testing.assert_array_equal(full[:, :, h, :, g], group_layers.act(apart[:, :, source], g))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_convolutions_are_equivariant(group: group_layers.Group, padding: Any) -> None:
    elements = group_layers.GROUP_SIZE[group]
    rng = np.random.default_rng(0)
    lift = group_layers.GroupConv(group, 3, 4, 3, lifting=True, padding=padding)
    deep = group_layers.GroupConv(group, 4, 5, 3, padding=padding)
    for layer in (lift, deep):
        layer.kernel[...] = jnp.asarray(rng.normal(size=layer.kernel[...].shape), jnp.float32)
    out = np.asarray(jax.jit(lambda x: deep(jax.nn.relu(lift(x))))(orbit(11, elements)))
    for h in range(elements):
        assert largest_error(out[h : h + 1], act_on_map(out[:1], h, elements)) < 1e-5
    assert largest_error(out[1:2], act(out[:1], 1)) > 0.1  # turning alone, without permuting, is not enough


@pytest.mark.parametrize("side", [8, 9])
def test_pool_is_equivariant_on_even_and_odd_sides(side: int) -> None:
    x = orbit(side, 8)
    out = np.asarray(group_layers.SymmetricPool()(jnp.asarray(x)))
    assert out.shape == (8, 4, 4, 3)
    for h in range(8):
        np.testing.assert_allclose(out[h : h + 1], act(out[:1], h), atol=1e-6)
    window = 3 if side % 2 else 2
    np.testing.assert_allclose(out[0, 1, 2], x[0, 2 : 2 + window, 4 : 4 + window].mean((0, 1)), atol=1e-6)


def test_norm_shares_its_statistics_over_the_group() -> None:
    layer = group_layers.GroupBatchNorm("p4m", 5)
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (4, 6, 6, 8 * 5)), jnp.float32)
    y = np.asarray(layer(x, train=True)).reshape(4, 6, 6, 8, 5)
    np.testing.assert_allclose(y.mean((0, 1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2, 3)), 1, atol=1e-3)
    assert np.abs(y.mean((0, 1, 2))).max() > 0.01  # each element alone keeps its own mean
    apart = np.asarray(x).reshape(-1, 5)
    np.testing.assert_allclose(layer.mean[...], 0.01 * apart.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], 0.99 + 0.01 * apart.var(0), rtol=1e-5)
