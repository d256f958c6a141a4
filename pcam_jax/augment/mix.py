"""Mixing pairs of examples (mixup, cutmix), and erasing rectangles.

Images are float32 [B, H, W, 3] in [0, 1]. A mixed example carries a weight ``lam``: its own label counts
``lam``, its partner's ``1 - lam``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import random

Strength = jax.Array | float


def draw_partners(key: jax.Array, batch_size: int) -> jax.Array:
    """A random permutation [B] int32: example i is mixed with example partners[i].

    Reversing or rolling the batch would do for shuffled examples, but under balanced sampling it would always
    pair the same classes.
    """
    return random.permutation(key, batch_size)


def mixup(
    key: jax.Array, images: jax.Array, partners: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Blend each image with its partner: ``lam · x + (1 - lam) · x'``, lam from Beta(alpha, alpha).

    H. Zhang et al., ICLR 2018, arXiv:1710.09412; lam is drawn for each image.

    Returns:
        Images, and lam [B] float32.
    """
    lam = random.beta(key, alpha, alpha, (images.shape[0],))
    weight = lam[:, None, None, None]
    return weight * images + (1 - weight) * images[partners], lam


def cutmix(
    key: jax.Array, images: jax.Array, partners: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Paste a rectangle of the partner into each image; the sides' ratio is the image's.

    S. Yun et al., ICCV 2019, arXiv:1905.04899. The rectangle lies wholly inside, at a uniform place, and lam
    is the share of pixels that stayed, exactly.

    Returns:
        Images, and lam [B] float32.
    """
    share_key, place_key = random.split(key)
    count, height, width, _ = images.shape
    side = jnp.sqrt(1 - random.beta(share_key, alpha, alpha, (count,)))
    rows = jnp.round(side * height).astype(jnp.int32)
    columns = jnp.round(side * width).astype(jnp.int32)
    inside = _rectangles(place_key, rows, columns, height, width)
    lam = (height * width - rows * columns).astype(jnp.float32) / (height * width)
    return jnp.where(inside, images[partners], images), lam


def mix_targets(labels: jax.Array, partners: jax.Array, lam: jax.Array, classes: int) -> jax.Array:
    """Class probabilities [B, classes] float32: lam on the own label, 1 - lam on the partner's.

    Args:
        labels: [B] int32 in 0 .. classes - 1.
        partners: [B] int32.
        lam: [B] float32 in [0, 1].
        classes: number of classes (two for a one-unit head).
    """
    own = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    weight = lam[:, None]
    return weight * own + (1 - weight) * own[partners]


def random_erasing(
    key: jax.Array, images: jax.Array, *, probability: float, area: float, strength: Strength = 1.0
) -> jax.Array:
    """Replace a rectangle by the image's mean colour, in a share of the images.

    Z. Zhong et al., AAAI 2020, arXiv:1708.04896. The rectangle's area is uniform from 0 to ``area`` of the
    image, its sides' ratio log-uniform from 0.3 to 3.3, its place uniform and wholly inside.

    Args:
        key: random key.
        images: [B, H, W, 3] float32 in [0, 1].
        probability: share of the images changed.
        area: largest share of an image erased.
        strength: scalar or [B], multiplies the probability (up to 1).
    """
    pick, size, shape, place = random.split(key, 4)
    count, height, width, _ = images.shape
    chosen = random.uniform(pick, (count,)) < probability * jnp.asarray(strength, jnp.float32)
    pixels = random.uniform(size, (count,)) * area * height * width
    ratio = jnp.exp(random.uniform(shape, (count,), minval=-1.0, maxval=1.0) * jnp.log(3.3))
    rows = jnp.minimum(jnp.sqrt(pixels * ratio), height).astype(jnp.int32)
    columns = jnp.minimum(jnp.sqrt(pixels / ratio), width).astype(jnp.int32)
    inside = _rectangles(place, jnp.where(chosen, rows, 0), columns, height, width)
    mean = jnp.mean(images, axis=(1, 2), keepdims=True)
    return jnp.where(inside, mean, images)


def _rectangles(key: jax.Array, rows: jax.Array, columns: jax.Array, height: int, width: int) -> jax.Array:
    """Masks [B, H, W, 1] bool of one rectangle of rows x columns pixels each, uniformly placed."""
    draw = random.uniform(key, (rows.shape[0], 2))
    # The minimum guards against a draw whose product rounds up to the next whole number.
    top = jnp.minimum((draw[:, 0] * (height - rows + 1)).astype(jnp.int32), height - rows)[:, None]
    left = jnp.minimum((draw[:, 1] * (width - columns + 1)).astype(jnp.int32), width - columns)[:, None]
    y, x = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (y >= top) & (y < top + rows[:, None])
    in_columns = (x >= left) & (x < left + columns[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
