"""Where pixels come from: flips, the eight symmetries of the square, and random affine maps.

Every function is pure in (key, images), treats each image on its own (image i draws the same numbers in any
batch that holds it at position i), and at zero strength returns its input bit for bit.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import random

Fill = Literal["reflect", "nearest"]
Strength = jax.Array | float


def symmetry_bits(
    key: jax.Array, batch_size: int, *, vertical: bool, horizontal: bool, transpose: bool
) -> jax.Array:
    """Draw, for each image, which of the allowed generators of the square's symmetries to apply.

    All three together give each of the eight elements of D4 with probability 1/8, since every element is
    exactly one product of a row flip, a column flip and a transposition.

    Returns:
        [B, 3] bool: flip rows, flip columns, transpose, applied in this order.
    """
    allowed = jnp.array([vertical, horizontal, transpose])
    return random.bernoulli(key, 0.5, (batch_size, 3)) & allowed


def apply_symmetry(images: jax.Array, bits: jax.Array) -> jax.Array:
    """Flip rows, then columns, then transpose, each where its bit is set.

    Args:
        images: [B, H, W, C] of any dtype; square if any transposition bit can be set.
        bits: [B, 3] bool, as `symmetry_bits` gives.
    """
    rows, columns, transpose = (bits[:, i, None, None, None] for i in range(3))
    # Three selects over the whole batch: a switch for each image costs twice as much on a CPU.
    images = jnp.where(rows, images[:, ::-1], images)
    images = jnp.where(columns, images[:, :, ::-1], images)
    if images.shape[1] != images.shape[2]:
        return images
    return jnp.where(transpose, images.swapaxes(1, 2), images)


def symmetry_matrices(bits: jax.Array) -> jax.Array:
    """Maps [B, 2, 2] from output to source coordinates (row, column) that do what `apply_symmetry` does."""
    signs = jnp.where(bits[:, :2], -1.0, 1.0)
    swap = bits[:, 2, None, None]
    axes = jnp.where(swap, jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.eye(2))
    return signs[:, :, None] * axes


def random_matrices(
    key: jax.Array,
    batch_size: int,
    *,
    rotation_degrees: float = 0.0,
    zoom: float = 0.0,
    shear_degrees: float = 0.0,
    shift: float = 0.0,
    strength: Strength = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Draw affine maps as Keras' ``ImageDataGenerator`` does: rotation · shift · shear · zoom.

    Each quantity is uniform within its range: the angle within ±rotation_degrees, each axis' zoom within
    1 ± zoom (drawn apart for the two axes), the shear angle within ±shear_degrees, each shift within ±shift.

    Args:
        key: random key.
        batch_size: number of maps, B.
        rotation_degrees: largest angle.
        zoom: largest relative change of scale, below 1 after multiplication by strength.
        shear_degrees: largest shear angle.
        shift: largest shift as a share of the side.
        strength: scalar or [B], multiplies all ranges.

    Returns:
        Matrices [B, 2, 2] and offsets [B, 2] (shares of the side), both from output to source coordinates
        (row, column) about the centre of the image.
    """
    draw = random.uniform(key, (batch_size, 6), minval=-1.0, maxval=1.0)
    draw = draw * jnp.reshape(jnp.asarray(strength, jnp.float32), (-1, 1))
    angle, shear = jnp.deg2rad(draw[:, 0] * rotation_degrees), jnp.deg2rad(draw[:, 1] * shear_degrees)
    zooms, shifts = 1 + draw[:, 2:4] * zoom, draw[:, 4:6] * shift
    one, nil = jnp.ones_like(angle), jnp.zeros_like(angle)
    rotation = _matrices(jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle))
    shearing = _matrices(one, -jnp.sin(shear), nil, jnp.cos(shear))
    return _compose(rotation, shearing) * zooms[:, None, :], jnp.sum(rotation * shifts[:, None, :], -1)


def affine(
    key: jax.Array,
    images: jax.Array,
    *,
    rotation_degrees: float = 0.0,
    zoom: float = 0.0,
    shear_degrees: float = 0.0,
    shift: float = 0.0,
    fill: Fill = "reflect",
    symmetries: jax.Array | None = None,
    strength: Strength = 1.0,
) -> jax.Array:
    """A random affine map of each image, bilinear, in one gather.

    Args:
        key: random key.
        images: [B, H, W, C] float.
        rotation_degrees: see `random_matrices`, like zoom, shear_degrees, shift and strength.
        zoom: largest relative change of scale.
        shear_degrees: largest shear angle.
        shift: largest shift as a share of the side.
        fill: what lies beyond the border.
        symmetries: [B, 3] bool, applied after the affine map within the same gather.
        strength: scalar or [B].
    """
    batch_size, height, width, _ = images.shape
    matrices, offsets = random_matrices(
        key, batch_size, rotation_degrees=rotation_degrees, zoom=zoom, shear_degrees=shear_degrees,
        shift=shift, strength=strength,
    )  # fmt: skip
    if symmetries is not None:
        matrices = _compose(matrices, symmetry_matrices(symmetries))
    return warp(images, matrices, offsets * jnp.array([height, width], jnp.float32), fill)


def warp(images: jax.Array, matrices: jax.Array, offsets: jax.Array, fill: Fill = "reflect") -> jax.Array:
    """Resample images bilinearly at ``matrices · (p - centre) + centre + offsets``.

    Args:
        images: [B, H, W, C] float.
        matrices: [B, 2, 2], from output to source (row, column).
        offsets: [B, 2] pixels.
        fill: "reflect" mirrors the image about its border (d c b a | a b c d), "nearest" repeats the edge.

    Returns:
        [B, H, W, C] of the dtype of images; a convex combination of its pixels.
    """
    batch_size, height, width, channels = images.shape
    rows = (jnp.arange(height) - (height - 1) / 2)[None, :, None]
    columns = (jnp.arange(width) - (width - 1) / 2)[None, None, :]
    m, t = matrices[:, :, :, None, None], offsets[:, :, None, None]
    y = m[:, 0, 0] * rows + m[:, 0, 1] * columns + t[:, 0] + (height - 1) / 2
    x = m[:, 1, 0] * rows + m[:, 1, 1] * columns + t[:, 1] + (width - 1) / 2
    top, bottom, down = _neighbours(y, height, fill)
    left, right, across = _neighbours(x, width, fill)
    flat = images.reshape(batch_size, height * width, channels)

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        index = (row * width + column).reshape(batch_size, height * width, 1)
        return jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds").reshape(images.shape)

    upper = at(top, left) * (1 - across) + at(top, right) * across
    lower = at(bottom, left) * (1 - across) + at(bottom, right) * across
    return (upper * (1 - down) + lower * down).astype(images.dtype)


def _neighbours(position: jax.Array, size: int, fill: Fill) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The two pixels around a position along one axis, and the weight of the second."""
    if fill == "reflect":
        period = jnp.mod(position + 0.5, 2 * size)
        position = jnp.minimum(period, 2 * size - period) - 0.5
    position = jnp.clip(position, 0, size - 1)
    low = jnp.floor(position)
    index = low.astype(jnp.int32)
    return index, jnp.minimum(index + 1, size - 1), (position - low)[..., None]


def _matrices(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)


def _compose(first: jax.Array, second: jax.Array) -> jax.Array:
    # Written out, not as a matrix product: accelerators round matrix products to fewer bits by default.
    return jnp.sum(first[:, :, :, None] * second[:, None, :, :], axis=2)
