"""Residual networks (He et al. 2015, arXiv:1512.03385; wide: Zagoruyko & Komodakis 2016, arXiv:1605.07146).

Numerics and names are torchvision's: explicit padding, the stride on the 3x3 convolution of a bottleneck
(v1.5), batch normalisation with epsilon 1e-5, and attributes `conv1`, `bn1`, `layer1.0.conv1`,
`layer2.0.downsample.0`, `fc`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models import initializers
from pcam_jax.models.initializers import Initializer, he_normal_fan_out, uniform_within
from pcam_jax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    GlobalAvgPool,
    MaxPool,
    recorded,
)
from pcam_jax.runtime.errors import UserError

Stem = Literal["imagenet", "stride2", "stride1"]

conv = functools.partial(Conv, use_bias=False, kernel_init=he_normal_fan_out)
norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-5, bessel=True)


def _shortcut(in_features: int, features: int, stride: int, dtype: DTypeLike) -> nnx.Dict | None:
    """A strided 1x1 convolution and a normalisation where the block changes the shape, else None."""
    if stride == 1 and in_features == features:
        return None
    return nnx.Dict(
        {
            "0": conv(in_features, features, 1, stride=stride, dtype=dtype),
            "1": norm(features, dtype=dtype),
        }
    )


def _apply_shortcut(shortcut: nnx.Dict | None, x: jax.Array, train: bool) -> jax.Array:
    return x if shortcut is None else shortcut["1"](shortcut["0"](x), train=train)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        base_width: int,
        last_scale_init: Initializer,
        dtype: DTypeLike,
    ) -> None:
        make: dict[str, Any] = {"dtype": dtype}
        self.conv1 = conv(in_features, features, 3, stride=stride, padding=1, **make)
        self.bn1 = norm(features, **make)
        self.conv2 = conv(features, features, 3, padding=1, **make)
        self.bn2 = norm(features, scale_init=last_scale_init, **make)
        self.downsample = _shortcut(in_features, features, stride, dtype)

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, H / stride, W / stride, features]`."""
        y = jax.nn.relu(self.bn1(self.conv1(x), train=train))
        y = self.bn2(self.conv2(y), train=train)
        return jax.nn.relu(y + _apply_shortcut(self.downsample, x, train))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions beside a shortcut, 4 times `features` channels out."""

    expansion = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        *,
        base_width: int,
        last_scale_init: Initializer,
        dtype: DTypeLike,
    ) -> None:
        make: dict[str, Any] = {"dtype": dtype}
        width, out_features = features * base_width // 64, features * self.expansion
        self.conv1 = conv(in_features, width, 1, **make)
        self.bn1 = norm(width, **make)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, **make)
        self.bn2 = norm(width, **make)
        self.conv3 = conv(width, out_features, 1, **make)
        self.bn3 = norm(out_features, scale_init=last_scale_init, **make)
        self.downsample = _shortcut(in_features, out_features, stride, dtype)

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, H / stride, W / stride, 4 * features]`."""
        y = jax.nn.relu(self.bn1(self.conv1(x), train=train))
        y = jax.nn.relu(self.bn2(self.conv2(y), train=train))
        y = self.bn3(self.conv3(y), train=train)
        return jax.nn.relu(y + _apply_shortcut(self.downsample, x, train))


class ResNet(nnx.Module):
    """A stem, four stages of residual blocks, average pool and a linear layer.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        blocks: number of blocks of each stage.
        features: channels of each stage (before a bottleneck's expansion).
        base_width: 64, or 128 for the wide nets (channels inside a bottleneck double).
        image_shape: (H, W, C) of the images.
        outputs: number of logits.
        stem: "imagenet" (7x7 of stride 2, then a max-pool: a quarter of the image's side), "stride2" (3x3 of
            stride 2) or "stride1" (3x3), the last two without pool, for small images.
        zero_init_residual: start every block as the identity by a zero scale in its last normalisation (Goyal
            et al. 2017, arXiv:1706.02677).
        dtype: dtype of the arithmetic; pooling and the linear layer stay in float32.

    Raises:
        UserError: unknown stem.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        *,
        features: tuple[int, ...],
        base_width: int,
        image_shape: tuple[int, int, int],
        outputs: int,
        stem: Stem = "imagenet",
        zero_init_residual: bool = False,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        if stem not in get_args(Stem):
            raise UserError(f"Unknown stem {stem!r}: choose one of {', '.join(get_args(Stem))}.")
        width = features[0]
        if stem == "imagenet":
            self.conv1 = conv(image_shape[2], width, 7, stride=2, padding=3, dtype=dtype)
        else:
            stride = 2 if stem == "stride2" else 1
            self.conv1 = conv(image_shape[2], width, 3, stride=stride, padding=1, dtype=dtype)
        self.bn1 = norm(width, dtype=dtype)
        self.maxpool = MaxPool(3, 2, padding=1) if stem == "imagenet" else None
        last_scale_init = initializers.zeros if zero_init_residual else initializers.ones
        self.stages = tuple(f"layer{stage}" for stage in range(1, len(blocks) + 1))
        self.depths = tuple(blocks)
        for stage, name in enumerate(self.stages):
            members = {}
            for number in range(blocks[stage]):
                stride = 2 if stage > 0 and number == 0 else 1
                members[str(number)] = block(
                    width,
                    features[stage],
                    stride,
                    base_width=base_width,
                    last_scale_init=last_scale_init,
                    dtype=dtype,
                )
                width = features[stage] * block.expansion
            setattr(self, name, nnx.Dict(members))
        self.avgpool = GlobalAvgPool()
        # PyTorch's default for linear layers.
        fc_init = uniform_within(width**-0.5)
        self.fc = Dense(width, outputs, kernel_init=fc_init, bias_init=fc_init)

    def feature_map(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The last spatial map: `[B, H, W, 3]` -> `[B, h, w, C]`."""
        x = jax.nn.relu(self.bn1(self.conv1(x), train=train))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for name, depth in zip(self.stages, self.depths, strict=True):
            stage = getattr(self, name)
            for number in range(depth):
                x = stage[str(number)](x, train=train)
        return x

    def classify(self, features: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The logits of a spatial map: `[B, h, w, C]` -> `[B, outputs] float32`."""
        return self.fc(self.avgpool(features))


def _family(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: tuple[int, ...],
    *,
    features: tuple[int, ...] = (64, 128, 256, 512),
    base_width: int = 64,
) -> Callable[..., ResNet]:
    def build(
        *,
        image_shape: tuple[int, int, int],
        outputs: int,
        stem: Stem = "imagenet",
        zero_init_residual: bool = False,
        dtype: DTypeLike = jnp.float32,
    ) -> ResNet:
        return ResNet(
            block,
            blocks,
            features=features,
            base_width=base_width,
            image_shape=image_shape,
            outputs=outputs,
            stem=stem,
            zero_init_residual=zero_init_residual,
            dtype=dtype,
        )

    return build


resnet18 = _family(BasicBlock, (2, 2, 2, 2))
resnet34 = _family(BasicBlock, (3, 4, 6, 3))
resnet50 = _family(Bottleneck, (3, 4, 6, 3))
wide_resnet50_2 = _family(Bottleneck, (3, 4, 6, 3), base_width=128)
# 2.8 million parameters: enough for a few thousand patches, quick on CPU; meant for the stride-2 stem.
resnet_small = _family(BasicBlock, (1, 2, 2, 2), features=(32, 64, 128, 256))
