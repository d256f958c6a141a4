"""The breast-patch CNN of system D: 2,514,410 parameters for 50x50 and two outputs."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from pcam_jax.models.initializers import he_uniform
from pcam_jax.models.stack import BatchNormSpec, ConvSpec, DenseSpec, DropoutSpec, MaxPoolSpec, Spec, Stack


def idc_cnn(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dropout: float = 0.3,
    dtype: DTypeLike = jnp.float32,
) -> Stack:
    """Five padded 3x3 convolutions with batch normalisation after the activations, and four dense layers."""
    body: list[Spec] = [
        ConvSpec(32, 3, padding="same"),
        BatchNormSpec(),
        ConvSpec(32, 3, padding="same"),
        MaxPoolSpec(),
        BatchNormSpec(),
        DropoutSpec(dropout),
        ConvSpec(64, 3, padding="same"),
        BatchNormSpec(),
        ConvSpec(64, 3, padding="same"),
        BatchNormSpec(),
        MaxPoolSpec(),
        DropoutSpec(dropout),
        ConvSpec(128, 3, padding="same"),
    ]
    head: list[Spec] = [
        DenseSpec(128),
        BatchNormSpec(),
        DenseSpec(64),
        BatchNormSpec(),
        DenseSpec(64),
        DropoutSpec(dropout),
        DenseSpec(24),
    ]
    return Stack(
        body,
        head,
        image_shape=image_shape,
        outputs=outputs,
        kernel_init=he_uniform,
        dtype=dtype,
    )
