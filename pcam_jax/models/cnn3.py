"""The three-block CNN of system C: 1,731,905 parameters for 96x96 and one output."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from pcam_jax.models.stack import ConvSpec, DenseSpec, DropoutSpec, MaxPoolSpec, Spec, Stack


def pcam_cnn3(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dropout: float = 0.5,
    dtype: DTypeLike = jnp.float32,
) -> Stack:
    """Three blocks of a 3x3 convolution and a pool (32, 64, 128 channels), dense 128 with dropout."""
    body: list[Spec] = [spec for features in (32, 64, 128) for spec in (ConvSpec(features, 3), MaxPoolSpec())]
    head: list[Spec] = [DenseSpec(128), DropoutSpec(dropout)]
    return Stack(body, head, image_shape=image_shape, outputs=outputs, dtype=dtype)
