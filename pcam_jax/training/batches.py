"""Training batches as arguments of the step, from either home of the images; equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from pcam_jax.data.loader import TrainLoader
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import Store
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.training.steps import TrainStep, make_resident_step

_SHARE_OF_FREE_MEMORY = 0.6  # the rest is for weights, activations and the compiler's scratch space


class Batches(Protocol):
    """Where the arguments of the training step come from."""

    home: str
    """Where the images live, in words."""
    waited_seconds: float
    """How long the consumer of `arguments` has waited for data in its current pass."""

    def adapt(self, step: TrainStep) -> Callable[..., Any]:
        """The function of (state, *arguments) that does one step."""

    def arguments(self, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        """The arguments of steps ``first`` to ``last - 1``, on the devices."""


class HostBatches:
    """Images memory-mapped on the host; each batch is gathered ahead of its step and sent as uint8."""

    home = "on the host"

    def __init__(self, store: Store, positions: np.ndarray, order: TrainOrder, mesh: Mesh) -> None:
        self._store, self._positions, self._order = store, positions, order
        self._sharding = sharding.batch_sharding(mesh)
        self.waited_seconds = 0.0

    def adapt(self, step: TrainStep) -> Callable[..., Any]:
        """The step itself."""
        return step

    def arguments(self, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        """(images ``[B, H, W, 3] uint8``, labels ``[B] int32``) of each step."""
        self.waited_seconds = 0.0
        loader = TrainLoader(
            self._store, self._positions, self._order, first, last, jax.process_index(), jax.process_count()
        )
        for batch in loader:
            self.waited_seconds = loader.waited_seconds
            yield sharding.put((batch["images"], batch["labels"]), self._sharding)


class ResidentBatches:
    """All training images on the devices, split over them; only indices travel."""

    home = "on the device"
    waited_seconds = 0.0

    def __init__(self, store: Store, positions: np.ndarray, order: TrainOrder, mesh: Mesh) -> None:
        self._order = order
        self._sharding = sharding.batch_sharding(mesh)
        # rows that only make the shares even; no index points at them
        padded = np.resize(positions, -(-len(positions) // mesh.size) * mesh.size)
        mine = np.array_split(padded, jax.process_count())[jax.process_index()]
        self._images = sharding.put(store.gather(mine), self._sharding)
        self._labels = sharding.put(store.labels[mine], self._sharding)

    def adapt(self, step: TrainStep) -> Callable[..., Any]:
        """The step behind a gather."""
        return make_resident_step(step)

    def arguments(self, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        """(all images, all labels, indices ``[B] int32``) of each step."""
        share = self._order.batch_size // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        for step in range(first, last):
            indices = self._order.indices(step)[mine].astype(np.int32)
            yield self._images, self._labels, sharding.put(indices, self._sharding)


def place_batches(
    placement: Literal["auto", "host", "device"],
    store: Store,
    positions: np.ndarray,
    order: TrainOrder,
    mesh: Mesh,
    say: Callable[[str], None],
) -> Batches:
    """Choose the home of the training images.

    Args:
        placement: ``auto`` takes the devices where they are accelerators with room.
        store: the data.
        positions: ``[n]`` where the training examples lie in the store.
        order: which of them each step reads.
        mesh: the devices.
        say: is told when the devices were asked for and lack room.
    """
    free = accelerator.device_memory_free()
    if placement == "host" or (placement == "auto" and free is None):
        return HostBatches(store, positions, order, mesh)
    needed = len(positions) * int(np.prod(store.image_shape)) // mesh.size
    if free is not None and needed > _SHARE_OF_FREE_MEMORY * free:
        if placement == "device":
            say(
                f"The training images need {needed / 1e9:.1f} GB on each device, of which {free / 1e9:.1f} GB are "
                "free: they stay on the host."
            )
        return HostBatches(store, positions, order, mesh)
    return ResidentBatches(store, positions, order, mesh)
