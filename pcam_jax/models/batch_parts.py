"""Loops over parts of a batch, so that the intermediate values of one part stay in cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pcam_jax.models import shares

# What a part may take of the last level, which the cores share.
_CACHE_BYTES = 6 * 2**20
# Fewer rows than this make slow matrix products, as the transformed kernel is laid out anew for each part.
_FEWEST_ROWS = 256


def count_parts(batch: int, bytes_per_image: int, rows_per_image: int = _FEWEST_ROWS) -> int:
    """Into how many parts a batch is cut so that the intermediate values of one stay in cache.

    Args:
        batch: number of images.
        bytes_per_image: size of the intermediate values.
        rows_per_image: of the matrix products that a part becomes; one part has enough of them.
    """
    # A loop over a batch that several devices share would move it between them.
    if shares.are_split():
        return 1
    most = max(1, _CACHE_BYTES // bytes_per_image, -(-_FEWEST_ROWS // rows_per_image))
    return batch // max(size for size in range(1, min(most, batch) + 1) if batch % size == 0)


def map_parts(function: Callable[..., Any], arrays: Any, parts: int) -> Any:
    """Apply a function of some images (a tree of arrays, batch first) to one part of the batch after another."""
    if parts == 1:
        return function(arrays)
    return jax.tree.map(_joined, lax.map(function, jax.tree.map(lambda a: _cut(a, parts), arrays)))


def sum_parts(
    function: Callable[..., tuple[Any, jax.Array]],
    arrays: tuple[jax.Array, ...],
    parts: int,
    like: jax.Array | jax.ShapeDtypeStruct,
) -> tuple[Any, jax.Array]:
    """`map_parts` for a function that also returns an array shaped as `like`, which is summed over the parts."""
    if parts == 1:
        return function(*arrays)

    def one_part(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        mapped, summand = function(*part)
        return total + summand, mapped

    cut = tuple(_cut(a, parts) for a in arrays)
    total, mapped = lax.scan(one_part, jnp.zeros(like.shape, like.dtype), cut)
    return jax.tree.map(_joined, mapped), total


def _cut(a: jax.Array, parts: int) -> jax.Array:
    return a.reshape(parts, a.shape[0] // parts, *a.shape[1:])


def _joined(a: jax.Array) -> jax.Array:
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])
