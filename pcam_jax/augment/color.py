"""What pixels look like: brightness, contrast, saturation, stain, blur, noise.

Every function is pure in (key, images), takes float32 images [B, H, W, 3] in [0, 1], returns the same shape
in [0, 1], treats each image on its own, and at zero strength returns its input bit for bit. ``strength``, a
scalar or [B], multiplies the amounts image by image.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from pcam_jax.augment.fusion import materialize

Strength = jax.Array | float

# Optical densities of haematoxylin, eosin and DAB in (R, G, B), rows normalised below: Ruifrok & Johnston,
# Analytical and Quantitative Cytology and Histology 23(4), 2001.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAIN_MATRIX = (_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)).astype(np.float32)
_UNMIX = np.linalg.inv(STAIN_MATRIX.astype(np.float64)).astype(np.float32)

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, sums to 1
_DARKEST = 1 / 255  # the smallest intensity an optical density is taken of


def brightness_contrast_saturation(
    key: jax.Array,
    images: jax.Array,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    strength: Strength = 1.0,
) -> jax.Array:
    """Shift all pixels, and scale their distances from the image's mean colour and from grey.

    The three together are one 3x3 map of colours and one offset for each image, so the images are read once
    (and once more for their mean, if contrast is on). The order is saturation, contrast, brightness; clipping
    to [0, 1] comes last.

    Args:
        key: random key.
        images: [B, H, W, 3] float32 in [0, 1].
        brightness: added is a number within ± this.
        contrast: the distance from the mean colour is scaled by a factor within 1 ± this.
        saturation: the distance from grey is scaled by a factor within 1 ± this.
        strength: scalar or [B].
    """
    draw = random.uniform(key, (images.shape[0], 3), minval=-1.0, maxval=1.0) * _column(strength)
    shift, scale, chroma = draw[:, 0] * brightness, 1 + draw[:, 1] * contrast, 1 + draw[:, 2] * saturation
    grey = jnp.broadcast_to(jnp.asarray(_LUMA)[:, None], (3, 3))
    saturate = chroma[:, None, None] * jnp.eye(3) + (1 - chroma)[:, None, None] * grey
    offset = jnp.broadcast_to(shift[:, None], (images.shape[0], 3))
    if contrast:
        mean = jnp.mean(images, axis=(1, 2))
        offset = offset + (1 - scale)[:, None] * jnp.sum(mean[:, :, None] * saturate, axis=1)
    return jnp.clip(_mix_channels(images, scale[:, None, None] * saturate, offset), 0, 1)


def hed_jitter(key: jax.Array, images: jax.Array, *, amount: float, strength: Strength = 1.0) -> jax.Array:
    """Vary the stains: scale and shift the densities of haematoxylin, eosin and a residual.

    D. Tellez et al., IEEE Transactions on Medical Imaging 37(9), 2018. With optical density ``od = -ln I``
    and stain densities ``s = od · M⁻¹``, the new densities are ``s' = α s + β``, α uniform within 1 ± amount
    and β within ± amount (natural-log density), drawn for each image and stain. Only the change
    ``Δ = od · M⁻¹ (diag(α) - 1) M + β M`` is computed and applied as ``I · exp(-Δ)``, so that no change means
    exactly the input.

    Args:
        key: random key.
        images: [B, H, W, 3] float32 in [0, 1].
        amount: about 0.02 is light, 0.05 usual, 0.2 strong.
        strength: scalar or [B].
    """
    draw = random.uniform(key, (images.shape[0], 2, 3), minval=-amount, maxval=amount)
    draw = draw * _column(strength)[:, :, None]
    scales, shifts = draw[:, 0], draw[:, 1]
    change = jnp.sum(_UNMIX[None, :, :, None] * (scales[:, :, None] * STAIN_MATRIX)[:, None], axis=2)
    density = -jnp.log(jnp.maximum(images, _DARKEST))
    delta = _mix_channels(density, change, jnp.sum(shifts[:, :, None] * STAIN_MATRIX, axis=1))
    return jnp.clip(images * jnp.exp(-delta), 0, 1)


def blur_radius(sigma: float) -> int:
    """Pixels on each side of a Gaussian kernel cut off at three standard deviations."""
    return max(1, math.ceil(3 * sigma))


def gaussian_blur(
    key: jax.Array,
    images: jax.Array,
    *,
    sigma: float,
    probability: float = 1.0,
    strength: Strength = 1.0,
    radius: int | None = None,
) -> jax.Array:
    """Blur a share of the images by a Gaussian, mirrored at the border.

    Args:
        key: random key.
        images: [B, H, W, 3] float32 in [0, 1].
        sigma: each blurred image's standard deviation is uniform from 0 to this many pixels.
        probability: share of the images that are blurred.
        strength: scalar or [B], multiplies the standard deviation.
        radius: where the kernel is cut off, by default `blur_radius(sigma)`; more where strength exceeds 1.
    """
    reach = blur_radius(sigma) if radius is None else radius
    pick, size = random.split(key)
    count = (images.shape[0],)
    chosen = random.bernoulli(pick, probability, count)
    deviation = jnp.where(chosen, random.uniform(size, count) * sigma * _column(strength)[:, 0], 0)
    offsets = jnp.arange(-reach, reach + 1)
    # At deviation 0 all weights but the central one underflow to 0, and the image passes unchanged.
    weights = jnp.exp(-0.5 * jnp.square(offsets / jnp.maximum(deviation, 1e-3)[:, None]))
    weights = (weights / jnp.sum(weights, axis=1, keepdims=True))[:, :, None, None, None]
    for axis in (1, 2):
        images = materialize(key, images) if axis == 2 else images
        length = images.shape[axis]
        around = [(0, 0)] * 4
        around[axis] = (reach, reach)
        padded = jnp.pad(images, around, mode="symmetric")
        # Shifted multiply-adds: a depthwise convolution is many times slower on a CPU.
        images = sum(
            (
                jax.lax.slice_in_dim(padded, i, i + length, axis=axis) * weights[:, i]
                for i in range(2 * reach + 1)
            ),
            start=jnp.zeros((), images.dtype),
        )
    return jnp.clip(images, 0, 1)


def gaussian_noise(key: jax.Array, images: jax.Array, *, sigma: float, strength: Strength = 1.0) -> jax.Array:
    """Add Gaussian noise, each image's standard deviation uniform from 0 to sigma (1 is the full range).

    The three channels' numbers come from ten bits each of one random word, at a third of the cost: normal
    numbers on 1,024 levels, within ±3.3 standard deviations.
    """
    size, noise = random.split(key)
    deviation = random.uniform(size, (images.shape[0],)) * sigma * _column(strength)[:, 0]
    words = random.bits(noise, images.shape[:3], jnp.uint32)[..., None]
    levels = (words >> jnp.array([0, 10, 20], jnp.uint32)) & 1023
    uniform = (levels.astype(jnp.float32) * 2 - 1023) / 1024
    normal = math.sqrt(2) * jax.lax.erf_inv(uniform)
    return jnp.clip(images + deviation[:, None, None, None] * normal, 0, 1)


def _column(strength: Strength) -> jax.Array:
    """Strength as [B, 1] or [1, 1]."""
    return jnp.reshape(jnp.asarray(strength, jnp.float32), (-1, 1))


def _mix_channels(images: jax.Array, matrices: jax.Array, offsets: jax.Array) -> jax.Array:
    """``images · matrices + offsets`` with [B, H, W, 3], [B, 3, 3], [B, 3].

    As broadcast multiply-adds, which XLA fuses with their surroundings: a tenth of an einsum's time on a CPU.
    """
    mixed = sum(
        (images[..., i : i + 1] * matrices[:, i][:, None, None, :] for i in range(3)),
        start=jnp.zeros((), images.dtype),
    )
    return mixed + offsets[:, None, None, :]
