from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orientations import act, act_on_map, largest_error, orbit

from pcam_jax.models.registry import Net, build_model
from pcam_jax.runtime.errors import UserError


@functools.cache
def ready(name: str, side: int, **options: Any) -> tuple[Net, Any, Any]:
    """A net whose scales, shifts and statistics all differ, as after some training."""
    net = build_model(name, image_shape=(side, side, 3), outputs=2, **options)
    params, batch_stats = net.init(jax.random.key(0))
    rng = np.random.default_rng(0)

    def vary(leaf: jax.Array) -> jax.Array:
        return leaf * jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32) if leaf.ndim == 1 else leaf

    return net, jax.tree.map(vary, params), jax.tree.map(vary, batch_stats)


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
