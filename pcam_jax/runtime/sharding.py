"""Which devices share a batch, and how arrays are placed on them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pcam_jax.runtime.errors import UserError


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, ``"data"``, each process's together and in their order.

    Not `jax.make_mesh`, which may reorder devices: process i gives the i-th part of each batch.
    """
    return Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


def make_local_mesh() -> Mesh:
    """The devices of this process, for work that needs no other."""
    return Mesh(np.asarray(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


def spans_processes(mesh: Mesh) -> bool:
    """Whether a mesh has devices of several processes."""
    return mesh.is_multi_process


def check_shares(batch_size: int, parts: int, mesh: Mesh) -> None:
    """Check that the devices can share each part of a batch evenly.

    Raises:
        UserError: they cannot.
    """
    if batch_size % (parts * mesh.size):
        part = f"each of its {parts} parts (optimizer.accumulate_steps)" if parts > 1 else "it"
        raise UserError(
            f"train.batch_size is {batch_size}: the {mesh.size} devices must share {part} evenly; take a "
            f"multiple of {parts * mesh.size}."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on each device."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Place process-local host arrays as global device arrays.

    With one process the local array is the global one; with several each gives its own part of a split axis,
    or the same full value of a replicated one. The buffers must not be reused: on CPU they may be aliased.
    """
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)
