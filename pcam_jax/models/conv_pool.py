"""Convolution, ReLU and 2x2 max-pool as one step of training on CPU.

Between a convolution and its pool lies the largest map of a plain CNN. Here it never leaves the cache: a few
images at a time are convolved and pooled, keeping the pooled map and which pixel of each window won; the
backward pass places the gradient of a few images and contracts it at once. The values are those of the three
steps one after another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pcam_jax.models import convolution, pooling, window_dot, winograd
from pcam_jax.models.batch_parts import count_parts, map_parts, sum_parts
from pcam_jax.models.convolution import Padding, Pads
from pcam_jax.models.platform import prefers_cpu_formulations

# Output columns whose filter gradient is one row of the matrix product: twice the depth, a third more products.
_BAND = 2


def takes(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> bool:
    """Whether `conv_relu_pool` is the way to compute this block here."""
    if stride != 1 or kernel.shape[:2] == (1, 1) or not prefers_cpu_formulations():
        return False
    pads = convolution.resolve_padding(
        padding, (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]), 1
    )
    return _method(x, kernel, pads) is not None


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: Padding) -> jax.Array:
    """ReLU and 2x2 max-pool of a stride-1 convolution.

    Args:
        x: ``[B, H, W, C_in]``; bfloat16 is computed in float32 where the machine has no matrix units for it.
        kernel: ``[k, k, C_in, C_out]``, for which `takes` holds.
        bias: ``[C_out]``.
        padding: see `convolution.resolve_padding`.

    Returns:
        ``[B, h // 2, w // 2, C_out]`` for an h x w convolution.
    """
    pads = convolution.resolve_padding(
        padding, (x.shape[1], x.shape[2]), (kernel.shape[0], kernel.shape[1]), 1
    )
    pads = _without_odd_ends(x.shape, kernel.shape, pads)
    dtype = convolution.arithmetic_dtype(x.dtype, kernel.shape)
    y = _conv_relu_pool(x.astype(dtype), kernel.astype(dtype), bias.astype(jnp.float32), pads)
    return y.astype(x.dtype)


def _without_odd_ends(image: tuple[int, ...], kernel: tuple[int, ...], pads: Pads) -> Pads:
    """Pads that leave out the last output row and column where no window takes them."""
    (top, bottom), (left, right) = pads
    odd = [
        convolution.output_size(length, side, 1, pad) % 2
        for length, side, pad in zip(image[1:3], kernel[:2], pads, strict=True)
    ]
    return (top, bottom - odd[0]), (left, right - odd[1])


class _FewChannels(NamedTuple):
    """The first layer's way: fused taps forward, windows times gradient backward."""

    taps: int
    pads: Pads
    parts: int

    def prepare(self, kernel: jax.Array) -> jax.Array:
        return kernel

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution.conv_few_channels(_padded(x, self.pads), kernel, 1, ((0, 0), (0, 0)))

    def backward(self, x: jax.Array, grad: jax.Array, kernel: jax.Array) -> tuple[None, jax.Array]:
        """The kernel's gradient; the image's is computed apart, where it is wanted at all."""
        outputs, wide = grad.shape[-1], self.taps + _BAND - 1
        size = (grad.shape[1], grad.shape[2] // _BAND)
        rows = window_dot.windows(_padded(x, self.pads), (self.taps, wide), (1, _BAND), size)
        rows = rows.reshape(len(rows), -1)
        bands = lax.dot_general(rows, grad.reshape(-1, _BAND * outputs), (((0,), (0,)), ((), ())))
        bands = bands.reshape(self.taps, wide, -1, _BAND, outputs)
        return None, functools.reduce(
            jnp.add, [bands[:, column : column + self.taps, :, column] for column in range(_BAND)]
        )

    def finish(self, grad_kernel: jax.Array) -> jax.Array:
        return grad_kernel


class _Tiles(NamedTuple):
    """The other layers' way, by Winograd tiles."""

    plan: winograd.Plan

    @property
    def parts(self) -> int:
        return self.plan.parts

    def prepare(self, kernel: jax.Array) -> jax.Array:
        return self.plan.transform_kernel(kernel)

    def forward(self, x: jax.Array, products: jax.Array) -> jax.Array:
        return self.plan.forward(x, products)

    def backward(self, x: jax.Array, grad: jax.Array, products: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.plan.backward(x, grad, products)

    def finish(self, grad_products: jax.Array) -> jax.Array:
        return self.plan.transform_kernel_transposed(grad_products)


class _Windows(NamedTuple):
    """The way of CPUs with bfloat16 matrix units."""

    plan: window_dot.WindowDot
    few_channels: bool

    @property
    def parts(self) -> int:
        return self.plan.parts

    def prepare(self, kernel: jax.Array) -> jax.Array:
        return kernel

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self.plan.forward(x, kernel)

    def backward(
        self, x: jax.Array, grad: jax.Array, kernel: jax.Array
    ) -> tuple[jax.Array | None, jax.Array]:
        grad = grad.astype(x.dtype)
        grad_x = (
            None if self.few_channels else self.plan.image_gradient(grad, kernel, x.shape).astype(x.dtype)
        )
        return grad_x, self.plan.kernel_gradient(x, grad)

    def finish(self, grad_kernel: jax.Array) -> jax.Array:
        return grad_kernel


def _method(x: jax.Array, weights: jax.Array, pads: Pads) -> _FewChannels | _Tiles | _Windows | None:
    image, kernel = x.shape, weights.shape
    pads = _without_odd_ends(image, kernel, pads)
    if x.dtype == jnp.bfloat16 and window_dot.works_here():
        few_channels = convolution.is_few_channels(kernel)
        return _Windows(window_dot.WindowDot.of(image, kernel, 1, pads), few_channels)
    rows, columns = (
        convolution.output_size(length, side, 1, pad)
        for length, side, pad in zip(image[1:3], kernel[:2], pads, strict=True)
    )
    if convolution.is_few_channels(kernel) and kernel[0] == kernel[1]:
        parts = count_parts(image[0], 2 * 4 * rows * columns * kernel[3])
        return _FewChannels(kernel[0], pads, parts)
    tile = winograd.best_tile(image, kernel, pads)
    return None if tile is None else _Tiles(winograd.Plan.of(image, kernel, pads, tile))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array, pads: Pads) -> jax.Array:
    method = _method(x, kernel, pads)
    assert method is not None
    prepared = method.prepare(kernel)

    def one_part(part: jax.Array) -> jax.Array:
        return jax.nn.relu(pooling.max_pool_2x2(method.forward(part, prepared) + bias)).astype(x.dtype)

    # Without a winner to keep, XLA makes one loop of a first layer by itself.
    return map_parts(one_part, x, 1 if isinstance(method, _FewChannels) else method.parts)


def _forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    method = _method(x, kernel, pads)
    assert method is not None
    prepared = method.prepare(kernel)

    def one_part(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        pooled, winner = pooling.max_and_winner_2x2(method.forward(part, prepared) + bias)
        return jax.nn.relu(pooled).astype(x.dtype), winner

    pooled, winner = map_parts(one_part, x, method.parts)
    return pooled, (x, kernel, pooled, winner)


def _backward(
    pads: Pads, saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel, pooled, winner = saved
    method = _method(x, kernel, pads)
    assert method is not None
    prepared = method.prepare(kernel)
    grad = jnp.where(pooled > 0, grad, 0)

    def one_part(x: jax.Array, winner: jax.Array, grad: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        return method.backward(x, pooling.place_2x2(winner, grad), prepared)

    total = jax.ShapeDtypeStruct(prepared.shape, jnp.float32)
    grad_x, summed = sum_parts(one_part, (x, winner, grad), method.parts, total)
    if grad_x is None:
        _, pull_back = jax.vjp(lambda x: convolution.conv_plain(x, kernel, 1, pads), x)
        grad_x = pull_back(pooling.place_2x2(winner, grad))[0]
    grad_bias = grad.astype(jnp.float32).sum((0, 1, 2))
    return grad_x, method.finish(summed).astype(kernel.dtype), grad_bias


_conv_relu_pool.defvjp(_forward, _backward)


def _padded(x: jax.Array, pads: Pads) -> jax.Array:
    ends = ((before, after, 0) for before, after in pads)
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
