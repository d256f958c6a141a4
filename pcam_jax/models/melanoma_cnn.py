"""The three CNNs of system E, for 500x500 photographs: 11.4, 14.7 and 10.5 million parameters."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from pcam_jax.models.stack import ConvSpec, DenseSpec, DropoutSpec, MaxPoolSpec, Spec, Stack


def melanoma_v1(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dropout: float = 0.5,
    dtype: DTypeLike = jnp.float32,
) -> Stack:
    """Five 3x3 blocks and a dense layer of 512: 11,354,369 parameters for 500x500 and one output."""
    blocks = [(32, 3), (64, 3), (64, 3), (128, 3), (128, 3)]
    return _pooled_blocks(blocks, 512, dropout, image_shape, outputs, dtype)


def melanoma_v2(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dropout: float = 0.5,
    dtype: DTypeLike = jnp.float32,
) -> Stack:
    """Six 3x3 blocks and a dense layer of 1024: 14,714,753 parameters for 500x500 and one output."""
    blocks = [(32, 3), (64, 3), (64, 3), (128, 3), (256, 3), (512, 3)]
    return _pooled_blocks(blocks, 1024, dropout, image_shape, outputs, dtype)


def melanoma_v3(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dropout: float = 0.5,
    dtype: DTypeLike = jnp.float32,
) -> Stack:
    """Six blocks with kernels from 13x13 down to 3x3: 10,535,809 parameters for 500x500 and one output."""
    blocks = [(32, 13), (64, 11), (64, 7), (128, 5), (256, 3), (512, 3)]
    return _pooled_blocks(blocks, 1024, dropout, image_shape, outputs, dtype)


def _pooled_blocks(
    blocks: list[tuple[int, int]],
    dense: int,
    dropout: float,
    image_shape: tuple[int, int, int],
    outputs: int,
    dtype: DTypeLike,
) -> Stack:
    """Blocks of (channels, kernel side), each a convolution and a pool, then dropout and one dense layer."""
    body: list[Spec] = [spec for block in blocks for spec in (ConvSpec(*block), MaxPoolSpec())]
    head: list[Spec] = [DropoutSpec(dropout), DenseSpec(dense)]
    return Stack(body, head, image_shape=image_shape, outputs=outputs, dtype=dtype)
