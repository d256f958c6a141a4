"""Stride-1 convolutions with fewer multiplications (Winograd 1980; Lavin & Gray 2015, arXiv:1509.09308), for CPU.

An m x m tile of outputs of an r x r kernel is computed from n x n products per pair of channels, n = m + r - 1, where
the definition needs m * m * r * r: for m = 4, 36 instead of 144 (r = 3) and 64 instead of 400 (r = 5). The products
are n * n matrix products over tiles and channels, which run near the peak; the transforms around them are sums of
slices. The gradients reuse the same transforms, transposed.

Rounding errors are some five times those of the direct sum: 1e-6 to 4e-6 of the result's norm in float32. A value
that is not finite spreads over its tile of outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pcam_jax.models.batch_parts import count_parts, map_parts, sum_parts

# Interpolation points in the order they are taken; infinity is the last point of every set.
_POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))
_TILES = (2, 3, 4)
# Costs in multiplications of the direct convolution, fitted to measurements: one element through a transform of
# images, one through a transform of kernels; and what must be gained before the rounding is worth it.
_IMAGE_TRANSFORM, _KERNEL_TRANSFORM, _WORTHWHILE = 27.0, 60.0, 0.85

Pads = tuple[tuple[int, int], tuple[int, int]]


class Transforms(NamedTuple):
    """Matrices of one-dimensional filtering: y = output^T ((kernel @ g) * (image @ d)) for n inputs d, r taps g."""

    output: np.ndarray
    """``[n, m]``"""
    kernel: np.ndarray
    """``[n, r]``"""
    image: np.ndarray
    """``[n, n]``"""


@functools.cache
def transforms(tile: int, taps: int) -> Transforms:
    """Toom-Cook matrices of m = ``tile`` outputs of a filter of r = ``taps``, from exact fractions."""
    points = [Fraction(p) for p in _POINTS[: tile + taps - 2]]
    size = len(points) + 1
    output = [[p**power for power in range(tile)] for p in points] + [
        [Fraction(0)] * (tile - 1) + [Fraction(1)]
    ]
    kernel, image = [], []
    for p in points:
        others = [q for q in points if q != p]
        norm = math.prod((p - q for q in others), start=Fraction(1))
        kernel.append([p**power / norm for power in range(taps)])
        image.append([*_polynomial(others), Fraction(0)])
    kernel.append([Fraction(0)] * (taps - 1) + [Fraction(1)])
    image.append(_polynomial(points))
    assert len(image) == size
    return Transforms(*(np.array(rows, np.float64) for rows in (output, kernel, image)))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the monic polynomial with these roots, lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def best_tile(image: tuple[int, ...], kernel: tuple[int, ...], pads: Pads) -> int | None:
    """The tile side m that makes a convolution cheapest, or None where the direct form is about as good.

    Args:
        image: shape ``[B, H, W, C_in]``.
        kernel: shape ``[r, r, C_in, C_out]``.
        pads: zeros around the image.
    """
    batch, height, width, inputs = image
    taps, columns, _, outputs = kernel
    if taps != columns or not 2 <= taps <= 7 or min(inputs, outputs) < 16:
        return None
    rows, columns = height + sum(pads[0]) - taps + 1, width + sum(pads[1]) - taps + 1
    best, lowest = None, _WORTHWHILE * batch * rows * columns * taps * taps * inputs * outputs
    for tile in _TILES:
        if tile + taps - 2 > len(_POINTS):
            continue
        products = (tile + taps - 1) ** 2
        tiles = batch * -(-rows // tile) * -(-columns // tile)
        cost = products * (
            tiles * inputs * outputs
            + _IMAGE_TRANSFORM * tiles * (inputs + outputs)
            + _KERNEL_TRANSFORM * inputs * outputs
        )
        if cost < lowest:
            best, lowest = tile, cost
    return best


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_winograd(x: jax.Array, kernel: jax.Array, pads: Pads, tile: int) -> jax.Array:
    """A stride-1 convolution by tiles.

    Args:
        x: ``[B, H, W, C_in]`` float32.
        kernel: ``[r, r, C_in, C_out]`` float32.
        pads: zeros around the image.
        tile: side m of the output tiles; m + r <= 9.

    Returns:
        ``[B, h, w, C_out]``.
    """
    plan = Plan.of(x.shape, kernel.shape, pads, tile)
    products = plan.transform_kernel(kernel)
    return map_parts(lambda part: plan.forward(part, products), x, plan.parts)


def _conv_forward(
    x: jax.Array, kernel: jax.Array, pads: Pads, tile: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv_winograd(x, kernel, pads, tile), (x, kernel)


def _conv_backward(
    pads: Pads, tile: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    plan = Plan.of(x.shape, kernel.shape, pads, tile)
    products = plan.transform_kernel(kernel)
    grad_x, grad_products = sum_parts(
        lambda part, grad: plan.backward(part, grad, products), (x, grad), plan.parts, products
    )
    return grad_x, plan.transform_kernel_transposed(grad_products)


conv_winograd.defvjp(_conv_forward, _conv_backward)


class Plan(NamedTuple):
    """The shapes of one convolution; V, U and M are the transformed images, kernels and outputs of the paper.

    A negative pad leaves out the last row or column of the image.
    """

    batch: int
    size: tuple[int, int]
    pads: Pads
    taps: int
    inputs: int
    outputs: int
    tile: int
    tiles: tuple[int, int]
    parts: int

    @staticmethod
    def of(image: tuple[int, ...], kernel: tuple[int, ...], pads: Pads, tile: int) -> Plan:
        """The plan for images and a kernel of these shapes."""
        batch, height, width, inputs = image
        taps, _, _, outputs = kernel
        rows, columns = height + sum(pads[0]) - taps + 1, width + sum(pads[1]) - taps + 1
        tiles = (-(-rows // tile), -(-columns // tile))
        bytes_per_image = 4 * (tile + taps - 1) ** 2 * tiles[0] * tiles[1] * (inputs + outputs)
        parts = count_parts(batch, bytes_per_image, math.prod(tiles))
        return Plan(batch, (height, width), pads, taps, inputs, outputs, tile, tiles, parts)

    @property
    def window(self) -> int:
        """Side n of the input windows."""
        return self.tile + self.taps - 1

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the outputs."""
        (top, bottom), (left, right) = self.pads
        return (
            self.size[0] + top + bottom - self.taps + 1,
            self.size[1] + left + right - self.taps + 1,
        )

    def forward(self, x: jax.Array, products: jax.Array) -> jax.Array:
        """Outputs of some images."""
        matrices, side, (down, across) = transforms(self.tile, self.taps), self.window, self.tiles
        m = _batched_dot(self.transform_image(x), products, 2, 1)
        m = m.reshape(side, side, x.shape[0], down, across, self.outputs)
        rows, columns = self.output_size
        columns_done = jnp.stack(_mix(matrices.output.T, list(m)), axis=4)
        y = jnp.stack(_mix(matrices.output.T, list(columns_done)), axis=2)
        y = y.reshape(x.shape[0], down * self.tile, across * self.tile, self.outputs)
        return y[:, :rows, :columns]

    def backward(self, x: jax.Array, grad: jax.Array, products: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients of some images and of the transformed kernels."""
        matrices, side, (down, across) = transforms(self.tile, self.taps), self.window, self.tiles
        rows, columns = self.output_size
        grad = jnp.pad(
            grad, ((0, 0), (0, down * self.tile - rows), (0, across * self.tile - columns), (0, 0))
        )
        grad_m = _tiles(grad, matrices.output, self.tile, self.tiles).reshape(side * side, -1, self.outputs)
        grad_products = _batched_dot(self.transform_image(x), grad_m, 1, 1)
        grad_v = _batched_dot(grad_m, products, 2, 2)
        grad_v = grad_v.reshape(side, side, x.shape[0], down, across, self.inputs)
        columns_done = jnp.stack(self._overlap(matrices.image.T, list(grad_v), axis=3), axis=4)
        grad_x = jnp.stack(self._overlap(matrices.image.T, list(columns_done), axis=1), axis=2)
        size = ((down + self._reach) * self.tile, (across + self._reach) * self.tile)
        grad_x = grad_x.reshape(x.shape[0], *size, self.inputs)
        ends = [
            (-before, before + here - there, 0)
            for (before, _), here, there in zip(self.pads, self.size, size, strict=True)
        ]
        return lax.pad(grad_x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0))), grad_products

    def _overlap(self, matrix: np.ndarray, parts: list[jax.Array], axis: int) -> list[jax.Array]:
        """Transposed windows: the n positions of a tile lie in it and in the next ones; all are added up."""
        mixed = _mix(matrix, parts)
        reach = self._reach

        def shifted(place: int, tiles_on: int) -> jax.Array:
            widths = [(0, 0)] * parts[0].ndim
            widths[axis] = (tiles_on, reach - tiles_on)
            return jnp.pad(mixed[place + tiles_on * self.tile], widths)

        return [
            functools.reduce(
                jnp.add,
                [shifted(place, on) for on in range(reach + 1) if place + on * self.tile < self.window],
            )
            for place in range(self.tile)
        ]

    @property
    def _reach(self) -> int:
        """How many tiles beyond its own a window touches."""
        return (self.window - 1) // self.tile

    def transform_image(self, x: jax.Array) -> jax.Array:
        """V: ``[B, H, W, C_in]`` -> ``[n * n, B * tiles, C_in]``."""
        (down, across), (top, _), (left, _) = self.tiles, *self.pads
        overlap = self.taps - 1
        x = jnp.pad(
            x[:, : down * self.tile + overlap - top, : across * self.tile + overlap - left],
            (
                (0, 0),
                (top, max(0, down * self.tile + overlap - top - self.size[0])),
                (left, max(0, across * self.tile + overlap - left - self.size[1])),
                (0, 0),
            ),
        )
        matrix = transforms(self.tile, self.taps).image
        return _tiles(x, matrix, self.tile, self.tiles).reshape(self.window**2, -1, self.inputs)

    def transform_kernel(self, kernel: jax.Array) -> jax.Array:
        """U: ``[r, r, C_in, C_out]`` -> ``[n * n, C_in, C_out]``."""
        flat = kernel.reshape(self.taps**2, -1)
        return (self._kernel_matrix() @ flat).reshape(-1, self.inputs, self.outputs)

    def transform_kernel_transposed(self, grad_products: jax.Array) -> jax.Array:
        """The kernel's gradient from that of U."""
        flat = self._kernel_matrix().T @ grad_products.reshape(self.window**2, -1)
        return flat.reshape(self.taps, self.taps, self.inputs, self.outputs)

    def _kernel_matrix(self) -> jax.Array:
        """Both axes at once: ``[n * n, r * r]``, columns of the window before its rows as in `_tiles`."""
        matrix = transforms(self.tile, self.taps).kernel
        both = np.einsum("ai,bj->baij", matrix, matrix)
        return jnp.asarray(both.reshape(self.window**2, self.taps**2), jnp.float32)


def _tiles(x: jax.Array, matrix: np.ndarray, tile: int, tiles: tuple[int, int]) -> jax.Array:
    """Windows of every tile, transformed along both axes: ``[B, ...]`` -> ``[n (W), n (H), B, rows, columns, C]``."""
    rows = [_every(x, 1, start, tiles[0], tile) for start in range(matrix.shape[1])]
    mixed = jnp.stack(_mix(matrix, rows))
    columns = [_every(mixed, 3, start, tiles[1], tile) for start in range(matrix.shape[1])]
    return jnp.stack(_mix(matrix, columns))


def _every(x: jax.Array, axis: int, start: int, count: int, step: int) -> jax.Array:
    return lax.slice_in_dim(x, start, start + (count - 1) * step + 1, step, axis)


def _mix(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Sums of the parts weighted by each row of the matrix, zeros left out."""
    mixed = []
    for row in matrix:
        terms = [
            part if weight == 1 else part * np.float32(weight)
            for weight, part in zip(row, parts, strict=True)
            if weight
        ]
        mixed.append(functools.reduce(jnp.add, terms))
    return mixed


def _batched_dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0,), (0,))))
