from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random

from pcam_jax.augment import geometry

AFFINE = jax.jit(geometry.affine, static_argnames="fill")
WARP = jax.jit(geometry.warp, static_argnames="fill")
MATRICES = jax.jit(geometry.random_matrices, static_argnums=1)
ALL_BITS = jnp.array([[r, c, t] for r in (0, 1) for c in (0, 1) for t in (0, 1)], bool)


def eight(image: jax.Array) -> jax.Array:
    return geometry.apply_symmetry(jnp.stack([image] * 8), ALL_BITS)


def test_the_eight_symmetries_are_the_group_d4(images: jax.Array) -> None:
    image = np.asarray(images[0])
    expected = {np.rot90(x, k).tobytes() for x in (image, image[:, ::-1]) for k in range(4)}
    got = {np.asarray(x).tobytes() for x in eight(images[0])}
    assert len(got) == 8
    assert got == expected


def test_drawn_symmetries_are_uniform_and_independent() -> None:
    bits = geometry.symmetry_bits(random.key(0), 8000, vertical=True, horizontal=True, transpose=True)
    element = np.asarray(bits) @ [4, 2, 1]
    counts = np.bincount(element, minlength=8)
    # Chi-square of 7 degrees of freedom: 24.3 is exceeded once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3
    pairs = np.bincount(element[:-1] * 8 + element[1:], minlength=64)
    assert ((pairs - 125) ** 2 / 125).sum() < 103.4  # 63 degrees of freedom


@pytest.mark.parametrize(("vertical", "horizontal"), [(True, False), (False, True), (True, True)])
def test_flips_draw_nothing_else_and_are_involutive(
    images: jax.Array, key: jax.Array, vertical: bool, horizontal: bool
) -> None:
    bits = geometry.symmetry_bits(key, 6, vertical=vertical, horizontal=horizontal, transpose=False)
    assert not bits[:, 2].any()
    assert vertical or not bits[:, 0].any()
    assert horizontal or not bits[:, 1].any()
    assert bits.any()
    twice = geometry.apply_symmetry(geometry.apply_symmetry(images, bits), bits)
    np.testing.assert_array_equal(twice, images)


def test_symmetries_within_the_affine_gather_equal_the_selects_bit_for_bit(images: jax.Array) -> None:
    batch = jnp.stack([images[0]] * 8)
    offsets = jnp.zeros((8, 2))
    for fill in ("reflect", "nearest"):
        warped = WARP(batch, geometry.symmetry_matrices(ALL_BITS), offsets, fill=fill)
        np.testing.assert_array_equal(warped, eight(images[0]))


def test_quarter_turn_through_cosines_equals_rot90(images: jax.Array) -> None:
    turn = _rotation(np.deg2rad(np.float32(90)))
    assert (turn % 1 != 0).any()  # not exact: the cosine of 90 degrees is 1e-8
    warped = np.asarray(WARP(images, jnp.asarray([turn] * 6), jnp.zeros((6, 2))))
    error = min(
        np.abs(warped - np.rot90(np.asarray(images), k, axes=(1, 2))).max()
        for k in (1, 3)  # the sense is a convention
    )
    assert error < 1e-4


def test_zero_ranges_return_the_input_bit_for_bit(images: jax.Array, key: jax.Array) -> None:
    np.testing.assert_array_equal(AFFINE(key, images), images)
    strong = AFFINE(key, images, rotation_degrees=20.0, zoom=0.2, shift=0.1, strength=0.0)
    np.testing.assert_array_equal(strong, images)


@pytest.mark.parametrize("fill", ["reflect", "nearest"])
def test_warp_agrees_with_scipy(images: jax.Array, fill: geometry.Fill) -> None:
    rng = np.random.default_rng(1)
    matrices = np.eye(2) + rng.normal(0, 0.3, (6, 2, 2))
    offsets = rng.normal(0, 6, (6, 2))
    got = np.asarray(
        WARP(images, jnp.asarray(matrices, jnp.float32), jnp.asarray(offsets, jnp.float32), fill=fill)
    )
    centre = np.array([11.5, 11.5])
    for i in range(6):
        shift = centre + offsets[i] - matrices[i] @ centre
        for c in range(3):
            expected = scipy.ndimage.affine_transform(
                np.asarray(images[i, :, :, c], np.float64), matrices[i], shift, order=1, mode=fill
            )
            np.testing.assert_allclose(got[i, :, :, c], expected, atol=2e-5)


def test_random_matrices_follow_keras() -> None:
    """ImageDataGenerator's matrix, rotation · shift · shear · zoom in (row, column), written out."""
    ranges = {"rotation_degrees": 20.0, "zoom": 0.15, "shear_degrees": 25.0, "shift": 0.1}
    matrices, offsets = MATRICES(random.key(5), 64, **ranges)
    u = np.asarray(random.uniform(random.key(5), (64, 6), minval=-1.0, maxval=1.0), np.float64)
    assert np.ptp(u, axis=0).min() > 1.7  # each quantity fills its range, on both sides
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.4  # and is drawn apart from the others
    for i in range(64):
        theta, shear = np.deg2rad(20 * u[i, 0]), np.deg2rad(25 * u[i, 1])
        rotation = [[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]]
        shift = [[1, 0, 0.1 * u[i, 4]], [0, 1, 0.1 * u[i, 5]], [0, 0, 1]]
        shearing = [[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]]
        zoom = np.diag([1 + 0.15 * u[i, 2], 1 + 0.15 * u[i, 3], 1])
        expected = np.array(rotation) @ shift @ shearing @ zoom
        np.testing.assert_allclose(matrices[i], expected[:2, :2], atol=1e-6)
        np.testing.assert_allclose(offsets[i], expected[:2, 2], atol=1e-6)


def test_a_map_and_its_inverse_return_the_middle() -> None:
    y, x = np.mgrid[0:48, 0:48] / 48
    image = jnp.asarray(np.stack([np.sin(3 * y), np.cos(2 * x), x * y], -1)[None] * 0.4 + 0.5, jnp.float32)
    ranges = {"rotation_degrees": 15.0, "zoom": 0.1, "shear_degrees": 3.0, "shift": 0.05}
    matrices, offsets = (np.asarray(x)[:1] for x in MATRICES(random.key(2), 64, **ranges))
    offsets = offsets * 48
    inverse = np.linalg.inv(matrices)
    undo = -np.einsum("bij,bj->bi", inverse, offsets)
    back = np.asarray(WARP(WARP(image, matrices, offsets), jnp.asarray(inverse), jnp.asarray(undo)))
    np.testing.assert_allclose(back[:, 12:36, 12:36], np.asarray(image)[:, 12:36, 12:36], atol=3e-3)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    degrees=st.floats(0, 180),
    zoom=st.floats(0, 0.9),
    shift=st.floats(0, 3),
    fill=st.sampled_from(["reflect", "nearest"]),
)
def test_results_stay_within_the_range_of_the_image(
    images: jax.Array, seed: int, degrees: float, zoom: float, shift: float, fill: geometry.Fill
) -> None:
    out = np.asarray(
        AFFINE(random.key(seed), images, rotation_degrees=degrees, zoom=zoom, shift=shift, fill=fill)
    )
    assert out.shape == images.shape
    assert out.min() >= -1e-6
    assert out.max() <= 1 + 1e-6


def test_mean_colour_is_kept_in_expectation(images: jax.Array) -> None:
    ranges = {"rotation_degrees": 20.0, "zoom": 0.1, "shift": 0.05, "fill": "reflect"}
    means = [np.asarray(AFFINE(random.key(i), images, **ranges)).mean((1, 2)) for i in range(40)]
    np.testing.assert_allclose(np.mean(means, 0), np.asarray(images).mean((1, 2)), atol=0.02)


def test_rectangles_and_single_rows_are_taken(key: jax.Array) -> None:
    tall, line = (
        jnp.asarray(np.random.default_rng(0).random((2, 30, 10, 3)), jnp.float32),
        jnp.ones((2, 1, 9, 3)),
    )
    np.testing.assert_array_equal(AFFINE(key, tall), tall)
    np.testing.assert_array_equal(AFFINE(key, line, rotation_degrees=20.0), line)


def _rotation(angle: np.ndarray) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
