"""Nets of equivariant layers: a patch has no up or down, and their answers do not depend on how it is turned.

B. Veeling et al., "Rotation equivariant CNNs for digital pathology", MICCAI 2018, arXiv:1806.03962 (the paper of
PCam), and smaller ones. The names with p4 know quarter turns, those with p4m mirror images too; maps are as in
`group_layers`.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models.convolution import Padding
from pcam_jax.models.group_layers import (
    GROUP_SIZE,
    Group,
    GroupBatchNorm,
    GroupConv,
    GroupPool,
    SymmetricPool,
)
from pcam_jax.models.initializers import uniform_within
from pcam_jax.models.layers import Dense, GlobalAvgPool, recorded
from pcam_jax.runtime.errors import UserError

_norm = functools.partial(GroupBatchNorm, momentum=0.9, epsilon=1e-5, bessel=True)


class GroupDenseBlock(nnx.Module):
    """Layers of batch normalisation, ReLU and 3x3 group convolution, each adding `growth` features."""

    def __init__(
        self, group: Group, in_features: int, layers: int, growth: int, padding: Padding, dtype: DTypeLike
    ) -> None:
        self.elements, self.layers = GROUP_SIZE[group], layers
        for number in range(layers):
            width = in_features + number * growth
            setattr(self, f"norm{number + 1}", _norm(group, width, dtype=dtype))
            setattr(
                self, f"conv{number + 1}", GroupConv(group, width, growth, 3, padding=padding, dtype=dtype)
            )

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, G * C]` -> `[B, h, w, G * (C + layers * growth)]`; the input is cropped to the output."""
        for number in range(1, self.layers + 1):
            normalized = jax.nn.relu(getattr(self, f"norm{number}")(x, train=train))
            y = getattr(self, f"conv{number}")(normalized)
            margin = (x.shape[1] - y.shape[1]) // 2
            for axis in (1, 2):  # plain slices: indexing becomes a gather where the batch is symbolic
                x = jax.lax.slice_in_dim(x, margin, x.shape[axis] - margin, axis=axis)
            split = [part.reshape(*part.shape[:3], self.elements, -1) for part in (x, y)]
            x = jnp.concatenate(split, axis=-1).reshape(*y.shape[:3], -1)
        return x


class GroupTransition(nnx.Module):
    """Batch normalisation, ReLU, 1x1 group convolution, average pool; the width stays."""

    def __init__(self, group: Group, features: int, dtype: DTypeLike) -> None:
        self.norm = _norm(group, features, dtype=dtype)
        self.conv = GroupConv(group, features, features, 1, dtype=dtype)
        self.pool = SymmetricPool()

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, G * C]` -> `[B, H // 2, W // 2, G * C]`."""
        return self.pool(self.conv(jax.nn.relu(self.norm(x, train=train))))


class GroupNet(nnx.Module):
    """A body of named layers, then normalisation, ReLU, group pool, average pool and a linear layer."""

    def __init__(
        self, group: Group, body: dict[str, Any], width: int, outputs: int, dtype: DTypeLike
    ) -> None:
        self.body_names = tuple(body)
        for name, layer in body.items():
            setattr(self, name, layer)
        self.norm = _norm(group, width, dtype=dtype)
        self.group_pool = GroupPool(group)
        self.avgpool = GlobalAvgPool()
        self.classifier = Dense(width, outputs, kernel_init=uniform_within(width**-0.5))

    def feature_map(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The last map, pooled over the group: `[B, H, W, 3]` -> `[B, h, w, C]`."""
        return self.group_pool(self.group_map(x, train=train))

    def group_map(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The last map over the group: `[B, H, W, 3]` -> `[B, h, w, G * C]`."""
        for name in self.body_names:
            layer = getattr(self, name)
            x = layer(x) if isinstance(layer, GroupConv) else layer(x, train=train)
        return jax.nn.relu(self.norm(x, train=train))

    def classify(self, features: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The logits of a pooled map: `[B, h, w, C]` -> `[B, outputs] float32`."""
        return self.classifier(self.avgpool(features))


def group_densenet(
    group: Group,
    *,
    growth: int,
    blocks: int,
    layers: int,
    padding: Literal["valid", "same"],
    image_shape: tuple[int, int, int],
    outputs: int,
    dtype: DTypeLike,
) -> GroupNet:
    """Veeling et al.'s DenseNet: a 3x3 lifting convolution, dense blocks with transitions between, one head.

    Raises:
        UserError: an option lies outside its range.
    """
    _check_options({"growth": growth, "blocks": blocks, "layers": layers}, padding)
    width = growth
    body: dict[str, Any] = {
        "lift": GroupConv(group, image_shape[2], width, 3, lifting=True, padding=padding, dtype=dtype)
    }
    for number in range(1, blocks + 1):
        body[f"block{number}"] = GroupDenseBlock(group, width, layers, growth, padding, dtype)
        width += layers * growth
        if number < blocks:
            body[f"transition{number}"] = GroupTransition(group, width, dtype)
    return GroupNet(group, body, width, outputs, dtype)


def p4m_densenet(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dtype: DTypeLike = jnp.float32,
    growth: int = 9,
    blocks: int = 5,
    layers: int = 1,
    padding: Literal["valid", "same"] = "valid",
) -> GroupNet:
    """Equivariant to turns and mirror images; 123,400 parameters with one output (the paper: 119 thousand).

    Options: growth (features each layer adds, for each of the eight elements), blocks, layers (in each block),
    padding ("valid", as in the paper, needs 96 pixels or so for five blocks; "same" takes smaller images).
    """
    return group_densenet(
        "p4m", growth=growth, blocks=blocks, layers=layers, padding=padding, image_shape=image_shape,
        outputs=outputs, dtype=dtype,
    )  # fmt: skip


def p4_densenet(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dtype: DTypeLike = jnp.float32,
    growth: int = 13,
    blocks: int = 5,
    layers: int = 1,
    padding: Literal["valid", "same"] = "valid",
) -> GroupNet:
    """Equivariant to quarter turns only; 129,104 parameters with one output.

    Options as for `p4m_densenet`, growth being that of each of the four elements.
    """
    return group_densenet(
        "p4", growth=growth, blocks=blocks, layers=layers, padding=padding, image_shape=image_shape,
        outputs=outputs, dtype=dtype,
    )  # fmt: skip


class GroupConvBlock(nnx.Module):
    """Batch normalisation, ReLU, average pool, 3x3 group convolution."""

    def __init__(self, group: Group, in_features: int, out_features: int, padding: Padding, dtype: DTypeLike):
        self.norm = _norm(group, in_features, dtype=dtype)
        self.conv = GroupConv(group, in_features, out_features, 3, padding=padding, dtype=dtype)
        self.pool = SymmetricPool()

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, G * C_in]` -> `[B, h, w, G * C_out]`."""
        return self.conv(self.pool(jax.nn.relu(self.norm(x, train=train))))


def p4m_cnn(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dtype: DTypeLike = jnp.float32,
    width: int = 8,
    blocks: int = 4,
    padding: Literal["valid", "same"] = "valid",
) -> GroupNet:
    """A small p4m net for CPUs, of 32,585 parameters with one output: blocks pool before they convolve.

    Options: width (features of the first layers, for each of the eight elements; the later half has twice as
    many), blocks (convolutions, the lifting one among them), padding ("valid" or "same").
    """
    _check_options({"width": width, "blocks": blocks}, padding)
    widths = [width * (1 if number < math.ceil(blocks / 2) else 2) for number in range(blocks)]
    body: dict[str, Any] = {
        "lift": GroupConv("p4m", image_shape[2], width, 3, lifting=True, padding=padding, dtype=dtype)
    }
    for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        body[f"block{number}"] = GroupConvBlock("p4m", before, after, padding, dtype)
    return GroupNet("p4m", body, widths[-1], outputs, dtype)


class GroupResidualBlock(nnx.Module):
    """Normalisation, ReLU and 3x3 group convolution, twice, beside a shortcut; pools first where it halves the sides.

    The order of He et al. 2016 (arXiv:1603.05027). Where the width changes the shortcut is a 1x1 group convolution.
    """

    def __init__(
        self, group: Group, in_features: int, features: int, *, halve: bool, dtype: DTypeLike
    ) -> None:
        self.norm1 = _norm(group, in_features, dtype=dtype)
        self.pool = SymmetricPool() if halve else None
        self.conv1 = GroupConv(group, in_features, features, 3, padding="same", dtype=dtype)
        self.norm2 = _norm(group, features, dtype=dtype)
        self.conv2 = GroupConv(group, features, features, 3, padding="same", dtype=dtype)
        changes = halve or in_features != features
        self.shortcut = GroupConv(group, in_features, features, 1, dtype=dtype) if changes else None

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, G * C_in]` -> `[B, H, W, G * C_out]`, or half the sides."""
        y = jax.nn.relu(self.norm1(x, train=train))
        if self.pool is not None:
            y = self.pool(y)
        kept = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(jax.nn.relu(self.norm2(self.conv1(y), train=train)))
        return kept + y


def p4m_resnet(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dtype: DTypeLike = jnp.float32,
    width: int = 4,
) -> GroupNet:
    """`resnet_small` with equivariant layers.

    A 4x4 lifting convolution of stride 2, then four stages of 1, 2, 2 and 2 residual blocks, each of which halves
    the sides and doubles the features, the first but for the sides. A step takes about as long as that of
    `resnet_small` with its stride-2 stem.

    Options: width (features of the first stage, for each of the eight elements).

    Raises:
        UserError: the image has an odd side, or an option lies outside its range.
    """
    _check_options({"width": width}, "same")
    if any(side % 2 for side in image_shape[:2]):
        raise UserError("It wants even sides: a stride of 2 keeps the symmetries of those only.")
    body: dict[str, Any] = {
        "lift": GroupConv("p4m", image_shape[2], width, 4, lifting=True, stride=2, padding=1, dtype=dtype)
    }
    before = width
    for stage, depth in enumerate((1, 2, 2, 2)):
        features = width * 2**stage
        for number in range(depth):
            halve = stage > 0 and number == 0
            body[f"block{len(body)}"] = GroupResidualBlock("p4m", before, features, halve=halve, dtype=dtype)
            before = features
    return GroupNet("p4m", body, before, outputs, dtype)


def _check_options(counts: dict[str, Any], padding: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"Its option {name} is {value!r}: it must be a whole number of at least 1.")
    if padding not in ("valid", "same"):
        raise UserError(f'Its option padding is {padding!r}: it must be "valid" or "same".')
