"""The layers every net is made of: NNX modules, with the train flag and the dropout key passed at each call.

A layer keeps its parameters in float32 and computes in its `dtype`. Nets never ask which platform they run
on; the formulations in `convolution` and `pooling` do.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models import conv_pool, convolution, initializers, pooling, shares
from pcam_jax.models.convolution import Padding
from pcam_jax.models.initializers import Initializer
from pcam_jax.runtime.errors import UserError


def parameter(init: Initializer, *shape: int) -> nnx.Param:
    """A float32 parameter that remembers how to draw itself; until `Net.init` does, kernels are zero."""
    constant = init.width if init.distribution == "constant" else 0.0
    return nnx.Param(jnp.full(shape, constant, jnp.float32), init=init)


Observer = Callable[[nnx.Module, jax.Array], jax.Array]
"""Sees a recorded call's module and output, and returns the output that the net goes on with."""

_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "pcam_jax_layer_observer", default=None
)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Let ``observer`` see every `recorded` call, in order, while the context is open."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[nnx.Module, tuple[int, ...]]]]:
    """Collect (module, output shape) of every `recorded` call, in order, while the context is open."""
    rows: list[tuple[nnx.Module, tuple[int, ...]]] = []

    def note(module: nnx.Module, output: jax.Array) -> jax.Array:
        rows.append((module, output.shape))
        return output

    with observing(note):
        yield rows


@contextlib.contextmanager
def tapping(row: int, offset: jax.Array) -> Iterator[list[jax.Array]]:
    """Collect the output of the `recorded` call number ``row``, and add ``offset`` to what the net goes on with."""
    calls, taken = 0, []

    def tap(module: nnx.Module, output: jax.Array) -> jax.Array:
        nonlocal calls
        calls += 1
        if calls != row + 1:
            return output
        taken.append(output)
        return output + offset.astype(output.dtype)

    with observing(tap):
        yield taken


def recorded(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Mark a module's `__call__` as one row of the summary; recorded calls inside it are part of that row."""

    @functools.wraps(call)
    def wrapper(self: nnx.Module, *args: Any, **kwargs: Any) -> jax.Array:
        observer = _observer.get()
        if observer is None:
            return call(self, *args, **kwargs)
        token = _observer.set(None)
        try:
            output = call(self, *args, **kwargs)
        finally:
            _observer.reset(token)
        return observer(self, output)

    return wrapper


def _require_positive(layer: str, before: tuple[int, ...], rows: int, columns: int) -> None:
    if rows < 1 or columns < 1:
        raise UserError(
            f"The net is too deep for its image: {layer} would shrink a {before[1]}x{before[2]} map to "
            f"{max(rows, 0)}x{max(columns, 0)}; use larger images or a shallower net."
        )


class Conv(nnx.Module):
    """Convolution with optional bias: `[B, H, W, C_in]` -> `[B, h, w, C_out]`.

    Args:
        in_features: C_in.
        out_features: C_out.
        kernel_size: side of the square kernel.
        stride: distance between output pixels.
        padding: "valid", "same" or a number of pixels (see `convolution.resolve_padding`).
        groups: 1, or C_in = C_out for a depthwise convolution.
        use_bias: whether to add a bias, initialised to zero.
        kernel_init: initialiser of the `[k, k, C_in / groups, C_out]` kernel.
        dtype: dtype of the arithmetic and the result; the platform may compute in float32 and return that
            (see `convolution.arithmetic_dtype`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: Padding = "valid",
        groups: int = 1,
        use_bias: bool = True,
        kernel_init: Initializer = initializers.glorot_uniform,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        shape = (kernel_size, kernel_size, in_features // groups, out_features)
        self.kernel = parameter(kernel_init, *shape)
        self.bias = parameter(initializers.zeros, out_features) if use_bias else None
        self.stride, self.padding, self.groups, self.dtype = stride, padding, groups, dtype

    def effective_kernel(self) -> jax.Array:
        """The kernel that is applied; subclasses may build it from the parameter."""
        return self.kernel[...]

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the convolution.

        Raises:
            UserError: the image is smaller than the kernel.
        """
        kernel = self.effective_kernel()
        height, width = kernel.shape[:2]
        pads = convolution.resolve_padding(
            self.padding, (x.shape[1], x.shape[2]), (height, width), self.stride
        )
        rows = convolution.output_size(x.shape[1], height, self.stride, pads[0])
        columns = convolution.output_size(x.shape[2], width, self.stride, pads[1])
        _require_positive(f"a {height}x{width} convolution", x.shape, rows, columns)
        dtype = convolution.arithmetic_dtype(self.dtype, kernel.shape)
        y = convolution.conv2d(
            x.astype(dtype),
            kernel.astype(dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Dense(nnx.Module):
    """Affine map of the last axis: `[B, in_features]` -> `[B, out_features]`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer = initializers.glorot_uniform,
        bias_init: Initializer = initializers.zeros,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.kernel = parameter(kernel_init, in_features, out_features)
        self.bias = parameter(bias_init, out_features)
        self.dtype = dtype

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the map in the layer's dtype."""
        return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)


class BatchNorm(nnx.Module):
    """Normalisation over batch and space, statistics in float32 (Ioffe & Szegedy 2015, arXiv:1502.03167).

    The statistics are those of the whole batch, also where several devices share it.

    Args:
        features: number of channels.
        momentum: share of the old running statistics kept at each step (PyTorch's momentum is one minus
            this).
        epsilon: added to the variance.
        bessel: whether the running variance takes n / (n - 1), as in PyTorch and cuDNN; Keras's own does not.
        dtype: dtype of the result.
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        bessel: bool = False,
        scale_init: Initializer = initializers.ones,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.scale = parameter(scale_init, features)
        self.bias = parameter(initializers.zeros, features)
        self.mean = nnx.BatchStat(jnp.zeros((features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((features,), jnp.float32))
        self.momentum, self.epsilon, self.bessel, self.dtype = momentum, epsilon, bessel, dtype

    @recorded
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalise by the batch's statistics in training, else by the running ones."""
        if train:
            wide = x.astype(jnp.float32)
            axes = tuple(range(x.ndim - 1))
            moments = wide.mean(axes), (wide * wide).mean(axes)
            mean, square = (self._shared(moment) for moment in shares.mean(moments))
            var = jnp.maximum(square - mean * mean, 0.0)
            count = x.size // mean.size * shares.count()
            spread = var * (count / max(count - 1, 1)) if self.bessel else var
            keep = self.momentum
            self.mean[...] = keep * self.mean[...] + (1 - keep) * jax.lax.stop_gradient(mean)
            self.var[...] = keep * self.var[...] + (1 - keep) * jax.lax.stop_gradient(spread)
        else:
            mean, var = self.mean[...], self.var[...]
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        shift = self.bias[...] - mean * scale
        scale, shift = self._spread(scale), self._spread(shift)
        return (x.astype(jnp.float32) * scale + shift).astype(self.dtype)

    def _shared(self, moment: jax.Array) -> jax.Array:
        """The moment of each feature from that of each channel; here they are the same."""
        return moment

    def _spread(self, factor: jax.Array) -> jax.Array:
        """The other way round, from features to channels."""
        return factor


class Dropout(nnx.Module):
    """Zero a share `rate` of the values in training and scale the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    @recorded
    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """Apply dropout with the mask drawn from `key`; the identity in evaluation.

        Raises:
            ValueError: training without a key.
        """
        if not train or self.rate == 0.0:
            return x
        if key is None:
            raise ValueError("a net with dropout needs key= when train=True")
        keep = shares.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))


class MaxPool(nnx.Module):
    """Maximum over square windows (see `pooling.max_pool`)."""

    def __init__(self, window: int, stride: int | None = None, padding: int = 0) -> None:
        self.window, self.stride, self.padding = window, stride or window, padding

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool `[B, H, W, C]`.

        Raises:
            UserError: the image is smaller than the window.
        """
        pads = (self.padding, self.padding)
        rows, columns = (convolution.output_size(n, self.window, self.stride, pads) for n in x.shape[1:3])
        _require_positive(f"a {self.window}x{self.window} max-pool", x.shape, rows, columns)
        return pooling.max_pool(x, self.window, self.stride, self.padding)


class AvgPool(nnx.Module):
    """Mean over square windows without padding."""

    def __init__(self, window: int, stride: int | None = None) -> None:
        self.window, self.stride = window, stride or window

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool `[B, H, W, C]`.

        Raises:
            UserError: the image is smaller than the window.
        """
        rows, columns = (convolution.output_size(n, self.window, self.stride) for n in x.shape[1:3])
        _require_positive(f"a {self.window}x{self.window} average pool", x.shape, rows, columns)
        return pooling.avg_pool(x, self.window, self.stride)


class GlobalAvgPool(nnx.Module):
    """Mean over space in float32: `[B, H, W, C]` -> `[B, C]`."""

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Average the map."""
        return x.astype(jnp.float32).mean((1, 2))


def conv_relu_pool(conv: Conv, pool: MaxPool, x: jax.Array) -> jax.Array:
    """``relu(pool(conv(x)))``, in one step where that is faster; ReLU may as well come before the pool."""
    kernel, bias = conv.kernel[...], conv.bias
    dtype = convolution.arithmetic_dtype(conv.dtype, kernel.shape)
    x = x.astype(dtype)
    fused = (
        (pool.window, pool.stride, pool.padding) == (2, 2, 0)
        and _observer.get() is None
        and conv_pool.takes(x, kernel, conv.stride, conv.padding)
    )
    if fused and bias is not None:
        return conv_pool.conv_relu_pool(x, kernel.astype(dtype), bias[...], conv.padding)
    return jax.nn.relu(pool(conv(x)))


class Flatten(nnx.Module):
    """`[B, H, W, C]` -> `[B, H * W * C]`, channels fastest, as in Keras."""

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Flatten all axes but the first."""
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))
