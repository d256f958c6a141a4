"""Plain stacks of layers described as data: what the five seed systems' own nets are.

A net is two lists of specs, body and head. `Stack` builds them for an image shape, layer after layer, and
names each after its kind and number (`conv1`, `pool1`, `dense2`), the last dense layer `output`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models.convolution import Padding
from pcam_jax.models.initializers import Initializer, glorot_uniform
from pcam_jax.models.layers import (
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Flatten,
    MaxPool,
    conv_relu_pool,
)


@dataclass(frozen=True)
class ConvSpec:
    """A convolution, by default followed by ReLU."""

    features: int
    kernel_size: int
    stride: int = 1
    padding: Padding = "valid"
    relu: bool = True
    kind: str = field(default="conv", init=False)


@dataclass(frozen=True)
class MaxPoolSpec:
    """A max-pool whose stride is its window."""

    window: int = 2
    kind: str = field(default="pool", init=False)


@dataclass(frozen=True)
class BatchNormSpec:
    """Batch normalisation with Keras's constants."""

    kind: str = field(default="norm", init=False)


@dataclass(frozen=True)
class DropoutSpec:
    """Dropout of a share `rate`."""

    rate: float
    kind: str = field(default="dropout", init=False)


@dataclass(frozen=True)
class DenseSpec:
    """A dense layer followed by ReLU."""

    features: int
    kind: str = field(default="dense", init=False)


Spec = ConvSpec | MaxPoolSpec | BatchNormSpec | DropoutSpec | DenseSpec


class Stack(nnx.Module):
    """Body (convolutions and pools), flatten, head (dense layers), and a linear output.

    Args:
        body: layers from the image to the last spatial map.
        head: layers from the flattened map to the output layer.
        image_shape: (H, W, C) of the images.
        outputs: number of logits.
        kernel_init: initialiser of every kernel.
        dtype: dtype of the arithmetic; the output layer stays in float32.

    Raises:
        UserError: the images are too small for the body.
    """

    def __init__(
        self,
        body: Sequence[Spec],
        head: Sequence[Spec],
        *,
        image_shape: tuple[int, int, int],
        outputs: int,
        kernel_init: Initializer = glorot_uniform,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        relu_after: list[str] = []
        pooled: list[str] = []
        counts: dict[str, int] = {}
        shape: tuple[int, ...] = (1, *image_shape)

        def add(specs: Sequence[Spec]) -> tuple[str, ...]:
            nonlocal shape
            names = []
            for spec, following in zip(specs, (*specs[1:], None), strict=True):
                counts[spec.kind] = counts.get(spec.kind, 0) + 1
                name = f"{spec.kind}{counts[spec.kind]}"
                layer = _build(spec, shape[-1], kernel_init, dtype)
                setattr(self, name, layer)
                relu = isinstance(spec, DenseSpec) or (isinstance(spec, ConvSpec) and spec.relu)
                if relu and isinstance(spec, ConvSpec) and isinstance(following, MaxPoolSpec):
                    pooled.append(f"pool{counts.get('pool', 0) + 1}")
                elif relu:
                    relu_after.append(name)
                shape = _shape_after(layer, shape)
                names.append(name)
            return tuple(names)

        self.body_names = add(body)
        self.flatten = Flatten()
        shape = _shape_after(self.flatten, shape)
        self.head_names = add(head)
        # Dense layers and convolutions followed by ReLU; pools that one step does with the convolution before.
        self.relu_after, self.pooled = tuple(relu_after), tuple(pooled)
        self.output = Dense(shape[-1], outputs, kernel_init=kernel_init, dtype=jnp.float32)

    def feature_map(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The last spatial map: `[B, H, W, C]` -> `[B, h, w, C]`."""
        return self._run(self.body_names, x, train, key)

    def classify(self, features: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """The logits of a spatial map: `[B, h, w, C]` -> `[B, outputs] float32`."""
        return self.output(self._run(self.head_names, self.flatten(features), train, key))

    def _run(self, names: tuple[str, ...], x: jax.Array, train: bool, key: jax.Array | None) -> jax.Array:
        for name, following in zip(names, (*names[1:], ""), strict=True):
            layer = getattr(self, name)
            if name in self.pooled:
                continue
            if following in self.pooled:
                x = conv_relu_pool(layer, getattr(self, following), x)
            elif isinstance(layer, Dropout) and key is not None:
                # Each dropout layer draws from a key of its own.
                x = layer(x, train=train, key=jax.random.fold_in(key, int(name.removeprefix("dropout"))))
            else:
                x = _call(layer, x, train)
            if name in self.relu_after:
                x = jax.nn.relu(x)
        return x


def _build(spec: Spec, features: int, kernel_init: Initializer, dtype: DTypeLike) -> nnx.Module:
    match spec:
        case ConvSpec():
            return Conv(
                features,
                spec.features,
                spec.kernel_size,
                stride=spec.stride,
                padding=spec.padding,
                kernel_init=kernel_init,
                dtype=dtype,
            )
        case MaxPoolSpec():
            return MaxPool(spec.window)
        case BatchNormSpec():
            return BatchNorm(features, dtype=dtype)
        case DropoutSpec():
            return Dropout(spec.rate)
        case DenseSpec():
            return Dense(features, spec.features, kernel_init=kernel_init, dtype=dtype)


def _call(layer: Any, x: jax.Array, train: bool) -> jax.Array:
    if isinstance(layer, BatchNorm):
        return layer(x, train=train)
    if isinstance(layer, Dropout):
        return layer(x, train=train, key=None)
    return layer(x)


def _shape_after(layer: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return jax.eval_shape(lambda x: _call(layer, x, False), jax.ShapeDtypeStruct(shape, jnp.float32)).shape
