"""Layers that are equivariant to quarter turns (p4) and to mirror images too (p4m).

T. Cohen & M. Welling, "Group equivariant convolutional networks", ICML 2016, arXiv:1602.07576.

Maps are `[B, H, W, G * C]`: for each element of the group (4 in p4, 8 in p4m) one response of each of C
features, the element slowest. Turning or mirroring the input turns or mirrors every response and permutes the
elements, nothing else; after pooling over the group, maps move exactly as the input does and logits stay. A
group convolution is one ordinary convolution whose kernel holds the parameter in all its orientations.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from pcam_jax.models.convolution import Padding
from pcam_jax.models.initializers import he_normal
from pcam_jax.models.layers import BatchNorm, Conv, recorded
from pcam_jax.runtime.errors import UserError

Group = Literal["p4", "p4m"]
GROUP_SIZE: dict[Group, int] = {"p4": 4, "p4m": 8}


def act(array: np.ndarray, element: int) -> np.ndarray:
    """Let a group element act on the first two axes: mirror if it is 4 or more, then turn `element % 4` times."""
    return np.rot90(array[:, ::-1] if element >= 4 else array, element % 4)


def compose(first: int, second: int) -> int:
    """The element that acts as `first` after `second`."""
    turns = first % 4 + (-(second % 4) if first >= 4 else second % 4)
    return turns % 4 + 4 * ((first >= 4) != (second >= 4))


def inverse(element: int) -> int:
    """The element that undoes this one; a mirror image undoes itself."""
    return element if element >= 4 else -element % 4


@functools.cache
def orientation_table(kernel_size: int, elements: int, lifting: bool) -> np.ndarray:
    """Which tap of the parameter each tap of the full kernel is.

    Args:
        kernel_size: side k of the kernel.
        elements: size G of the group.
        lifting: whether the input is an image (one plane) rather than a map over the group.

    Returns:
        [G, k * k * planes] int, planes being 1 or G: for output element g, the flat indices into the
        parameter's (row, column, plane) axes. In Cohen & Welling's notation, psi(g^-1 x, g^-1 h) for all (x, h).
    """
    planes = 1 if lifting else elements
    taps = np.arange(kernel_size * kernel_size * planes).reshape(kernel_size, kernel_size, planes)
    rows = []
    for g in range(elements):
        seen = [0] if lifting else [compose(inverse(g), h) for h in range(elements)]
        rows.append(act(taps[:, :, seen], g).reshape(-1))
    return np.stack(rows)


class GroupConv(Conv):
    """Group convolution: `[B, H, W, 3]` (lifting) or `[B, H, W, G * C_in]` -> `[B, h, w, G * C_out]`.

    Args:
        group: "p4" or "p4m".
        in_features: C_in for each group element, or the channels of the image.
        out_features: C_out for each group element.
        kernel_size: side of the square kernel; odd for padding "same".
        lifting: whether the input is an image.
        stride: distance between output pixels; 2 keeps the symmetry where kernel and image have even sides.
        padding: see `Conv`; only zeros put evenly on all sides keep the symmetry, as here.
        dtype: dtype of the arithmetic and the result.
    """

    def __init__(
        self,
        group: Group,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        lifting: bool = False,
        stride: int = 1,
        padding: Padding = "valid",
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        elements = GROUP_SIZE[group]
        super().__init__(
            in_features if lifting else elements * in_features,
            out_features,
            kernel_size,
            stride=stride,
            padding=padding,
            use_bias=False,  # batch normalisation follows everywhere
            kernel_init=he_normal,
            dtype=dtype,
        )
        self.elements, self.lifting = elements, lifting

    def effective_kernel(self) -> jax.Array:
        """The parameter in all orientations: `[k, k, planes * C_in, G * C_out]`."""
        height, width, channels, out_features = self.kernel[...].shape
        table = orientation_table(height, self.elements, self.lifting)
        taps = table.shape[1]
        features = channels * height * width // taps
        # A product with a 0/1 matrix copies taps exactly, and its gradient needs no scatter.
        copies = (table.reshape(-1, 1) == np.arange(taps)).astype(np.float32)
        flat = self.kernel[...].reshape(taps, features * out_features)
        full = jnp.matmul(copies, flat, precision=jax.lax.Precision.HIGHEST)
        full = full.reshape(self.elements, taps * features, out_features).swapaxes(0, 1)
        return full.reshape(height, width, channels, self.elements * out_features)


class GroupBatchNorm(BatchNorm):
    """Batch normalisation of `[B, H, W, G * C]` whose statistics and scales all elements of the group share."""

    def __init__(self, group: Group, features: int, **options: Any) -> None:
        super().__init__(features, **options)
        self.elements = GROUP_SIZE[group]

    def _shared(self, moment: jax.Array) -> jax.Array:
        return moment.reshape(self.elements, -1).mean(0)

    def _spread(self, factor: jax.Array) -> jax.Array:
        return jnp.tile(factor, self.elements)


class GroupPool(nnx.Module):
    """Mean over the group: `[B, H, W, G * C]` -> `[B, H, W, C]`, which turns and mirrors with the input."""

    def __init__(self, group: Group) -> None:
        self.elements = GROUP_SIZE[group]

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Average the responses of all elements."""
        return x.reshape(*x.shape[:3], self.elements, -1).astype(jnp.float32).mean(3).astype(x.dtype)


class SymmetricPool(nnx.Module):
    """Halve both sides by averaging: 2 pixels on an even side, 3 overlapping by one on an odd one.

    A 2x2 pool would drop the last line of an odd side, and with it the symmetry.
    """

    @recorded
    def __call__(self, x: jax.Array) -> jax.Array:
        """Pool `[B, H, W, C]` to `[B, H // 2, W // 2, C]`.

        Raises:
            UserError: a side is one pixel.
        """
        if min(x.shape[1:3]) < 2:
            raise UserError(
                f"The net is too deep for its image: a {x.shape[1]}x{x.shape[2]} map cannot be halved; use "
                "larger images or fewer blocks."
            )
        return _halve(_halve(x, 1), 2)


def _halve(x: jax.Array, axis: int) -> jax.Array:
    length = x.shape[axis]
    window = 3 if length % 2 else 2
    lines = [jax.lax.slice_in_dim(x, start, length - window + start + 1, 2, axis) for start in range(window)]
    return sum(lines[1:], start=lines[0]) / window
