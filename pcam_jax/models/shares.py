"""Batches shared by several devices: each computes its own share apart, and what is of the whole batch is agreed on.

XLA could divide a step over the devices by itself. But it divides operation by operation, and carries the loops over
images that are fast on CPU from device to device; a share that is computed apart runs as the whole batch runs on one
device. Then three things must be said: statistics and gradients are means over all shares, sums are sums over all
shares, and random numbers are those that one device would have drawn for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

Kind = Literal["whole", "share"]


def apart(
    mesh: Mesh, function: Callable[..., Any], arguments: tuple[Kind, ...], results: Any
) -> Callable[..., Any]:
    """The function of a batch, computed by each device of a mesh for its own share of it.

    Args:
        mesh: of one axis; the devices must be able to share the batch evenly.
        function: what each device computes.
        arguments: whether a device gets the whole of an argument (a tree of arrays), or its share of the first axis.
        results: the same of the result, or of each where it is a tuple. A whole one must be equal on all devices.
    """
    if mesh.size == jax.device_count() == 1:
        return function
    specs = {"whole": PartitionSpec(), "share": PartitionSpec(*mesh.axis_names)}
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(specs[kind] for kind in arguments),
        out_specs=jax.tree.map(specs.get, results),
        check_vma=False,
    )


def count() -> int:
    """How many shares there are, where one is computed now; else 1."""
    return lax.axis_size(_axes()) if _axes() else 1


def mean(tree: Any) -> Any:
    """The mean over the shares of each array."""
    return lax.pmean(tree, _axes()) if _axes() else tree


def total(x: jax.Array) -> jax.Array:
    """The sum over the shares."""
    return lax.psum(x, _axes()) if _axes() else x


def bernoulli(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bernoulli` for the images at hand, ``shape[0]`` of them, as drawn for the whole batch."""
    if not _axes():
        return jax.random.bernoulli(key, probability, shape)
    whole = jax.random.bernoulli(key, probability, (shape[0] * count(), *shape[1:]))
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(_axes()) * shape[0], shape[0])


def are_split() -> bool:
    """Whether a loop over images that is traced now would carry them between devices."""
    return jax.device_count() > 1 and not _axes()


def _axes() -> tuple[str, ...]:
    # asked of JAX, which knows also where gradients are traced, later than the function they belong to
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
