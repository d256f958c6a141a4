"""DenseNet-121 (Huang et al. 2016, arXiv:1608.06993), with torchvision's numerics and names.

Paths read `features.conv0`, `features.denseblock1.denselayer1.norm1`, `features.transition1.conv`,
`classifier`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models.initializers import he_normal, uniform_within
from pcam_jax.models.layers import AvgPool, BatchNorm, Conv, Dense, GlobalAvgPool, MaxPool, recorded

conv = functools.partial(Conv, use_bias=False, kernel_init=he_normal)
norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-5, bessel=True)


class DenseLayer(nnx.Module):
    """Normalise, 1x1 to 4 * growth channels, normalise, 3x3 to growth channels."""

    def __init__(self, in_features: int, growth: int, dtype: DTypeLike) -> None:
        width = 4 * growth
        self.norm1 = norm(in_features, dtype=dtype)
        self.conv1 = conv(in_features, width, 1, dtype=dtype)
        self.norm2 = norm(width, dtype=dtype)
        self.conv2 = conv(width, growth, 3, padding=1, dtype=dtype)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The new channels: `[B, H, W, C]` -> `[B, H, W, growth]`."""
        y = self.conv1(jax.nn.relu(self.norm1(x, train=train)))
        return self.conv2(jax.nn.relu(self.norm2(y, train=train)))


class DenseBlock(nnx.Module):
    """Layers that each see the concatenation of the input and all earlier layers' outputs."""

    def __init__(self, in_features: int, layers: int, growth: int, dtype: DTypeLike) -> None:
        self.members = tuple(f"denselayer{number}" for number in range(1, layers + 1))
        for number, name in enumerate(self.members):
            setattr(self, name, DenseLayer(in_features + number * growth, growth, dtype))

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H, W, C + layers * growth]`."""
        for name in self.members:
            x = jnp.concatenate([x, getattr(self, name)(x, train=train)], axis=-1)
        return x


class Transition(nnx.Module):
    """Halve the channels by a 1x1 convolution and the sides by an average pool."""

    def __init__(self, in_features: int, dtype: DTypeLike) -> None:
        self.norm = norm(in_features, dtype=dtype)
        self.conv = conv(in_features, in_features // 2, 1, dtype=dtype)
        self.pool = AvgPool(2)

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H // 2, W // 2, C // 2]`."""
        return self.pool(self.conv(jax.nn.relu(self.norm(x, train=train))))


class DenseNet(nnx.Module):
    """Stem, dense blocks with transitions between them, average pool and a linear layer.

    Args:
        blocks: layers of each dense block.
        growth: channels each layer adds.
        stem_features: channels of the 7x7 stem.
        image_shape: (H, W, C) of the images.
        outputs: number of logits.
        dtype: dtype of the arithmetic; pooling and the linear layer stay in float32.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        growth: int,
        stem_features: int,
        image_shape: tuple[int, int, int],
        outputs: int,
        dtype: DTypeLike,
    ) -> None:
        width = stem_features
        members: dict[str, Any] = {
            "conv0": conv(image_shape[2], width, 7, stride=2, padding=3, dtype=dtype),
            "norm0": norm(width, dtype=dtype),
            "pool0": MaxPool(3, 2, padding=1),
        }
        stages = []
        for number, layers in enumerate(blocks, start=1):
            members[f"denseblock{number}"] = DenseBlock(width, layers, growth, dtype)
            stages.append(f"denseblock{number}")
            width += layers * growth
            if number < len(blocks):
                members[f"transition{number}"] = Transition(width, dtype)
                stages.append(f"transition{number}")
                width //= 2
        last = f"norm{len(blocks) + 1}"
        members[last] = norm(width, dtype=dtype)
        self.stages, self.last_norm = tuple(stages), last
        self.features = nnx.Dict(members)
        self.avgpool = GlobalAvgPool()
        self.classifier = Dense(width, outputs, kernel_init=uniform_within(width**-0.5))

    def feature_map(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The last spatial map, after its ReLU: `[B, H, W, 3]` -> `[B, h, w, C]`."""
        x = jax.nn.relu(self.features["norm0"](self.features["conv0"](x), train=train))
        x = self.features["pool0"](x)
        for name in self.stages:
            x = self.features[name](x, train=train)
        return jax.nn.relu(self.features[self.last_norm](x, train=train))

    def classify(self, features: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The logits of a spatial map: `[B, h, w, C]` -> `[B, outputs] float32`."""
        return self.classifier(self.avgpool(features))


def densenet121(
    *, image_shape: tuple[int, int, int], outputs: int, dtype: DTypeLike = jnp.float32
) -> DenseNet:
    """Blocks of 6, 12, 24 and 16 layers of growth 32: 7,978,856 parameters with 1000 outputs."""
    return DenseNet(
        (6, 12, 24, 16), growth=32, stem_features=64, image_shape=image_shape, outputs=outputs, dtype=dtype
    )
