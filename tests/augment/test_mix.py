from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random

from pcam_jax.augment import mix

MIXUP, CUTMIX, ERASE = jax.jit(mix.mixup), jax.jit(mix.cutmix), jax.jit(mix.random_erasing)


def test_partners_are_a_permutation_that_pairs_all_classes(key: jax.Array) -> None:
    partners = np.asarray(mix.draw_partners(key, 512))
    assert sorted(partners) == list(range(512))
    labels = np.arange(512) % 2  # balanced sampling alternates the classes
    assert 0.4 < (labels == labels[partners]).mean() < 0.6


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), alpha=st.sampled_from([0.2, 1.0, 5.0]))
def test_mixup_is_the_convex_combination_it_reports(images: jax.Array, seed: int, alpha: float) -> None:
    partners = jnp.asarray(np.random.default_rng(seed).permutation(6))
    out, lam = MIXUP(random.key(seed), images, partners, alpha=alpha)
    w = np.asarray(lam)[:, None, None, None]
    assert ((w >= 0) & (w <= 1)).all()
    own = np.asarray(images)
    other = own[np.asarray(partners)]
    np.testing.assert_allclose(out, w * own + (1 - w) * other, atol=1e-6)
    assert (np.asarray(out) <= np.maximum(own, other) + 1e-6).all()
    assert (np.asarray(out) >= np.minimum(own, other) - 1e-6).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_cutmix_pastes_one_rectangle_of_the_area_it_reports(alpha: float) -> None:
    count, height, width = 2000, 12, 8
    images = np.broadcast_to(
        np.arange(count, dtype=np.float32)[:, None, None, None], (count, height, width, 3)
    )
    partners = np.roll(np.arange(count), 1)
    out, lam = CUTMIX(random.key(0), jnp.asarray(images), jnp.asarray(partners), alpha=alpha)
    out, lam = np.asarray(out), np.asarray(lam)
    kept = (out == images).all(-1)
    np.testing.assert_array_equal(out, np.where(kept[..., None], images, images[partners]))
    # To the last bit but one: XLA divides by multiplying with a reciprocal.
    np.testing.assert_allclose(lam, kept.mean((1, 2), dtype=np.float64), rtol=2e-7)
    pasted = ~kept
    sides = pasted.any(2).sum(1) * pasted.any(1).sum(1)
    np.testing.assert_array_equal(pasted.sum((1, 2)), sides)
    for axis in (1, 2):  # no gaps: along each axis the pasted lines are one run
        lines = np.pad(pasted.any(3 - axis), [(0, 0), (1, 1)])
        assert (np.abs(np.diff(lines.astype(int), axis=1)).sum(1) <= 2).all()
    if alpha == 1:  # lam is uniform, and the place too
        assert abs(lam.mean() - 0.5) < 0.03
        where = pasted.mean(0)
        assert where.min() > 0.14  # corners least, as rectangles lie inside
        np.testing.assert_allclose(where, where[::-1, ::-1], atol=0.05)


def test_mixed_targets_are_probabilities() -> None:
    labels, partners = jnp.array([0, 1, 2, 1]), jnp.array([1, 0, 3, 2])
    lam = jnp.array([1.0, 0.25, 0.5, 0.0])
    expected = [[1, 0, 0], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 1]]
    np.testing.assert_array_equal(mix.mix_targets(labels, partners, lam, 3), expected)


def test_erasing_respects_share_area_and_colour() -> None:
    images = jnp.asarray(np.random.default_rng(1).random((2000, 16, 16, 3)), jnp.float32)
    out = ERASE(random.key(0), images, probability=0.5, area=0.2)
    changed = (np.asarray(out) != np.asarray(images)).all(-1)
    share = changed.mean((1, 2))
    assert share.max() <= 0.2
    assert share.max() > 0.15
    assert 0.42 < (share > 0).mean() < 0.5  # some rectangles are thinner than a pixel
    mean = np.asarray(images).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(np.where(changed[..., None], np.asarray(out) - mean, 0), 0, atol=1e-6)


def test_erasing_nothing_is_the_identity_bit_for_bit(images: jax.Array, key: jax.Array) -> None:
    for probability, area in [(0.0, 0.5), (1.0, 0.0)]:
        out = ERASE(key, images, probability=probability, area=area)
        np.testing.assert_array_equal(out, images)
    assert (np.asarray(ERASE(key, images, probability=1.0, area=0.5)) != np.asarray(images)).any()
