"""From stored bytes to what the nets read, on the device and inside the jitted step."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pcam_jax.runtime.errors import UserError

Scheme = Literal["unit", "imagenet"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: jax.Array, scheme: Scheme = "unit", dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Scale uint8 images for a net.

    Args:
        images: `[B, H, W, 3] uint8`.
        scheme: "unit" divides by 255; "imagenet" then also subtracts ImageNet's channel means and divides by
            its channel standard deviations, as nets pretrained there expect.
        dtype: float dtype of the result; the arithmetic is float32.

    Returns:
        `[B, H, W, 3]` of `dtype`.

    Raises:
        UserError: unknown scheme.
    """
    return standardize(images.astype(jnp.float32) / 255, scheme).astype(dtype)


def standardize(images: jax.Array, scheme: Scheme = "unit") -> jax.Array:
    """The second half of `normalize`, for images already in [0, 1] (augmentation works on those).

    Raises:
        UserError: unknown scheme.
    """
    if scheme not in get_args(Scheme):
        known = ", ".join(get_args(Scheme))
        raise UserError(f"Unknown normalisation {scheme!r}: choose one of {known}.")
    if scheme == "unit":
        return images
    mean, std = jnp.asarray(IMAGENET_MEAN, images.dtype), jnp.asarray(IMAGENET_STD, images.dtype)
    return (images - mean) / std
