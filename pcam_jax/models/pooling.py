"""Pooling as pure functions of `[B, H, W, C]` arrays.

XLA's CPU backend differentiates a max-pool by carrying an index tensor through a variadic reduce-window and
scattering the gradient back: about forty times slower than what is here. The forms below take strided slices,
keep which tap of the window won as int8, and place the gradient by comparing that index, without a scatter.

A tie goes to the first tap in row-major order, as in PyTorch. NaN counts as larger than every number, so it
is passed on and takes the gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pcam_jax.models.platform import prefers_cpu_formulations


def max_pool(x: jax.Array, window: int, stride: int | None = None, padding: int = 0) -> jax.Array:
    """Maximum over square windows, rows and columns that fill no window dropped.

    Args:
        x: `[B, H, W, C]`, any float dtype.
        window: side of the window in pixels.
        stride: distance between windows; the window's side by default.
        padding: pixels of minus infinity around the image.

    Returns:
        `[B, h, w, C]` of x's dtype, h = (H + 2 * padding - window) // stride + 1.
    """
    stride = window if stride is None else stride
    if prefers_cpu_formulations():
        if (window, stride, padding) == (2, 2, 0):
            return max_pool_2x2(x)
        if (window, stride, padding) == (3, 2, 1):
            return max_pool_3x3(x)
    return max_pool_plain(x, window, stride, padding)


def max_pool_plain(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """`max_pool` as XLA's own reduce-window, the form for accelerators and unusual windows."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), pads)


def _wins(challenger: jax.Array, best: jax.Array) -> jax.Array:
    """Whether a later tap takes the place of the best so far: strictly larger, or the first NaN."""
    return ~(challenger <= best) & (best == best)


def _taps(x: jax.Array, window: int, rows: int, columns: int) -> list[jax.Array]:
    """Every tap of the stride-2 windows as a `[B, rows, columns, C]` slice, in row-major order."""
    batch, _, _, channels = x.shape
    return [
        lax.slice(
            x, (0, i, j, 0), (batch, i + 2 * rows - 1, j + 2 * columns - 1, channels), strides=(1, 2, 2, 1)
        )
        for i in range(window)
        for j in range(window)
    ]


@jax.custom_vjp
def max_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 max-pool of stride 2 without padding: `[B, H, W, C]` -> `[B, H // 2, W // 2, C]`."""
    a, b, c, d = _taps(x, 2, x.shape[1] // 2, x.shape[2] // 2)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def max_and_winner_2x2(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 2x2 max-pool and which tap of each window won, ``[B, H // 2, W // 2, C] int8`` in row-major order."""
    a, b, c, d = _taps(x, 2, x.shape[1] // 2, x.shape[2] // 2)
    top, bottom = jnp.maximum(a, b), jnp.maximum(c, d)
    winner = jnp.where(
        _wins(bottom, top),
        jnp.where(_wins(d, c), 3, 2),
        jnp.where(_wins(b, a), 1, 0),
    ).astype(jnp.int8)
    return jnp.maximum(top, bottom), winner


def place_2x2(winner: jax.Array, grad: jax.Array) -> jax.Array:
    """The gradient of each window at the tap that won, zero elsewhere: ``[B, h, w, C]`` -> ``[B, 2h, 2w, C]``."""
    batch, rows, columns, channels = winner.shape
    tap = jnp.array([[0, 1], [2, 3]], jnp.int8)[None, None, :, None, :, None]
    placed = jnp.where(winner[:, :, None, :, None] == tap, grad[:, :, None, :, None], 0)
    return placed.reshape(batch, 2 * rows, 2 * columns, channels).astype(grad.dtype)


def _max_pool_2x2_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    pooled, winner = max_and_winner_2x2(x)
    # An empty array carries the input's height and width, which are static, to the backward pass.
    return pooled, (winner, jnp.zeros((0, *x.shape[1:3]), jnp.int8))


def _max_pool_2x2_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    winner, size = saved
    placed = place_2x2(winner, grad)
    ends = [(0, wanted - found) for wanted, found in zip(size.shape[1:], placed.shape[1:3], strict=True)]
    return (jnp.pad(placed, ((0, 0), *ends, (0, 0))),)


max_pool_2x2.defvjp(_max_pool_2x2_forward, _max_pool_2x2_backward)


@jax.custom_vjp
def max_pool_3x3(x: jax.Array) -> jax.Array:
    """3x3 max-pool of stride 2, padded by one (a ResNet's stem): `[B, H, W, C]` -> halves, rounded up."""
    taps = _padded_taps(x)
    best = taps[0]
    for tap in taps[1:]:
        best = jnp.maximum(best, tap)
    return best


def _padded_taps(x: jax.Array) -> list[jax.Array]:
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return _taps(padded, 3, (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2)


def _max_pool_3x3_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    taps = _padded_taps(x)
    best, winner = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for index, tap in enumerate(taps[1:], start=1):
        winner = jnp.where(_wins(tap, best), jnp.int8(index), winner)
        best = jnp.maximum(best, tap)
    return best, (winner, jnp.zeros((0, *x.shape[1:3]), jnp.int8))


# Pixel 2u + 0 lies in window u alone (its tap 1); pixel 2u + 1 in window u (tap 2) and window u + 1 (tap 0).
_WINDOWS_OF_PIXEL = {0: ((1, 0),), 1: ((2, 0), (0, 1))}


def _max_pool_3x3_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    winner, size = saved
    height, width = size.shape[1:]
    batch, rows, columns, channels = winner.shape
    after = ((0, 0), (0, 1), (0, 1), (0, 0))
    winner, padded_grad = jnp.pad(winner, after, constant_values=-1), jnp.pad(grad, after)

    def pixel(row: int, column: int) -> jax.Array:
        total = jnp.zeros((batch, rows, columns, channels), grad.dtype)
        for tap_row, down in _WINDOWS_OF_PIXEL[row]:
            for tap_column, right in _WINDOWS_OF_PIXEL[column]:
                window = (slice(None), slice(down, down + rows), slice(right, right + columns))
                total = total + jnp.where(winner[window] == 3 * tap_row + tap_column, padded_grad[window], 0)
        return total

    quads = jnp.stack(
        [jnp.stack([pixel(row, column) for column in (0, 1)], axis=3) for row in (0, 1)], axis=2
    )
    placed = quads.reshape(batch, 2 * rows, 2 * columns, channels)
    return (placed[:, :height, :width].astype(grad.dtype),)


max_pool_3x3.defvjp(_max_pool_3x3_forward, _max_pool_3x3_backward)


def avg_pool(x: jax.Array, window: int, stride: int | None = None) -> jax.Array:
    """Mean over square windows without padding: `[B, H, W, C]` -> `[B, h, w, C]`."""
    stride = window if stride is None else stride
    if (window, stride) == (2, 2):
        taps = _taps(x, 2, x.shape[1] // 2, x.shape[2] // 2)
        return (taps[0] + taps[1] + taps[2] + taps[3]) * jnp.asarray(0.25, x.dtype)
    total = lax.reduce_window(x, 0.0, lax.add, (1, window, window, 1), (1, stride, stride, 1), "VALID")
    return total / window**2
