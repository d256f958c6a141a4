"""Convolutions as pure functions of ``[B, H, W, C]`` images and ``[kh, kw, C_in, C_out]`` kernels.

On accelerators `conv2d` is XLA's own convolution. XLA's CPU backend runs some convolutions far below the machine's
peak; there `conv2d` chooses among the forms below, which compute the same sums in another way.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pcam_jax.models import shares, window_dot, winograd
from pcam_jax.models.platform import prefers_cpu_formulations

Padding = Literal["valid", "same"] | int
Pads = tuple[tuple[int, int], tuple[int, int]]

_NO_PADS: Pads = ((0, 0), (0, 0))
# Images have three channels; up to so many kernel taps, one fused loop over them beats the matrix product that a
# convolution becomes, whose depth of 27 or 75 is too small to fill the vector units.
_MOST_FEW_CHANNELS, _MOST_TAPS = 4, 80


def resolve_padding(padding: Padding, size: tuple[int, int], kernel: tuple[int, int], stride: int) -> Pads:
    """Pixels of zeros ((top, bottom), (left, right)) for a padding rule.

    Args:
        padding: "valid" (none), "same" (output = ceil(input / stride), the odd pixel at the end, as in
            Keras) or a number of pixels on every side (as in PyTorch; for a stride above 1 this differs from
            "same").
        size: height and width of the image.
        kernel: height and width of the kernel.
        stride: distance between output pixels.
    """
    if padding == "valid":
        return _NO_PADS
    if padding == "same":
        totals = [
            max((-(-length // stride) - 1) * stride + side - length, 0)
            for length, side in zip(size, kernel, strict=True)
        ]
        (top, left) = (total // 2 for total in totals)
        return (top, totals[0] - top), (left, totals[1] - left)
    return (padding, padding), (padding, padding)


def output_size(length: int, kernel: int, stride: int, pads: tuple[int, int] = (0, 0)) -> int:
    """Number of windows along one side; zero or less where none fits."""
    return (length + sum(pads) - kernel) // stride + 1


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = "valid", groups: int = 1
) -> jax.Array:
    """Cross-correlation of images with a kernel.

    Args:
        x: ``[B, H, W, C_in]``.
        kernel: ``[kh, kw, C_in / groups, C_out]``, of x's dtype.
        stride: distance between output pixels.
        padding: see `resolve_padding`.
        groups: 1, or C_in for a depthwise convolution.

    Returns:
        ``[B, h, w, C_out]`` of x's dtype.
    """
    side = kernel.shape[:2]
    pads = resolve_padding(padding, (x.shape[1], x.shape[2]), (side[0], side[1]), stride)
    if not prefers_cpu_formulations():
        return conv_plain(x, kernel, stride, pads, groups)
    if groups > 1:
        if groups == x.shape[-1] == kernel.shape[-1]:
            return depthwise_as_sum(x, kernel, stride, pads)
        return conv_plain(x, kernel, stride, pads, groups)
    if x.dtype == jnp.bfloat16 and window_dot.works_here():
        return _conv2d_by_windows(x, kernel, stride, pads)
    dtype = arithmetic_dtype(x.dtype, kernel.shape)
    return conv2d_on_cpu(x.astype(dtype), kernel.astype(dtype), stride, pads).astype(x.dtype)


def arithmetic_dtype(dtype: DTypeLike, kernel: tuple[int, ...]) -> DTypeLike:
    """What a convolution with a kernel of this shape is computed in here where ``dtype`` is asked for.

    On a CPU without matrix units only plain products are faster in bfloat16; the other forms are not, and want
    float32's digits. A layer that hands on float32 saves a rounding on either side.
    """
    without_units = prefers_cpu_formulations() and not window_dot.works_here()
    return jnp.float32 if without_units and kernel[:2] != (1, 1) else dtype


def conv2d_on_cpu(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """`conv2d` without groups, in the form that a CPU runs fastest."""
    height, width = kernel.shape[:2]
    if (height, width) == (1, 1):
        return conv_as_dot(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, stride)
    few = kernel.shape[2] <= _MOST_FEW_CHANNELS
    if few and stride > 1 and height % stride == width % stride == 0:
        return over_blocks(x, kernel, stride, pads)
    if is_few_channels(kernel.shape):
        return conv_few_channels(x, kernel, stride, pads)
    if stride > 1:
        return conv_strided(x, kernel, stride, pads)
    tile = winograd.best_tile(x.shape, kernel.shape, pads)
    if tile is not None:
        return winograd.conv_winograd(x, kernel, pads, tile)
    return conv_plain(x, kernel, stride, pads)


def _conv2d_by_windows(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    height, width = kernel.shape[:2]
    if (height, width) == (1, 1):
        return conv_as_dot(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, stride)
    if stride > 1 and height % stride == width % stride == 0:
        size = [output_size(x.shape[axis + 1], kernel.shape[axis], stride, pads[axis]) for axis in (0, 1)]
        wanted = [length + side // stride - 1 for length, side in zip(size, (height, width), strict=True)]
        x, kernel = image_blocks(x, stride, wanted, pads), kernel_blocks(kernel, stride)
        return window_dot.conv_window_dot(x, kernel, 1, _NO_PADS)
    return window_dot.conv_window_dot(x, kernel, stride, pads)


def is_few_channels(kernel: tuple[int, ...]) -> bool:
    """Whether a kernel of this shape is small enough for `conv_few_channels`."""
    height, width, inputs, _ = kernel
    return inputs <= _MOST_FEW_CHANNELS and height * width * inputs <= _MOST_TAPS


def conv_plain(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, groups: int = 1) -> jax.Array:
    """`conv2d` as XLA's own convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def conv_as_dot(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 1x1 convolution as one matrix product."""
    if stride > 1:
        x = lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))
    batch, rows, columns, channels = x.shape
    return pixel_dot(x.reshape(-1, channels), kernel[0, 0]).reshape(batch, rows, columns, -1)


@jax.custom_vjp
def pixel_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel`` for many pixels ``[P, C_in]`` and a kernel ``[C_in, C_out]``; bfloat16 adds up in float32."""
    return _dot(x, kernel, 1, 0).astype(x.dtype)


def _dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    # The CPU's bfloat16 instructions accumulate in float32; asking for a bfloat16 result goes without them.
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _pixel_dot_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return pixel_dot(x, kernel), (x, kernel)


def _pixel_dot_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    grad_x = _dot(grad, kernel, 1, 1).astype(x.dtype)
    if x.dtype == jnp.bfloat16 and window_dot.works_here():
        return grad_x, window_dot.product_over_rows(x, grad).astype(kernel.dtype)
    # Without matrix units, products over pixels are no faster in bfloat16.
    tall, wide = x.astype(jnp.float32), grad.astype(jnp.float32)
    if kernel.shape[0] <= kernel.shape[1]:
        return grad_x, _dot(tall, wide, 0, 0).astype(kernel.dtype)
    # They run half as fast where the result is taller than wide. The barrier keeps XLA from folding the transpose
    # back into the product.
    grad_kernel = lax.optimization_barrier(_dot(wide, tall, 0, 0)).T
    return grad_x, grad_kernel.astype(kernel.dtype)


pixel_dot.defvjp(_pixel_dot_forward, _pixel_dot_backward)


def over_blocks(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """A convolution whose stride divides its kernel, as one of stride 1 over blocks of ``stride * stride`` pixels.

    An image of few channels gains by it.
    """
    size = [output_size(x.shape[axis + 1], kernel.shape[axis], stride, pads[axis]) for axis in (0, 1)]
    blocks = [side // stride for side in kernel.shape[:2]]
    kernel = kernel_blocks(kernel, stride)
    wanted = [length + side - 1 for length, side in zip(size, blocks, strict=True)]
    shape = (x.shape[0], *wanted, kernel.shape[2])
    tile = winograd.best_tile(shape, kernel.shape, _NO_PADS)
    if tile is None:
        return conv_plain(image_blocks(x, stride, wanted, pads), kernel, 1, _NO_PADS)
    # Whole tiles are cut from the padding that is added here anyway.
    whole = [-(-length // tile) * tile + side - 1 for length, side in zip(size, blocks, strict=True)]
    x = image_blocks(x, stride, whole, pads)
    return winograd.conv_winograd(x, kernel, ((0, wanted[0] - whole[0]), (0, wanted[1] - whole[1])), tile)


def image_blocks(x: jax.Array, stride: int, size: list[int], pads: Pads) -> jax.Array:
    """Space to depth: ``[B, H, W, C]``, zeros before as in pads, -> ``[B, *size, s * s * C]``."""
    batch, height, width, channels = x.shape
    ends = [
        (before, blocks * stride - length - before, 0)
        for (before, _), blocks, length in zip(pads, size, (height, width), strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    x = x.reshape(batch, size[0], stride, size[1], stride * channels)
    return jnp.concatenate([x[:, :, row] for row in range(stride)], axis=-1)


def kernel_blocks(kernel: jax.Array, stride: int) -> jax.Array:
    """``[s * kh, s * kw, C_in, C_out]`` -> ``[kh, kw, s * s * C_in, C_out]``."""
    height, width, inputs, outputs = kernel.shape
    kernel = kernel.reshape(height // stride, stride, width // stride, stride, inputs, outputs)
    return kernel.transpose(0, 2, 1, 3, 4, 5).reshape(
        height // stride, width // stride, stride * stride * inputs, outputs
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_few_channels(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """A convolution of images with few channels, as one loop that adds up kernel taps times shifted pixels.

    XLA fuses what follows (bias, activation, pooling) into the same loop.
    """
    height, width, channels, _ = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    batch, rows, columns = (
        x.shape[0],
        *(
            output_size(length, side, stride)
            for length, side in zip(x.shape[1:3], (height, width), strict=True)
        ),
    )
    terms = []
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                ends = (batch, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, c + 1)
                terms.append(lax.slice(x, (0, i, j, c), ends, (1, stride, stride, 1)) * kernel[i, j, c])
    return functools.reduce(jnp.add, terms)


def _few_channels_forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # In training several later steps need the map. A loop over the images makes XLA store it, where otherwise it
    # would be computed anew inside each of them.
    if x.shape[0] == 1 or shares.are_split():
        return conv_few_channels(x, kernel, stride, pads), (x, kernel)
    y = lax.map(lambda image: conv_few_channels(image[None], kernel, stride, pads)[0], x)
    return y, (x, kernel)


def _few_channels_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The gradients of that loop would be slow; XLA's own are not.
    _, pull_back = jax.vjp(lambda x, kernel: conv_plain(x, kernel, stride, pads), *saved)
    return pull_back(grad)


conv_few_channels.defvjp(_few_channels_forward, _few_channels_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_strided(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """`conv_plain` with gradients that a CPU computes faster.

    XLA's own of x puts stride - 1 zeros between the pixels of the upstream gradient. Here each of the stride * stride
    phases of the image gets a small convolution of its own.
    """
    return conv_plain(x, kernel, stride, pads)


def _strided_forward(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv_plain(x, kernel, stride, pads), (x, kernel)


def _strided_backward(
    stride: int, pads: Pads, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    grad_kernel = _strided_kernel_gradient(x, kernel, grad, stride, pads)
    batch, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    phases = jnp.stack(
        [
            jnp.stack(
                [
                    _phase(grad, kernel, (row, column), (rows, columns), stride, pads)
                    for column in range(stride)
                ],
                axis=3,
            )
            for row in range(stride)
        ],
        axis=2,
    )
    grad_x = phases.reshape(batch, rows * stride, columns * stride, channels)[:, :height, :width]
    return grad_x, grad_kernel


def _strided_kernel_gradient(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, stride: int, pads: Pads
) -> jax.Array:
    # XLA transposes both maps for this, and would compute anew, in that order, all that made them.
    if not shares.are_split():
        x, grad = (window_dot.fenced(lambda a: a, a) for a in (x, grad))
    _, pull_back = jax.vjp(lambda kernel: conv_plain(x, kernel, stride, pads), kernel)
    return pull_back(grad)[0]


conv_strided.defvjp(_strided_forward, _strided_backward)


def _phase(
    grad: jax.Array,
    kernel: jax.Array,
    place: tuple[int, int],
    size: tuple[int, int],
    stride: int,
    pads: Pads,
) -> jax.Array:
    """Gradient of the pixels (stride * u + row, stride * v + column), ``[B, *size, C_in]``.

    Pixel h meets output o by tap i = h + top - stride * o, so only every stride-th tap takes part.
    """
    first = [(offset + before) % stride for offset, (before, _) in zip(place, pads, strict=True)]
    taps = kernel[first[0] :: stride, first[1] :: stride]
    if 0 in taps.shape:
        return jnp.zeros((grad.shape[0], *size, kernel.shape[2]), grad.dtype)
    ends = []
    for axis in (0, 1):
        ahead = (place[axis] + pads[axis][0] - first[axis]) // stride
        low = taps.shape[axis] - 1 - ahead
        ends.append((low, size[axis] + taps.shape[axis] - 1 - low - grad.shape[axis + 1], 0))
    padded = lax.pad(grad, jnp.zeros((), grad.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    return conv2d_on_cpu(padded, jnp.flip(taps, (0, 1)).transpose(0, 1, 3, 2), 1, _NO_PADS)


def depthwise_as_sum(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """A depthwise convolution as shifted multiply-adds; XLA's grouped one is far slower on CPU."""
    height, width = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    batch, _, _, channels = x.shape
    rows, columns = output_size(x.shape[1], height, stride), output_size(x.shape[2], width, stride)
    total = jnp.zeros((batch, rows, columns, channels), x.dtype)
    for i in range(height):
        for j in range(width):
            ends = (batch, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels)
            total = total + lax.slice(x, (0, i, j, 0), ends, (1, stride, stride, 1)) * kernel[i, j, 0]
    return total
