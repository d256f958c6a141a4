"""Batches from a store: read ahead in a thread, never recycled, uint8 all the way to the device.

Grain drives both loaders: one element is one step, and making it is one gather from the memory map. A
pipeline of single records spends its time in Python (4,000 to 70,000 images/s instead of more than 200,000).

Buffers are fresh for every batch, because jax aliases numpy memory on the CPU and may read it later.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pcam_jax.data.manifest import shard_header
from pcam_jax.data.order import TrainOrder
from pcam_jax.data.store import Store
from pcam_jax.runtime.errors import UserError

Batch = dict[str, Any]
IntArray = npt.NDArray[np.int64]

_BUFFERED_BATCHES = 4
_BUFFERED_BYTES = 256 * 2**20
_MOST_OPEN_SHARDS = 256


class ImageSource(Protocol):
    """What a loader reads from: a `Store`, or anything that gathers like one."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """int32 [N], -1 where unknown."""

    def gather(self, indices: Any, out: Any = None) -> npt.NDArray[np.uint8]:
        """The images at `indices`, uint8 [n, H, W, 3], a buffer of its own."""


class _Loader:
    """What both loaders share: the thread, the clock, and the care for a store on a slow or failing disk."""

    def __init__(self, store: ImageSource, example_indices: npt.ArrayLike) -> None:
        self.store = store
        self.example_indices: IntArray = np.asarray(example_indices, np.int64)
        self.waited_seconds = 0.0
        """Time that the consumer has spent waiting for batches, over all iterations."""
        self._files = _ShardFiles(store) if isinstance(store, Store) else None

    def _rows(self, step: int) -> IntArray:
        """Store rows that `step` reads, none beyond the end."""
        raise NotImplementedError

    def _make(self, step: int) -> Batch:
        """The batch of `step`."""
        raise NotImplementedError

    def _gather(self, step: int, first_step: int) -> npt.NDArray[np.uint8]:
        """The images of `step` in one gather, after telling the disk what the step after next will need."""
        rows = self._rows(step)
        if self._files is not None:
            self._files.check_length(rows)
            for coming in range(step, step + 3) if step == first_step else (step + 2,):
                self._files.fetch_if_cold(self._rows(coming))
        return self.store.gather(rows)

    def _iterate(self, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        import grain  # it imports jax, which `pcam_jax.data` must not do

        batch_bytes = max(1, batch_size * int(np.prod(self.store.image_shape)))
        buffered = int(np.clip(_BUFFERED_BYTES // batch_bytes, 1, _BUFFERED_BATCHES))
        # One thread: a gather is bound by memory, and more threads only compete for it.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffered)
        steps = iter(grain.MapDataset.range(start, stop).map(self._make).to_iter_dataset(options))
        if start < stop:
            steps.start_prefetch()  # now, so that the first batch is read while the caller compiles
        return self._consume(steps)

    def _consume(self, steps: Any) -> Iterator[Batch]:
        try:
            while True:
                asked = time.perf_counter()
                try:
                    batch = next(steps)
                except StopIteration:
                    return
                finally:
                    self.waited_seconds += time.perf_counter() - asked
                yield batch
        finally:
            steps.close()  # also when the consumer leaves early: cancels what has not been read


class TrainLoader(_Loader):
    """Training batches of the steps [start_step, stop_step).

    Each is dict(step=int, images=uint8 [b, H, W, 3], labels=int32 [b]) with b = batch_size / process_count:
    process i of n takes the i-th of n equal slices of the batch that `order` gives for the step, so the
    global batch is the same on any number of processes. Iterating again starts again at start_step.

    Args:
        store: the images and labels.
        example_indices: store rows of the training examples, int [n]; `order` counts in this list.
        order: which of them each step reads.
        start_step: the first step; a resumed run passes the number of steps done.
        stop_step: the step after the last.
        process_index: which process this is.
        process_count: how many share each batch.

    Raises:
        UserError: batch_size is not a multiple of process_count; while iterating: the store was cut.
    """

    def __init__(
        self,
        store: ImageSource,
        example_indices: npt.ArrayLike,
        order: TrainOrder,
        start_step: int,
        stop_step: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        super().__init__(store, example_indices)
        if len(self.example_indices) != order.count:
            raise ValueError(f"{len(self.example_indices)} examples, but the order counts {order.count}")
        self.order = order
        self.start_step, self.stop_step = start_step, stop_step
        self._slice = _process_slice(order.batch_size, "train.batch_size", process_index, process_count)
        self._labels = np.asarray(store.labels, np.int32)[self.example_indices]

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(self.start_step, self.stop_step, self._slice.stop - self._slice.start)

    def _rows(self, step: int) -> IntArray:
        if step >= self.stop_step:
            return self.example_indices[:0]
        return self.example_indices[self.order.indices(step)[self._slice]]

    def _make(self, step: int) -> Batch:
        labels = self._labels[self.order.indices(step)[self._slice]]
        return {"step": int(step), "images": self._gather(step, self.start_step), "labels": labels}


class EvalLoader(_Loader):
    """Every example once, in the order given, in batches of one fixed shape.

    Each batch is dict(images=uint8 [b, H, W, 3], labels=int32 [b], mask=bool [b], positions=int64 [b]) with
    b = batch_size / process_count. `positions` counts in example_indices. The last batch is padded with blank
    images, label 0, position -1 and mask False; no example is dropped. All processes see the same number of
    batches. Ascending example_indices read the disk in order.

    Args:
        store: the images and labels.
        example_indices: store rows to read, int [n].
        batch_size: images per batch over all processes.
        process_index: which process this is.
        process_count: how many share each batch.

    Raises:
        UserError: batch_size is below one or not a multiple of process_count; while iterating: the store was
            cut.
    """

    def __init__(
        self,
        store: ImageSource,
        example_indices: npt.ArrayLike,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        super().__init__(store, example_indices)
        self.batch_size = int(batch_size)
        self._slice = _process_slice(self.batch_size, "the batch size", process_index, process_count)

    def __len__(self) -> int:
        return -(-len(self.example_indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(0, len(self), self._slice.stop - self._slice.start)

    def _rows(self, step: int) -> IntArray:
        return self.example_indices[self._positions(step)]

    def _positions(self, step: int) -> IntArray:
        """Positions that this process reads of batch `step`, at most its share of the batch."""
        start = step * self.batch_size
        return np.arange(
            min(start + self._slice.start, len(self.example_indices)),
            min(start + self._slice.stop, len(self.example_indices)),
        )

    def _make(self, step: int) -> Batch:
        valid = self._positions(step)
        size = self._slice.stop - self._slice.start
        batch: dict[str, npt.NDArray[Any]] = {
            "images": self._gather(step, 0),
            "labels": np.asarray(self.store.labels[self.example_indices[valid]], np.int32),
            "mask": np.arange(size) < len(valid),
            "positions": valid,
        }
        if len(valid) < size:
            fill = {"images": 0, "labels": 0, "positions": -1}
            for name, value in fill.items():
                part = batch[name]
                padding = np.full((size - len(valid), *part.shape[1:]), value, part.dtype)
                batch[name] = np.concatenate([part, padding])
        return batch


def _process_slice(batch_size: int, setting: str, process_index: int, process_count: int) -> slice:
    if batch_size < 1:
        raise UserError(f"{setting} is {batch_size}; it must be at least 1.")
    if batch_size % process_count:
        raise UserError(
            f"{setting} is {batch_size}, which {process_count} processes cannot share equally: "
            f"choose a multiple of {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


class _ShardFiles:
    """The shard files beside the memory map, for what a mapping cannot do.

    Reading a mapping beyond the end of its file kills the process (SIGBUS), so the length is looked at before
    each gather, which costs a microsecond a shard; only a file cut within that moment, or a disk that fails,
    still can. And a mapping reads a cold file one page fault after another: asking the kernel for a later
    batch's rows beforehand lets the disk work on all of them at once, three times as fast on a common SSD.
    """

    def __init__(self, store: Store) -> None:
        manifest = store.manifest
        self._paths = [Path(store.path) / shard.file for shard in manifest.shards]
        self._starts = manifest.starts
        self._row_bytes = int(np.prod(manifest.image_shape))
        self._headers = [len(shard_header(shard.count, manifest.image_shape)) for shard in manifest.shards]
        self._descriptors: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def _locate(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        """Shard number and byte offset of each row."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return shards, np.asarray(self._headers)[shards] + (indices - self._starts[shards]) * self._row_bytes

    def _descriptor(self, shard: int) -> int | None:
        known = self._descriptors.get(shard)
        if known is None and len(self._descriptors) < _MOST_OPEN_SHARDS:
            opened = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            known = self._descriptors.setdefault(shard, opened)
            if known != opened:  # the thread of another iteration was faster
                os.close(opened)
        return known

    def check_length(self, indices: IntArray) -> None:
        """Raise a UserError where a file has become shorter than the mapping of it."""
        for shard in np.unique(self._locate(indices)[0]).tolist():
            path = self._paths[shard]
            try:
                descriptor = self._descriptor(shard)
                length = (os.stat(path) if descriptor is None else os.fstat(descriptor)).st_size
            except FileNotFoundError as error:
                raise UserError(f"{path} has vanished while it was read: prepare the store again.") from error
            rows = int(self._starts[shard + 1] - self._starts[shard])
            if length < self._headers[shard] + rows * self._row_bytes:
                raise UserError(f"{path} was cut short while it was read: prepare the store again.")

    def fetch_if_cold(self, indices: IntArray) -> None:
        """Ask the kernel to read these rows, without waiting for it, unless they seem to be in memory."""
        if len(indices) and hasattr(os, "posix_fadvise") and self._is_cold(indices):
            shards, offsets = self._locate(indices)
            for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
                descriptor = self._descriptor(shard)
                if descriptor is not None:
                    os.posix_fadvise(descriptor, offset, self._row_bytes, os.POSIX_FADV_WILLNEED)

    def _is_cold(self, indices: IntArray) -> bool:
        """Whether a look at a few of the rows finds one that is not in memory."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        page = bytearray(1)
        shards, offsets = self._locate(indices[:: max(1, len(indices) // 8)])
        for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
            descriptor = self._descriptor(shard)
            if descriptor is None:
                return False
            try:
                os.preadv(descriptor, [page], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return True  # a file system that cannot tell; asking in vain costs a microsecond a row
        return False


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
