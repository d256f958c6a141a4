"""EfficientNet-B0 (Tan & Le 2019, arXiv:1905.11946), with torchvision's numerics and names.

Paths read `features.0.0`, `features.1.0.block.0.0`, `features.2.0.block.2.fc1`, `features.8.0`,
`classifier.1`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models import shares
from pcam_jax.models.initializers import he_normal_fan_out, uniform_within
from pcam_jax.models.layers import BatchNorm, Conv, Dense, Dropout, GlobalAvgPool, recorded

norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-5, bessel=True)


class ConvNorm(nnx.Module):
    """A convolution (path `0`), a normalisation (path `1`) and, unless told otherwise, SiLU."""

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activate: bool = True,
        dtype: DTypeLike,
    ) -> None:
        conv = Conv(
            in_features,
            features,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2,
            groups=groups,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            dtype=dtype,
        )
        # Attributes named by digits give torchvision's paths.
        setattr(self, "0", conv)
        setattr(self, "1", norm(features, dtype=dtype))
        self.activate = activate

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, h, w, C]`."""
        y = getattr(self, "1")(getattr(self, "0")(x), train=train)
        return jax.nn.silu(y) if self.activate else y


class SqueezeExcitation(nnx.Module):
    """Scale each channel by a gate computed from all channels' means (Hu et al. 2017, arXiv:1709.01507)."""

    def __init__(self, features: int, squeezed: int, *, dtype: DTypeLike) -> None:
        self.fc1 = Conv(features, squeezed, 1, kernel_init=he_normal_fan_out, dtype=dtype)
        self.fc2 = Conv(squeezed, features, 1, kernel_init=he_normal_fan_out, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> the same, gated."""
        means = x.astype(jnp.float32).mean((1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.fc2(jax.nn.silu(self.fc1(means))))


class Stage(NamedTuple):
    """One row of the paper's table 1."""

    expansion: int
    kernel_size: int
    stride: int
    features: int
    layers: int


B0_STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class InvertedResidual(nnx.Module):
    """Expand, depthwise convolution, squeeze-and-excitation, project; a shortcut where shapes agree.

    In training the residual branch of an example is dropped with probability `drop_rate` and scaled up
    otherwise (stochastic depth, Huang et al. 2016, arXiv:1603.09382).
    """

    def __init__(
        self, in_features: int, stage: Stage, stride: int, drop_rate: float, *, dtype: DTypeLike
    ) -> None:
        width = in_features * stage.expansion
        layers: list[Any] = []
        if stage.expansion > 1:
            layers.append(ConvNorm(in_features, width, 1, dtype=dtype))
        layers.append(ConvNorm(width, width, stage.kernel_size, stride=stride, groups=width, dtype=dtype))
        layers.append(SqueezeExcitation(width, max(1, in_features // 4), dtype=dtype))
        layers.append(ConvNorm(width, stage.features, 1, activate=False, dtype=dtype))
        self.block = nnx.Dict({str(number): layer for number, layer in enumerate(layers)})
        self.depth = len(layers)
        self.has_shortcut = stride == 1 and in_features == stage.features
        self.drop_rate = drop_rate

    @recorded
    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """`[B, H, W, C_in]` -> `[B, H / stride, W / stride, C]`.

        Raises:
            ValueError: training without a key.
        """
        y = x
        for number in range(self.depth):
            layer = self.block[str(number)]
            y = layer(y) if isinstance(layer, SqueezeExcitation) else layer(y, train=train)
        if not self.has_shortcut:
            return y
        if train and self.drop_rate > 0:
            if key is None:
                raise ValueError("a net with stochastic depth needs key= when train=True")
            keep = shares.bernoulli(key, 1 - self.drop_rate, (x.shape[0], 1, 1, 1))
            y = y * (keep / (1 - self.drop_rate)).astype(y.dtype)
        return x + y


class EfficientNet(nnx.Module):
    """Stem, inverted residual stages, a 1x1 convolution, average pool, dropout and a linear layer.

    Args:
        stages: rows of the paper's table.
        image_shape: (H, W, C) of the images.
        outputs: number of logits.
        dropout: rate before the linear layer.
        stochastic_depth: drop rate of the last block; earlier ones grow linearly towards it.
        dtype: dtype of the arithmetic; pooling and the linear layer stay in float32.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        *,
        image_shape: tuple[int, int, int],
        outputs: int,
        dropout: float,
        stochastic_depth: float,
        dtype: DTypeLike,
    ) -> None:
        width = 32
        members: dict[str, Any] = {"0": ConvNorm(image_shape[2], width, 3, stride=2, dtype=dtype)}
        total = sum(stage.layers for stage in stages)
        done = 0
        for number, stage in enumerate(stages, start=1):
            blocks = {}
            for layer in range(stage.layers):
                stride = stage.stride if layer == 0 else 1
                rate = stochastic_depth * done / total
                blocks[str(layer)] = InvertedResidual(width, stage, stride, rate, dtype=dtype)
                width, done = stage.features, done + 1
            members[str(number)] = nnx.Dict(blocks)
        self.depths = tuple(stage.layers for stage in stages)
        last = 4 * width
        members[str(len(stages) + 1)] = ConvNorm(width, last, 1, dtype=dtype)
        self.features = nnx.Dict(members)
        self.avgpool = GlobalAvgPool()
        dense = Dense(last, outputs, kernel_init=uniform_within(outputs**-0.5))
        self.classifier = nnx.Dict({"0": Dropout(dropout), "1": dense})

    def feature_map(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The last spatial map: `[B, H, W, 3]` -> `[B, h, w, C]`."""
        x = self.features["0"](x, train=train)
        done = 0
        for number, depth in enumerate(self.depths, start=1):
            for layer in range(depth):
                done += 1
                block_key = None if key is None else jax.random.fold_in(key, done)
                x = self.features[str(number)][str(layer)](x, train=train, key=block_key)
        return self.features[str(len(self.depths) + 1)](x, train=train)

    def classify(self, features: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The logits of a spatial map: `[B, h, w, C]` -> `[B, outputs] float32`."""
        dropout_key = None if key is None else jax.random.fold_in(key, 0)
        pooled = self.classifier["0"](self.avgpool(features), train=train, key=dropout_key)
        return self.classifier["1"](pooled)


def efficientnet_b0(
    *,
    image_shape: tuple[int, int, int],
    outputs: int,
    dropout: float = 0.2,
    stochastic_depth: float = 0.2,
    dtype: DTypeLike = jnp.float32,
) -> EfficientNet:
    """The base net: 5,288,548 parameters with 1000 outputs."""
    return EfficientNet(
        B0_STAGES,
        image_shape=image_shape,
        outputs=outputs,
        dropout=dropout,
        stochastic_depth=stochastic_depth,
        dtype=dtype,
    )
