"""Converts chunks of a raw source: in this process, or in worker processes of its own.

Workers are fresh interpreters that talk through a pipe. They are not made by `multiprocessing`, which would run
the caller's main module again (a notebook, an unguarded script), and not by `fork`, which must not happen after
jax has started its threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import numpy as np

from pcam_jax.data.raw import RawReader, RawRecord, RecordFault
from pcam_jax.runtime.errors import UserError

_POLL_SECONDS = 0.2
_TASKS_AHEAD = 2  # given to a worker at a time, so that it never waits for the parent
_START_WORKER = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from pcam_jax.data.convert_worker import serve; serve(int(sys.argv[2]))"
)
NO_HASH = bytes(20)
"""Stands for an image that could not be read."""


@dataclass(frozen=True)
class Task:
    """A run of consecutive slots of one shard.

    Attributes:
        shard: number of the shard.
        start: first slot.
        records: what belongs into the slots.
        path: file of the shard.
        offset: byte in it at which the first slot begins.
        known: SHA-1 digests (20 bytes a slot) of what an earlier run wrote, or empty.
        remarks: (slot, remark, detail) of that run.
    """

    shard: int
    start: int
    records: tuple[RawRecord, ...]
    path: str
    offset: int
    known: bytes = b""
    remarks: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a `Task`.

    Attributes:
        shard: as in the task.
        start: as in the task.
        hashes: 20 bytes a slot, `NO_HASH` where there is no image.
        faults: (slot within the task, problem, detail); where the slot has a hash, a remark on a good image.
        error: (errno, path) of a failed write, or None.
    """

    shard: int
    start: int
    hashes: bytes
    faults: tuple[tuple[int, str, str], ...]
    error: tuple[int, str] | None = None


def convert_chunk(reader: RawReader, task: Task, buffer: np.ndarray) -> Outcome:
    """Read a task's images, check them, and write them into their slots.

    Args:
        reader: of the source.
        task: what to do.
        buffer: [at least n, H, W, 3] uint8, overwritten.

    Returns:
        What became of it. Slots without a usable image hold nothing of meaning.
    """
    if task.known and _slots_hold(task, buffer[0].nbytes):
        return Outcome(task.shard, task.start, task.known, task.remarks)
    hashes: list[bytes] = []
    faults: list[tuple[int, str, str]] = []
    for slot, record in enumerate(task.records):
        image = buffer[slot]
        try:
            remark = reader.read(record, image)
            digest = hashlib.sha1(image.data, usedforsecurity=False)
            if record.sha1 and digest.hexdigest() != record.sha1:
                raise RecordFault(
                    "pixels differ", f"the SHA-1 of its pixels is {digest.hexdigest()}, not that of its name"
                )
            hashes.append(digest.digest())
            if remark:
                faults.append((slot, remark, ""))
            continue
        except RecordFault as fault:
            faults.append((slot, fault.problem, fault.detail))
        except OSError as error:
            faults.append((slot, "unreadable", error.strerror or type(error).__name__))
        image[:] = 0
        hashes.append(NO_HASH)
    usable = any(found != NO_HASH for found in hashes)
    failed = _write(task, buffer[: len(task.records)]) if usable else None
    return Outcome(task.shard, task.start, b"".join(hashes), tuple(faults), failed)


def _slots_hold(task: Task, image_bytes: int) -> bool:
    """Whether the slots still hold what an earlier run says it wrote, however that run ended."""
    if NO_HASH in (task.known[at : at + 20] for at in range(0, len(task.known), 20)):
        return False  # faults are told again by reading again
    try:
        with open(task.path, "rb") as file:
            content = memoryview(os.pread(file.fileno(), len(task.records) * image_bytes, task.offset))
    except OSError:
        return False
    images = (content[n * image_bytes : (n + 1) * image_bytes] for n in range(len(task.records)))
    return task.known == b"".join(hashlib.sha1(image, usedforsecurity=False).digest() for image in images)


def _write(task: Task, images: np.ndarray) -> tuple[int, str] | None:
    # pwrite and not a memory map: a full disk is then an error and not a SIGBUS
    remaining, offset = images.data.cast("B"), task.offset
    try:
        descriptor = os.open(task.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while remaining:
                written = os.pwrite(descriptor, remaining, offset)
                remaining, offset = remaining[written:], offset + written
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.errno or 0, task.path
    return None


def convert(
    reader: RawReader, tasks: Iterable[Task], images_per_task: int, workers: int, check: Callable[[], None]
) -> Generator[Outcome]:
    """Convert tasks, in any order.

    Args:
        reader: of the source.
        tasks: what to do; taken as it is needed.
        images_per_task: at most.
        workers: processes besides this one; 0 works in this process.
        check: called several times a second; may raise to stop.

    Yields:
        An outcome for each task, as they come.

    Raises:
        UserError: a worker was killed.
    """
    if workers == 0:
        buffer = np.empty((images_per_task, *reader.image_shape), np.uint8)
        for task in tasks:
            check()
            yield convert_chunk(reader, task, buffer)
        return
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(_Worker(reader, images_per_task)) for _ in range(workers)]
        yield from _share_out(pool, iter(tasks), check)


def _share_out(pool: list[_Worker], tasks: Iterator[Task], check: Callable[[], None]) -> Iterator[Outcome]:
    waiting: deque[_Worker] = deque(pool * _TASKS_AHEAD)
    busy: dict[Connection, _Worker] = {worker.pipe: worker for worker in pool}
    in_flight = 0
    exhausted = False
    while True:
        while waiting and not exhausted:
            task = next(tasks, None)
            if task is None:
                exhausted = True
            else:
                waiting.popleft().send(task)
                in_flight += 1
        if not in_flight:
            return
        check()
        for pipe in wait(list(busy), timeout=_POLL_SECONDS):
            worker = busy[pipe]  # type: ignore[index]
            outcome = worker.receive()
            in_flight -= 1
            waiting.append(worker)
            yield outcome


class WorkerLost(UserError):
    """A worker process ended before its work did."""


class _Worker:
    """One worker process, ended when the block that holds it is left."""

    def __init__(self, reader: RawReader, images_per_task: int) -> None:
        self.pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START_WORKER, str(Path(__file__).parents[2]), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # Ctrl-C reaches this process alone, which then decides when the workers stop
            start_new_session=True,
        )
        theirs.close()
        self.send((reader, images_per_task))

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # the worker ends when it finds nobody at the other end
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, message: object) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            self._explain()

    def receive(self) -> Outcome:
        try:
            outcome = self.pipe.recv()
        except (EOFError, OSError):
            self._explain()
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, Outcome)
        return outcome

    def _explain(self) -> None:
        code = self._process.wait()
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise WorkerLost(
            f"A worker process {cause} (out of memory, perhaps): run the same command again, it goes on where "
            f"it stopped, or give fewer --workers."
        ) from None


def serve(descriptor: int) -> None:
    """What a worker process does: take a reader, then tasks, until the other end of the pipe is gone."""
    pipe = Connection(descriptor)
    # the parent decides when to stop; a signal to the whole group must not cut a chunk
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        reader, images_per_task = pipe.recv()
        buffer = np.empty((images_per_task, *reader.image_shape), np.uint8)
        while True:
            task = pipe.recv()
            try:
                answer: object = convert_chunk(reader, task, buffer)
            except Exception as error:  # shown by the parent, with its own traceback
                answer = error
            pipe.send(answer)
    except (EOFError, OSError):
        return
