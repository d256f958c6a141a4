"""Rows of many requests through a compiled function of a few fixed batch sizes.

One thread feeds the device. While it computes a batch, what arrives waits in a bounded queue; the next batch takes
as many waiting rows as fit, whomever they belong to. So batches grow with the load, and an idle service answers a
single row at once.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

FULL_ENOUGH = 0.75
"""A batch of a larger size is taken when at least this share of it are real rows."""
_LONGEST_WAIT = 60


class Busy(Exception):
    """The queue is full.

    Args:
        retry_after: seconds until there should be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full for about {retry_after} s")
        self.retry_after = retry_after


@dataclasses.dataclass
class _Job:
    arrays: tuple[np.ndarray, ...]
    future: Future[np.ndarray]
    taken: int = 0
    parts: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.arrays[0])


@dataclasses.dataclass
class _Batch:
    result: Any
    real: int
    pieces: list[tuple[_Job, int, int]]
    started: float


class Batcher:
    """Gathers rows of several callers into batches.

    Args:
        dispatch: starts the computation for arrays of one of the ``sizes`` and returns it, waiting or not;
            ``np.asarray`` of what it returns is ``[size, ...]``.
        sizes: batch sizes that are compiled.
        capacity: rows that may wait.
        observe: told of each batch: its size, its real rows, and the seconds it took.
        name: of the thread.
    """

    def __init__(
        self,
        dispatch: Callable[..., Any],
        sizes: Sequence[int],
        capacity: int,
        observe: Callable[[int, int, float], None] | None = None,
        name: str = "batches",
    ) -> None:
        self._dispatch = dispatch
        self.sizes = tuple(sorted(set(sizes)))
        self.capacity = capacity
        self._observe = observe
        self._jobs: collections.deque[_Job] = collections.deque()
        self._waiting = 0
        self._under_way = 0
        self._rate = 0.0
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self._waiting

    def warm_up(self, *row: np.ndarray, stop: Callable[[], bool] = lambda: False) -> bool:
        """Compile every size, with copies of a row; False where ``stop`` said so between two of them."""
        for size in self.sizes:
            if stop():
                return False
            arrays = [np.repeat(part[None], size, axis=0) for part in row]
            np.asarray(self._dispatch(*arrays))  # compiles
            started = time.monotonic()
            np.asarray(self._dispatch(*arrays))
            self._rate = size / max(time.monotonic() - started, 1e-6)
        return True

    def check_room(self, rows: int = 1) -> None:
        """Raise where that many rows would not be taken now.

        Raises:
            Busy: the queue is full. Rows beyond its capacity are taken while it is empty.
        """
        if self._waiting and self._waiting + rows > self.capacity:
            raise Busy(self.seconds(self._waiting))

    def seconds(self, rows: int) -> int:
        """About how long that many rows take, in whole seconds from 1 to 60."""
        return min(_LONGEST_WAIT, max(1, math.ceil(rows / self._rate))) if self._rate else 1

    def submit(self, *arrays: np.ndarray) -> Future[np.ndarray]:
        """Queue rows: arrays of the same length, at least one.

        Returns:
            The future result ``[rows, ...]``.

        Raises:
            Busy: the queue is full.
            RuntimeError: it is closed.
        """
        job = _Job(arrays, Future())
        with self._change:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self.check_room(job.count)
            self._jobs.append(job)
            self._waiting += job.count
            self._change.notify()
        return job.future

    def close(self, timeout: float | None = None) -> None:
        """Answer what was taken, then end the thread."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        pending: _Batch | None = None
        while True:
            with self._change:
                while not self._jobs and pending is None and not self._closed:
                    self._change.wait()
                if not self._jobs and pending is None:
                    return
                pieces, size = self._take()
            # the next batch is dispatched before the last one is fetched, so that the device never waits for us
            following = self._start(pieces, size) if pieces else None
            if pending is not None:
                self._finish(pending)
            pending = following

    def _take(self) -> tuple[list[tuple[_Job, int, int]], int]:
        """Pieces (job, first row, end) for the next batch, and its size; nothing where nothing waits."""
        if not self._jobs:
            return [], 0
        size = batch_size(self._waiting, self.sizes)
        pieces, room = [], size
        while room and self._jobs:
            job = self._jobs[0]
            if job.taken == 0 and not job.future.set_running_or_notify_cancel():
                self._waiting -= job.count
                self._jobs.popleft()
                continue
            rows = min(room, job.count - job.taken)
            pieces.append((job, job.taken, job.taken + rows))
            job.taken += rows
            room -= rows
            self._waiting -= rows
            if job.taken == job.count:
                self._jobs.popleft()
        return pieces, size

    def _start(self, pieces: list[tuple[_Job, int, int]], size: int) -> _Batch | None:
        started = time.monotonic()
        real = sum(end - first for _, first, end in pieces)
        try:
            columns = []
            for column in range(len(pieces[0][0].arrays)):
                parts = [job.arrays[column][first:end] for job, first, end in pieces]
                if real < size:
                    parts.append(np.zeros((size - real, *parts[0].shape[1:]), parts[0].dtype))
                columns.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
            return _Batch(self._dispatch(*columns), real, pieces, started)
        except Exception as error:  # the callers must hear of it, and the thread must live on
            _fail(pieces, error)
            return None

    def _finish(self, batch: _Batch) -> None:
        try:
            result = np.asarray(batch.result)
        except Exception as error:  # as above: a device reports its errors here
            _fail(batch.pieces, error)
            return
        seconds = max(time.monotonic() - batch.started, 1e-6)
        rate = batch.real / seconds
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        if self._observe is not None:
            self._observe(len(result), batch.real, seconds)
        row = 0
        for job, first, end in batch.pieces:
            job.parts.append(result[row : row + end - first])
            row += end - first
            if end == job.count and not job.future.done():
                job.future.set_result(np.concatenate(job.parts))


def batch_size(rows: int, sizes: Sequence[int]) -> int:
    """Size of the next batch for that many waiting rows.

    The smallest size that takes all of them, if it is filled well enough; otherwise the largest that they fill.
    """
    for size in sizes:
        if rows <= size and rows >= FULL_ENOUGH * size:
            return size
    return max((size for size in sizes if size <= rows), default=sizes[0])


def batch_sizes(largest: int, devices: int) -> tuple[int, ...]:
    """Every fourth power of two up to ``largest``, that the devices can share: 1, 4, 16, 64."""
    sizes = {largest}
    while largest > 1:
        largest //= 4
        sizes.add(max(1, largest))
    return tuple(sorted({-(-size // devices) * devices for size in sizes}))


def _fail(pieces: list[tuple[_Job, int, int]], error: BaseException) -> None:
    for job, _, _ in pieces:
        if not job.future.done():
            job.future.set_exception(error)
