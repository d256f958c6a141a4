"""bfloat16 convolutions as one gather of windows and one matrix product, for CPUs with bfloat16 matrix units (AMX).

XLA's CPU convolutions run bfloat16 no faster than float32; its matrix products use the matrix units, if the result
is asked for in float32. So the windows of an image become the rows of one matrix (im2col): a gather whose slices are
whole rows of a window forms it at memory speed, as long as XLA does not fuse what follows into the gather; `fenced`
keeps them apart. Products accumulate in float32.

A part of the batch at a time, so that its windows stay in cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pcam_jax.models.batch_parts import count_parts, map_parts, sum_parts
from pcam_jax.models.platform import has_bfloat16_matrix_units, prefers_cpu_formulations

Pads = tuple[tuple[int, int], tuple[int, int]]


def windows(x: jax.Array, side: tuple[int, int], step: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """Every window of a padded image as a row.

    Args:
        x: ``[B, H, W, C]``.
        side: rows and columns of a window.
        step: pixels between windows, down and across.
        size: number of windows, down and across.

    Returns:
        ``[B * size[0] * size[1], side[0], side[1] * C]``.
    """
    batch, height, width, channels = x.shape
    image, row, column = np.meshgrid(
        np.arange(batch) * height,
        np.arange(size[0]) * step[0],
        np.arange(size[1]) * step[1] * channels,
        indexing="ij",
    )
    starts = np.stack([image + row, column], axis=-1).reshape(-1, 2).astype(np.int32)
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1))
    return lax.gather(
        x.reshape(batch * height, width * channels),
        jnp.asarray(starts),
        numbers,
        slice_sizes=(side[0], side[1] * channels),
        mode="promise_in_bounds",
    )


class WindowDot(NamedTuple):
    """One convolution; images and kernels are bfloat16, results float32."""

    size: tuple[int, int]
    """Height and width of the outputs."""
    taps: tuple[int, int]
    stride: int
    pads: Pads
    parts: int
    """Into how many parts the batch is cut."""

    @staticmethod
    def of(image: tuple[int, ...], kernel: tuple[int, ...], stride: int, pads: Pads) -> WindowDot:
        """The plan for images and a kernel of these shapes; a negative pad leaves out pixels at the end."""
        size = tuple(
            (length + sum(pad) - side) // stride + 1
            for length, side, pad in zip(image[1:3], kernel[:2], pads, strict=True)
        )
        bytes_per_image = 2 * size[0] * size[1] * kernel[0] * kernel[1] * max(kernel[2], kernel[3])
        parts = count_parts(image[0], bytes_per_image)
        return WindowDot((size[0], size[1]), (kernel[0], kernel[1]), stride, pads, parts)

    def forward(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Outputs ``[n, h, w, C_out] float32`` of some images."""
        rows = self._rows(_padded(x, self.pads))
        return _dot(rows, kernel.reshape(-1, kernel.shape[-1]), 1, 0).reshape(len(x), *self.size, -1)

    def backward(self, x: jax.Array, grad: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients of some images and of the kernel, both float32."""
        grad = grad.astype(kernel.dtype)
        return self.image_gradient(grad, kernel, x.shape), self.kernel_gradient(x, grad)

    def image_gradient(self, grad: jax.Array, kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Of images of this shape: the gradient, spread out by the stride, convolved with the turned kernel."""
        ends = []
        for axis in (0, 1):
            low = self.taps[axis] - 1 - self.pads[axis][0]
            reach = (self.size[axis] - 1) * self.stride + 1
            ends.append((low, shape[axis + 1] + self.taps[axis] - 1 - low - reach))
        spread = self.stride - 1
        grad = lax.pad(
            grad, jnp.zeros((), grad.dtype), ((0, 0, 0), (0, 0, spread), (0, 0, spread), (0, 0, 0))
        )
        turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
        plan = WindowDot((shape[1], shape[2]), self.taps, 1, (ends[0], ends[1]), 1)
        return plan.forward(grad, turned)

    def kernel_gradient(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        """Of the kernel; no product has a transposed bfloat16 operand, which runs at a tenth of the speed."""
        outputs = grad.shape[-1]
        x = _padded(x, self.pads)
        if self.stride > 1:
            product = product_over_rows(self._rows(x), grad.reshape(-1, outputs))
            return product.reshape(*self.taps, x.shape[-1], outputs)
        # channels first and images last, so that one slice holds a whole shifted map
        batch, height, width, channels = x.shape
        maps = x.transpose(3, 1, 2, 0).reshape(channels, height, width * batch)
        places = [(row, column * batch) for row in range(self.taps[0]) for column in range(self.taps[1])]
        numbers = lax.GatherDimensionNumbers(
            offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(1, 2)
        )

        def shifted(maps: jax.Array) -> jax.Array:
            return lax.gather(
                maps,
                jnp.asarray(np.array(places, np.int32)),
                numbers,
                slice_sizes=(channels, self.size[0], self.size[1] * batch),
                mode="promise_in_bounds",
            )

        tall = fenced(shifted, maps).reshape(len(places) * channels, -1)
        product = _dot(tall, grad.transpose(1, 2, 0, 3).reshape(-1, outputs), 1, 0)
        return product.reshape(*self.taps, channels, outputs)

    def _rows(self, x: jax.Array) -> jax.Array:
        """The windows of a padded image as rows, ``[n * h * w, kh * kw * C]``."""
        step = (self.stride, self.stride)
        gathered = fenced(lambda x: windows(x, self.taps, step, self.size), x)
        return gathered.reshape(len(gathered), -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_window_dot(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """A convolution by windows.

    Args:
        x: ``[B, H, W, C_in]`` bfloat16.
        kernel: ``[kh, kw, C_in, C_out]`` bfloat16.
        stride: distance between output pixels.
        pads: zeros around the image.

    Returns:
        ``[B, h, w, C_out]`` bfloat16.
    """
    plan = WindowDot.of(x.shape, kernel.shape, stride, pads)
    return map_parts(lambda part: plan.forward(part, kernel).astype(x.dtype), x, plan.parts)


def _conv_forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv_window_dot(x, kernel, stride, pads), (x, kernel)


def _conv_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    plan = WindowDot.of(x.shape, kernel.shape, stride, pads)
    like = jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
    _, grad_kernel = sum_parts(
        lambda part, grad: (None, plan.kernel_gradient(part, grad)), (x, grad), plan.parts, like
    )
    # apart, since the first layer's is never asked for
    grad_x = map_parts(
        lambda grad: plan.image_gradient(grad, kernel, x.shape).astype(x.dtype), grad, plan.parts
    )
    return grad_x, grad_kernel.astype(kernel.dtype)


conv_window_dot.defvjp(_conv_forward, _conv_backward)


@functools.cache
def works_here() -> bool:
    """Whether this machine has the units, and this version of XLA runs and differentiates the form rightly."""
    if not has_bfloat16_matrix_units():
        return False
    return probe()


def describe_precision(precision: str) -> str:
    """What ``train.precision`` comes to on this machine, in words."""
    if precision != "bfloat16" or not prefers_cpu_formulations():
        return precision
    if works_here():
        return "bfloat16 on the CPU's matrix units"
    return "bfloat16 (convolutions in float32: no matrix units that XLA can use here)"


def probe() -> bool:
    """Run the form and its gradients once, and compare them with float32's."""
    rng = np.random.default_rng(0)
    # small integers, so that bfloat16 holds every product and sum of the comparison
    x, kernel = rng.integers(-2, 3, (2, 9, 9, 16)), rng.integers(-2, 3, (3, 3, 16, 16))

    def value_and_gradients(convolve: Callable[..., jax.Array], dtype: jnp.dtype) -> list[np.ndarray]:
        def total(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return convolve(x, kernel).astype(jnp.float32).sum()

        given = (jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
        return [np.asarray(a, np.float32) for a in jax.jit(jax.grad(total, (0, 1)))(*given)]

    pads = ((1, 1), (1, 1))
    try:
        with jax.ensure_compile_time_eval():
            found = value_and_gradients(lambda x, k: conv_window_dot(x, k, 1, pads), jnp.dtype("bfloat16"))
            exact = value_and_gradients(
                lambda x, k: lax.conv_general_dilated(
                    x, k, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
                ),
                jnp.dtype("float32"),
            )
    except Exception:  # a product that the backend refuses fails only when it runs
        return False
    return all(np.allclose(a, b, rtol=2e-2, atol=1e-3) for a, b in zip(found, exact, strict=True))


def product_over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a.T @ b`` in float32 for bfloat16 ``[P, M]`` and ``[P, N]``.

    The fence keeps XLA from folding the transpose into the product, a form that runs at a tenth of the speed and
    that some versions refuse.
    """
    return _dot(fenced(lambda a: a.T, a), b, 1, 0)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _padded(x: jax.Array, pads: Pads) -> jax.Array:
    ends = ((before, after, 0) for before, after in pads)
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))


def fenced(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``function(x)`` as a buffer of its own: XLA fuses through an optimization barrier on CPU, not through a branch.

    The branch not taken needs a condition that XLA cannot know: one bit pattern of a NaN, which gives NaN.
    """
    first = x[(0,) * x.ndim].astype(jnp.bfloat16)
    usual = lax.bitcast_convert_type(first, jnp.uint16) != jnp.uint16(0x7FFF)
    shape = jax.eval_shape(function, x)
    return lax.cond(usual, function, lambda x: jnp.full(shape.shape, jnp.nan, shape.dtype), x)
