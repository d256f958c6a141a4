"""Everything on the device that decides the future of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pcam_jax.runtime.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step maps to the next one; a plain pytree of float32 and int32 arrays.

    The epoch's sums are part of it, so that the history of a run resumed in mid-epoch equals that of one that
    was not interrupted.
    """

    step: jax.Array
    """Steps done, ``[] int32``."""
    params: Any
    """Nested dict of ``float32`` arrays."""
    batch_stats: Any
    """Running statistics of batch normalisation, likewise; empty for nets without."""
    opt_state: Any
    """State of the optax transformation."""
    ema_params: Any
    """Moving average of ``params``, or empty."""
    ema_batch_stats: Any
    """Moving average of ``batch_stats``, so that weights and statistics belong together, or empty."""
    average: Any
    """``params``, ``batch_stats`` and ``count`` of an average made at the ends of epochs, or empty."""
    lr_scale: jax.Array
    """Factor on the schedule set by plateaus, ``[] float32``."""
    loss_sum: jax.Array
    """Sum of the losses of this epoch's examples so far, ``[] float32``."""
    correct_sum: jax.Array
    """How many of them were classified right, ``[] float32``."""
    example_count: jax.Array
    """How many there were, ``[] float32``."""
    skipped: jax.Array
    """Steps skipped for a non-finite loss or gradient since the start, ``[] int32``."""
    skipped_in_row: jax.Array
    """Steps skipped since the last good one, ``[] int32``."""


def initial_state(
    params: Any, batch_stats: Any, opt_state: Any, *, ema: bool, average: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
        params: nested dict of arrays.
        batch_stats: likewise.
        opt_state: from ``Optimizer.init``.
        ema: keep a moving average of both.
        average: keep an average made at the ends of epochs (`averaging`).
    """
    zero = jnp.zeros((), jnp.float32)
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731  (donation forbids aliases)
    empty_average = {
        "params": copy(params),
        "batch_stats": copy(batch_stats),
        "count": jnp.zeros((), jnp.int32),
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=copy(params) if ema else {},
        ema_batch_stats=copy(batch_stats) if ema else {},
        average=empty_average if average else {},
        lr_scale=jnp.ones((), jnp.float32),
        loss_sum=zero,
        correct_sum=zero + 0,
        example_count=zero + 0,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def to_named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """A pytree as a flat dict of host copies, named by dotted path (``params.conv1.kernel``)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): np.array(leaf, copy=True) for path, leaf in leaves}


def snapshot(tree: Any) -> dict[str, jax.Array]:
    """Copies of a replicated pytree on one local device, named as by `to_named_arrays`.

    The copies are dispatched, not waited for, so that a loop can donate the originals to its next step and
    another thread can fetch the copies meanwhile.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    local = [leaf.addressable_data(0) for _, leaf in leaves]
    return dict(zip((_name(path) for path, _ in leaves), _copies(local), strict=True))


@jax.jit
def _copies(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]


def from_named_arrays(like: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of `to_named_arrays`: fill the structure of ``like`` (arrays or ShapeDtypeStructs).

    Raises:
        UserError: a leaf is missing, left over, or has another shape or dtype; the message names the first.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [_name(path) for path, _ in leaves]
    problems = [f"{name} is missing" for name in names if name not in arrays]
    problems += [f"{name} is not part of this network" for name in arrays if name not in set(names)]
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if name in arrays and (arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype):
            found, wanted = arrays[name], leaf
            problems.append(
                f"{name} is {found.dtype}{found.shape} where {wanted.dtype}{wanted.shape} is expected"
            )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"The checkpoint does not fit the configuration: {problems[0]}{more}.")
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name in names])


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
