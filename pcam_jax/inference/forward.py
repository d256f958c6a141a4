"""The jitted forward pass over many images, with one compiled shape."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pcam_jax.data.loader import EvalLoader, ImageSource
from pcam_jax.models import shares
from pcam_jax.models.preprocess import Scheme
from pcam_jax.models.registry import Net
from pcam_jax.runtime import accelerator, sharding
from pcam_jax.runtime.signals import Stop
from pcam_jax.training.steps import make_eval_step


class Forward:
    """Logits of a net for batches of uint8 images, on all devices of a mesh.

    Args:
        net: the network.
        normalization: pixel scaling it was trained with.
        mesh: devices that share each batch.
    """

    def __init__(self, net: Net, normalization: Scheme, mesh: Mesh) -> None:
        self._devices, self._outputs = mesh.size, net.outputs
        self._share = (0, 1)
        if sharding.spans_processes(mesh):
            self._share = (jax.process_index(), jax.process_count())
        self._batch = sharding.batch_sharding(mesh)
        # the result is wanted whole on the host of every process
        self._step = jax.jit(
            shares.apart(mesh, make_eval_step(net, normalization), ("whole", "whole", "share"), "share"),
            out_shardings=sharding.replicated(mesh),
            compiler_options=accelerator.compiler_options(),
        )

    def batch_size(self, wanted: int) -> int:
        """The nearest batch size from ``wanted`` up that all devices can share."""
        return -(-wanted // self._devices) * self._devices

    def loader(self, source: ImageSource, positions: np.ndarray, batch_size: int) -> EvalLoader:
        """This process's share of padded batches of about ``batch_size`` images for `logits`."""
        return EvalLoader(source, positions, self.batch_size(batch_size), *self._share)

    def place(self, images: np.ndarray) -> jax.Array:
        """A batch ``[B, H, W, 3] uint8``, or this process's share of one, on the devices."""
        return sharding.put(images, self._batch)

    def run(self, weights: tuple[Any, Any], images: jax.Array) -> jax.Array:
        """Dispatch a placed batch without waiting; logits ``[B, outputs] float32``."""
        return self._step(*weights, images)

    def logits(
        self,
        weights: tuple[Any, Any],
        batches: EvalLoader,
        stop: Stop | None = None,
    ) -> np.ndarray:
        """Logits of all real examples in order, ``[n, outputs] float32``, on every process.

        Args:
            weights: (params, batch_stats) on the devices.
            batches: from `loader`.
            stop: polled between batches.

        Raises:
            Interrupted: a signal came.
        """
        collected = Collector()
        left = len(batches.example_indices)
        for batch in batches:
            if stop is not None:
                stop.check()
            # of the whole batch, of which this process may have read a part
            real = np.arange(batches.batch_size) < left
            left -= batches.batch_size
            collected.add(self.run(weights, self.place(batch["images"])), real)
        return collected.finish(self._outputs)


class Collector:
    """Gathers results of dispatched batches, each fetched only once the next one is under way."""

    def __init__(self) -> None:
        self._done: list[np.ndarray] = []
        self._pending: tuple[jax.Array, np.ndarray] | None = None

    def add(self, result: jax.Array, mask: np.ndarray) -> None:
        """Take a dispatched result ``[B, ...]`` and which of its rows are real, ``[B] bool``."""
        self._fetch()
        self._pending = (result, mask)

    def finish(self, outputs: int) -> np.ndarray:
        """All real rows in order, ``[n, outputs]``."""
        self._fetch()
        return np.concatenate([np.zeros((0, outputs), np.float32), *self._done])

    def _fetch(self) -> None:
        if self._pending is not None:
            result, mask = self._pending
            self._done.append(np.asarray(result)[mask])
            self._pending = None
