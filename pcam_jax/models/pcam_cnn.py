"""The four small CNNs of a Keras notebook on PCam (system A), for 96x96 patches."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from pcam_jax.models.stack import ConvSpec, DenseSpec, DropoutSpec, MaxPoolSpec, Spec, Stack


def pcam_model1(*, image_shape: tuple[int, int, int], outputs: int, dtype: DTypeLike = jnp.float32) -> Stack:
    """Three 3x3 convolutions with two pools: 1,694,849 parameters for 96x96 and one output."""
    body: list[Spec] = [ConvSpec(32, 3), MaxPoolSpec(), ConvSpec(64, 3), MaxPoolSpec(), ConvSpec(64, 3)]
    return Stack(body, [DenseSpec(64)], image_shape=image_shape, outputs=outputs, dtype=dtype)


def pcam_model2(*, image_shape: tuple[int, int, int], outputs: int, dtype: DTypeLike = jnp.float32) -> Stack:
    """Three 5x5 convolutions, the first strided: 2,515,585 parameters for 96x96 and one output."""
    body: list[Spec] = [
        ConvSpec(32, 5, stride=2, padding="same"),
        ConvSpec(64, 5, padding="same"),
        MaxPoolSpec(),
        ConvSpec(64, 5, padding="same"),
    ]
    return Stack(body, [DenseSpec(64)], image_shape=image_shape, outputs=outputs, dtype=dtype)


# Three strided 6x6 convolutions and no pool: 96 -> 32 -> 11 -> 4.
_STRIDED_BODY = (
    ConvSpec(32, 6, stride=3, padding="same"),
    ConvSpec(64, 6, stride=3, padding="same"),
    ConvSpec(64, 6, stride=3, padding="same"),
)


def pcam_model3(*, image_shape: tuple[int, int, int], outputs: int, dtype: DTypeLike = jnp.float32) -> Stack:
    """Three strided 6x6 convolutions: 257,633 parameters for 96x96 and one output."""
    return Stack(_STRIDED_BODY, [DenseSpec(32)], image_shape=image_shape, outputs=outputs, dtype=dtype)


def pcam_model4(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dropout: float = 0.2,
    dtype: DTypeLike = jnp.float32,
) -> Stack:
    """`pcam_model3` with dropout after the flattened map."""
    head: list[Spec] = [DropoutSpec(dropout), DenseSpec(32)]
    return Stack(_STRIDED_BODY, head, image_shape=image_shape, outputs=outputs, dtype=dtype)
