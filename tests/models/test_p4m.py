from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pcam_jax.models import p4m
from pcam_jax.models.registry import Net, build_model
from pcam_jax.runtime.errors import UserError

GROUPS: list[p4m.Group] = ["p4", "p4m"]


def act(images: np.ndarray, element: int) -> np.ndarray:
    """The element acting on [B, H, W, C]."""
    return np.moveaxis(p4m.act(np.moveaxis(images, 0, -1), element), -1, 0)


def act_on_map(maps: np.ndarray, element: int, elements: int) -> np.ndarray:
    """The element acting on a map over the group: T_h f[h^-1 g]."""
    apart = maps.reshape(*maps.shape[:3], elements, -1)
    moved = [p4m.compose(p4m.inverse(element), g) for g in range(elements)]
    return act(apart[:, :, :, moved].reshape(maps.shape), element)


def largest_error(got: Any, expected: np.ndarray) -> float:
    """In units of the expected values' spread."""
    return float(np.abs(np.asarray(got) - expected).max() / expected.std())


@functools.cache
def ready(name: str, side: int, **options: Any) -> tuple[Net, Any, Any]:
    """A net whose scales, shifts and statistics all differ, as after some training."""
    net = build_model(name, image_shape=(side, side, 3), outputs=2, **options)
    params, batch_stats = net.init(jax.random.key(0))
    rng = np.random.default_rng(0)

    def vary(leaf: jax.Array) -> jax.Array:
        return leaf * jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32) if leaf.ndim == 1 else leaf

    return net, jax.tree.map(vary, params), jax.tree.map(vary, batch_stats)


def orbit(side: int, elements: int) -> np.ndarray:
    """One image in all orientations, [elements, side, side, 3]."""
    image = np.random.default_rng(1).random((1, side, side, 3)).astype(np.float32)
    return np.concatenate([act(image, h) for h in range(elements)])


def test_the_eight_elements_are_the_group() -> None:
    square = np.arange(9).reshape(3, 3)
    assert len({p4m.act(square, g).tobytes() for g in range(8)}) == 8
    for first in range(8):
        np.testing.assert_array_equal(p4m.act(p4m.act(square, first), p4m.inverse(first)), square)
        for second in range(8):
            both = p4m.act(p4m.act(square, second), first)
            np.testing.assert_array_equal(both, p4m.act(square, p4m.compose(first, second)))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lifting", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_full_kernel_is_the_parameter_in_all_orientations(group: p4m.Group, lifting: bool, size: int) -> None:
    elements = p4m.GROUP_SIZE[group]
    layer = p4m.GroupConv(group, 3, 2, size, lifting=lifting)
    values = np.random.default_rng(0).normal(size=layer.kernel[...].shape).astype(np.float32)
    layer.kernel[...] = jnp.asarray(values)
    full = np.asarray(layer.effective_kernel())
    planes = 1 if lifting else elements
    assert full.shape == (size, size, planes * 3, elements * 2)
    apart = values.reshape(size, size, planes, 3, 2)
    full = full.reshape(size, size, planes, 3, elements, 2)
    for g in range(elements):
        for h in range(planes):
            source = 0 if lifting else p4m.compose(p4m.inverse(g), h)
            np.testing.assert_array_equal(full[:, :, h, :, g], p4m.act(apart[:, :, source], g))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_convolutions_are_equivariant(group: p4m.Group, padding: Any) -> None:
    elements = p4m.GROUP_SIZE[group]
    rng = np.random.default_rng(0)
    lift = p4m.GroupConv(group, 3, 4, 3, lifting=True, padding=padding)
    deep = p4m.GroupConv(group, 4, 5, 3, padding=padding)
    for layer in (lift, deep):
        layer.kernel[...] = jnp.asarray(rng.normal(size=layer.kernel[...].shape), jnp.float32)
    out = np.asarray(jax.jit(lambda x: deep(jax.nn.relu(lift(x))))(orbit(11, elements)))
    for h in range(elements):
        assert largest_error(out[h : h + 1], act_on_map(out[:1], h, elements)) < 1e-5
    assert largest_error(out[1:2], act(out[:1], 1)) > 0.1  # turning alone, without permuting, is not enough


@pytest.mark.parametrize("side", [8, 9])
def test_pool_is_equivariant_on_even_and_odd_sides(side: int) -> None:
    x = orbit(side, 8)
    out = np.asarray(p4m.SymmetricPool()(jnp.asarray(x)))
    assert out.shape == (8, 4, 4, 3)
    for h in range(8):
        np.testing.assert_allclose(out[h : h + 1], act(out[:1], h), atol=1e-6)
    window = 3 if side % 2 else 2
    np.testing.assert_allclose(out[0, 1, 2], x[0, 2 : 2 + window, 4 : 4 + window].mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("p4m_densenet", 96, {}),
        ("p4_densenet", 45, {"padding": "same", "growth": 4, "blocks": 3}),
        ("p4m_cnn", 47, {"width": 4}),
        ("p4m_resnet", 40, {"width": 2}),
        ("p4m_resnet", 42, {"width": 3}),  # a map of 21, whose halving overlaps
    ],
)
def test_nets_are_equivariant_and_their_logits_invariant(
    name: str, side: int, options: dict[str, Any]
) -> None:
    net, params, batch_stats = ready(name, side, **options)
    elements = 4 if name.startswith("p4_") else 8

    @jax.jit
    def run(params: Any, batch_stats: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        model = nnx.merge(net._graphdef, params, batch_stats)
        group_map = model.group_map(x, train=False)
        features = model.group_pool(group_map)
        return group_map, features, net.classify(params, batch_stats, features)

    group_map, features, logits = (np.asarray(x) for x in run(params, batch_stats, orbit(side, 8)))
    for h in range(elements):
        assert largest_error(group_map[h : h + 1], act_on_map(group_map[:1], h, elements)) < 1e-5
        assert largest_error(features[h : h + 1], act(features[:1], h)) < 1e-5
        np.testing.assert_allclose(logits[h], logits[0], rtol=1e-5, atol=1e-5)
    if elements == 4:  # quarter turns alone: a mirror image is another image
        assert np.abs(logits[4:] - logits[0]).max() > 1e-3


def test_training_is_invariant_too() -> None:
    """Loss, new statistics and gradients do not change if each image of a batch is turned at will."""
    net, params, batch_stats = ready("p4m_cnn", 22, width=4, blocks=3)
    images = np.random.default_rng(2).random((8, 22, 22, 3)).astype(np.float32)
    turned = np.concatenate([act(images[i : i + 1], i) for i in range(8)])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        logits, stats = net.apply(params, batch_stats, x, train=True)
        return jnp.mean(jnp.square(logits - 1)), stats

    (plain, stats), gradients = loss(params, images)
    (other, other_stats), other_gradients = loss(params, turned)
    np.testing.assert_allclose(plain, other, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * largest), gradients, other_gradients
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, other_stats)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


def test_norm_shares_its_statistics_over_the_group() -> None:
    layer = p4m.GroupBatchNorm("p4m", 5)
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (4, 6, 6, 8 * 5)), jnp.float32)
    y = np.asarray(layer(x, train=True)).reshape(4, 6, 6, 8, 5)
    np.testing.assert_allclose(y.mean((0, 1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2, 3)), 1, atol=1e-3)
    assert np.abs(y.mean((0, 1, 2))).max() > 0.01  # each element alone keeps its own mean
    apart = np.asarray(x).reshape(-1, 5)
    np.testing.assert_allclose(layer.mean[...], 0.01 * apart.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], 0.99 + 0.01 * apart.var(0), rtol=1e-5)


def test_bfloat16_stays_close() -> None:
    net, params, batch_stats = ready("p4m_cnn", 47, width=4)
    half = build_model("p4m_cnn", image_shape=(47, 47, 3), outputs=2, dtype=jnp.bfloat16, width=4)
    x = orbit(47, 2)
    exact, rounded = (jax.jit(n.apply)(params, batch_stats, x)[0] for n in (net, half))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.1)


def test_mistakes_are_named() -> None:
    def build(side: int, **options: Any) -> None:
        build_model("p4m_densenet", image_shape=(side, side, 3), outputs=1, **options)

    with pytest.raises(UserError, match="too deep for its image"):
        build(50)
    build(50, padding="same")
    build(50, blocks=4)
    with pytest.raises(UserError, match="a 1x1 map cannot be halved"):
        build(4, padding="same")
    with pytest.raises(UserError, match="growth is 0"):
        build(96, growth=0)
    with pytest.raises(UserError, match="padding is 'reflect'"):
        build(96, padding="reflect")
    with pytest.raises(UserError, match=r"45x45 images.* wants even sides"):
        build_model("p4m_resnet", image_shape=(45, 45, 3), outputs=1)
