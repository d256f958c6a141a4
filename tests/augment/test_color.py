from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax import random

from pcam_jax.augment import color

OPERATIONS: dict[str, Callable[..., jax.Array]] = {
    "brightness": partial(color.brightness_contrast_saturation, brightness=0.2),
    "contrast": partial(color.brightness_contrast_saturation, contrast=0.3),
    "saturation": partial(color.brightness_contrast_saturation, saturation=0.4),
    "stain": partial(color.hed_jitter, amount=0.1),
    "blur": partial(color.gaussian_blur, sigma=1.5),
    "noise": partial(color.gaussian_noise, sigma=0.1),
}
JITTED = {name: jax.jit(operation) for name, operation in OPERATIONS.items()}
ADJUST = jax.jit(
    color.brightness_contrast_saturation, static_argnames=("brightness", "contrast", "saturation")
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_strength_decides_and_zero_is_the_identity_bit_for_bit(
    images: jax.Array, key: jax.Array, name: str
) -> None:
    strength = jnp.array([0, 1, 0, 2, 0, 1], jnp.float32)
    before = np.asarray(images)
    after = np.asarray(JITTED[name](key, images, strength=strength))
    assert after.shape == before.shape
    assert after.dtype == np.float32
    assert after.min() >= 0
    assert after.max() <= 1
    np.testing.assert_array_equal(after[::2], before[::2])
    assert (np.abs(after - before)[1::2].max((1, 2, 3)) > 1e-3).all()
    np.testing.assert_array_equal(after, JITTED[name](key, images, strength=strength))
    assert (after != np.asarray(JITTED[name](random.key(8), images, strength=strength))).any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_mean_colour_is_kept_in_expectation(key: jax.Array, name: str) -> None:
    middling = np.random.default_rng(0).uniform(0.3, 0.7, (1, 8, 8, 3)).astype(np.float32)
    out = np.asarray(JITTED[name](key, jnp.asarray(np.tile(middling, (4096, 1, 1, 1)))))
    np.testing.assert_allclose(out.mean((0, 1, 2)), middling.mean((0, 1, 2)), atol=0.006)


def test_each_colour_operation_does_what_it_says(images: jax.Array, key: jax.Array) -> None:
    x = np.asarray(images) * np.float32(0.4) + np.float32(0.3)
    shifted = np.asarray(ADJUST(key, jnp.asarray(x), brightness=0.2)) - x
    assert shifted.std((1, 2, 3)).max() < 1e-6  # one number for all pixels
    assert np.abs(shifted).max() <= 0.2 + 1e-6
    contrasted = np.asarray(ADJUST(key, jnp.asarray(x), contrast=0.3))
    np.testing.assert_allclose(contrasted.mean((1, 2)), x.mean((1, 2)), atol=1e-5)
    ratio = contrasted.std((1, 2)) / x.std((1, 2))
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(3, 1), atol=1e-4)
    saturated = np.asarray(ADJUST(key, jnp.asarray(x), saturation=0.3))
    luma = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(saturated @ luma, x @ luma, atol=1e-5)
    grey = jnp.asarray(np.repeat(x[..., :1], 3, -1))
    np.testing.assert_allclose(ADJUST(key, grey, saturation=0.3), grey, atol=1e-6)


def test_stain_matrix_is_that_of_ruifrok_and_johnston() -> None:
    np.testing.assert_allclose(np.linalg.norm(color.STAIN_MATRIX, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        color.STAIN_MATRIX[0] / color.STAIN_MATRIX[0, 0], [1, 0.70 / 0.65, 0.29 / 0.65]
    )
    np.testing.assert_allclose(color.STAIN_MATRIX[1], np.array([0.07, 0.99, 0.11]) / 0.99855, atol=1e-4)


def test_hed_jitter_is_the_affine_map_of_stain_densities(images: jax.Array, key: jax.Array) -> None:
    """The residual form against the textbook one: unmix, scale and shift, remix."""
    images = images * 0.4 + 0.3
    out = JITTED["stain"](key, images, strength=jnp.ones(6))
    draw = np.asarray(random.uniform(key, (6, 2, 3), minval=-0.1, maxval=0.1), np.float64)
    mixing = color.STAIN_MATRIX.astype(np.float64)
    stains = -np.log(np.asarray(images, np.float64)) @ np.linalg.inv(mixing)
    changed = stains * (1 + draw[:, 0, None, None]) + draw[:, 1, None, None]
    np.testing.assert_allclose(out, np.exp(-changed @ mixing), atol=1e-5)


def test_hed_jitter_keeps_black_and_survives_extremes(key: jax.Array) -> None:
    extremes = jnp.asarray(np.stack([np.zeros((24, 24, 3)), np.ones((24, 24, 3))] * 3), jnp.float32)
    out = np.asarray(JITTED["stain"](key, extremes, strength=jnp.full(6, 9.0)))
    assert np.isfinite(out).all()
    assert out[::2].max() == 0


def test_blur_is_a_truncated_gaussian_mirrored_at_the_border(images: jax.Array, key: jax.Array) -> None:
    out = np.asarray(JITTED["blur"](key, images, strength=jnp.ones(6)))
    drawn = np.asarray(random.uniform(random.split(key)[1], (6,))) * 1.5
    for i in range(6):
        expected = scipy.ndimage.gaussian_filter(
            np.asarray(images[i], np.float64), (drawn[i], drawn[i], 0), mode="reflect", radius=(5, 5, 0)
        )
        np.testing.assert_allclose(out[i], expected, atol=1e-5)


def test_blur_spares_the_share_it_should(key: jax.Array) -> None:
    images = np.random.default_rng(0).random((1000, 4, 4, 3)).astype(np.float32)
    out = jax.jit(partial(color.gaussian_blur, sigma=1.0, probability=0.3))(key, images)
    same = (np.asarray(out) == images).all((1, 2, 3))
    assert 0.64 < same.mean() < 0.80  # 0.7, and a few deviations too small to matter


def test_noise_is_normal_with_the_drawn_deviation(key: jax.Array) -> None:
    grey = np.full((4096, 8, 8, 3), 0.5, np.float32)
    noise = np.asarray(JITTED["noise"](key, grey)) - grey
    drawn = np.asarray(random.uniform(random.split(key)[0], (4096,))) * 0.1
    np.testing.assert_allclose(noise.std((1, 2, 3)), drawn, rtol=0.3, atol=1e-4)
    assert drawn.max() > 0.099
    large = drawn > 1e-3
    noise, drawn = noise[large], drawn[large]
    unit = (noise / drawn[:, None, None, None]).ravel()
    assert abs(unit.mean()) < 0.01
    assert abs(unit.std() - 1) < 0.01
    assert abs((unit**4).mean() / (unit**2).mean() ** 2 - 3) < 0.08
    flat = (noise / drawn[:, None, None, None]).reshape(-1, 3)
    correlation = np.corrcoef(flat.T) - np.eye(3)
    assert np.abs(correlation).max() < 0.02  # channels are independent although they share a random word
