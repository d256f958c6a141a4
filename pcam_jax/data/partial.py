"""A store in the making: `<store>.partial`, which a killed run leaves behind and the next one goes on with.

::

    plan.json                      what is being made, and of what
    store/images-00000.npy ...     slots, filled in any order
    part-0-of-1/progress.jsonl     a line for each filled chunk: hashes and faults
    part-0-of-1/done               written when the part's slots are all filled and flushed

The log is not flushed to disk with each line: what it promises is hashed again before it is believed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from pcam_jax.data.convert_worker import Outcome, Task
from pcam_jax.data.manifest import Shard, shard_digest, shard_header, shard_name
from pcam_jax.data.raw import RawRecord
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import folder_lock, sync_folder, write_json_atomic

_TASK_BYTES = 2**20  # stay in a core's cache from reading over hashing to writing
_MAX_TASK_IMAGES = 256
_COPY_IMAGES = 256


@dataclass(frozen=True)
class Plan:
    """What a partial store will become; two runs may share one only if their plans are equal.

    Attributes:
        fingerprint: hex digest of the source's listing and of the settings that decide the bytes.
        image_shape: (H, W, 3).
        count: images in the source.
        images_per_shard: slots in a shard (the last one has fewer).
        parts: how many processes or machines share the work, each taking every `parts`-th shard.
    """

    fingerprint: str
    image_shape: tuple[int, int, int]
    count: int
    images_per_shard: int
    parts: int = 1

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.image_shape)

    @property
    def images_per_task(self) -> int:
        """Slots that are read and written together."""
        return max(1, min(_MAX_TASK_IMAGES, _TASK_BYTES // self.image_bytes, self.images_per_shard))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.images_per_shard)

    def rows(self, shard: int) -> range:
        """The source's images that belong into a shard."""
        return range(shard * self.images_per_shard, min((shard + 1) * self.images_per_shard, self.count))

    def shards_of(self, part: int) -> range:
        """Shards of a part. No two parts write one file, so that a network file system is safe."""
        return range(part, self.shards, self.parts)

    def to_json(self) -> dict[str, object]:
        """The content of plan.json."""
        return {
            "fingerprint": self.fingerprint,
            "count": self.count,
            "images_per_shard": self.images_per_shard,
            "images_per_task": self.images_per_task,
            "parts": self.parts,
        }


@dataclass
class Progress:
    """What is known of the slots so far.

    Attributes:
        hashes: [count, 20] uint8, zeros where nothing usable is known.
        filled: [count] bool, slots that a log speaks of.
        faults_of_chunk: first row of a chunk -> (row, problem, detail) of each fault in it.
    """

    hashes: np.ndarray
    filled: np.ndarray
    faults_of_chunk: dict[int, list[tuple[int, str, str]]] = field(default_factory=dict)

    @property
    def faults(self) -> list[tuple[int, str, str]]:
        """Faults of images that are left out, by row."""
        return [told for told in self._told() if not self.hashes[told[0]].any()]

    @property
    def remarks(self) -> list[tuple[int, str, str]]:
        """What is worth counting about images that are kept, by row."""
        return [told for told in self._told() if self.hashes[told[0]].any()]

    def _told(self) -> list[tuple[int, str, str]]:
        return [told for start in sorted(self.faults_of_chunk) for told in self.faults_of_chunk[start]]


class PartialStore:
    """The folder of a store in the making, held by one process for one part.

    Args:
        folder: `<store>.partial`.
        plan: what it will become.
        part: which part this process makes, from 0.
    """

    def __init__(self, folder: Path, plan: Plan, part: int = 0) -> None:
        self.folder = folder
        self.plan = plan
        self.part = part
        self.slots = folder / "store"
        self._log: IO[str] | None = None

    @property
    def _home(self) -> Path:
        return self._home_of(self.part)

    def _home_of(self, part: int) -> Path:
        return self.folder / f"part-{part}-of-{self.plan.parts}"

    def create(self) -> None:
        """Make the folder, if it is not there; raises OSError."""
        self._home.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[str]:
        """Hold the part; yields a sentence if something was found there, else an empty string.

        Raises:
            UserError: another process makes this part, or other parts of another plan are there.
        """
        with folder_lock(self._home, "another prepare"):
            message = self._adopt()
            self.slots.mkdir(exist_ok=True)
            try:
                yield message
            finally:
                if self._log is not None:
                    self._log.close()
                    self._log = None

    def _adopt(self) -> str:
        """Take over what an earlier run left, if it is of the same plan; otherwise clear it away."""
        path = self.folder / "plan.json"
        found = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_text(encoding="utf-8"))
        if found == self.plan.to_json():
            begun = (self._home / "progress.jsonl").exists()
            return "Going on where an earlier run stopped." if begun else ""
        message = ""
        if found is not None:
            if self.plan.parts > 1:
                raise UserError(
                    f"{self.folder} was begun with another source or other settings: "
                    f"run all parts with the same ones, or delete the folder."
                )
            message = f"{self.folder} was of another source or other settings: starting over."
        if self.plan.parts == 1:
            self._clear()
        write_json_atomic(path, self.plan.to_json())
        return message

    def _clear(self) -> None:
        """Remove everything but this part's lock."""
        for child in self.folder.iterdir():
            if child == self._home:
                continue
            if child.name.startswith("part-"):
                with folder_lock(child, "another prepare"):
                    pass
            _remove(child)
        for name in ("progress.jsonl", "done"):
            (self._home / name).unlink(missing_ok=True)

    def tasks(self, records: list[RawRecord], known: Progress) -> Iterator[Task]:
        """What this part has to do, in the order of the store."""
        header = len(shard_header(1, self.plan.image_shape))
        for shard in self.plan.shards_of(self.part):
            rows = self.plan.rows(shard)
            path = self.slots / shard_name(shard)
            _make_slots(path, len(rows), self.plan.image_shape)
            for start in range(rows.start, rows.stop, self.plan.images_per_task):
                stop = min(start + self.plan.images_per_task, rows.stop)
                before = known.hashes[start:stop].tobytes() if known.filled[start:stop].all() else b""
                offset = header + (start - rows.start) * self.plan.image_bytes
                remarks = tuple(
                    (row - start, remark, detail)
                    for row, remark, detail in known.faults_of_chunk.get(start, [])
                )
                yield Task(shard, start, tuple(records[start:stop]), str(path), offset, before, remarks)

    def missing_bytes(self, known: Progress) -> int:
        """Bytes that this part has still to write, tables included."""
        mine = (self.plan.rows(shard) for shard in self.plan.shards_of(self.part))
        missing = sum(int((~known.filled[rows.start : rows.stop]).sum()) for rows in mine)
        return missing * self.plan.image_bytes + self.plan.count * 200

    def progress(self) -> Progress:
        """Read the logs of all parts. A line cut by a crash, or anything else odd, counts as not written."""
        known = Progress(np.zeros((self.plan.count, 20), np.uint8), np.zeros(self.plan.count, bool))
        for part in range(self.plan.parts):
            path = self._home_of(part) / "progress.jsonl"
            lines = path.read_bytes().splitlines() if path.exists() else []
            for line in lines:
                self._take(known, line)
        return known

    def _take(self, known: Progress, line: bytes) -> None:
        try:
            start, hashes, faults = json.loads(line)
            digests = bytes.fromhex(hashes)
            told = [(start + int(slot), str(problem), str(detail)) for slot, problem, detail in faults]
        except (ValueError, TypeError, RecursionError):
            return
        count = len(digests) // 20
        if not (start >= 0 and start + count <= self.plan.count and len(digests) == 20 * count):
            return
        # a later line replaces an earlier one of the same chunk
        known.faults_of_chunk[start] = told
        known.hashes[start : start + count] = np.frombuffer(digests, np.uint8).reshape(-1, 20)
        known.filled[start : start + count] = True

    def note(self, outcome: Outcome) -> None:
        """Log a filled chunk."""
        if self._log is None:
            self._log = open(self._home / "progress.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._log.write("\n")  # ends a line that a crash may have cut
        self._log.write(json.dumps([outcome.start, outcome.hashes.hex(), outcome.faults]) + "\n")
        self._log.flush()

    def mark_done(self, check: Callable[[], None]) -> None:
        """Flush this part's slots to disk, then say so."""
        for shard in self.plan.shards_of(self.part):
            check()
            _sync(self.slots / shard_name(shard))
        (self._home / "done").touch()
        sync_folder(self._home)

    def is_done(self, part: int) -> bool:
        """Whether a part's slots are all filled and flushed."""
        return (self._home_of(part) / "done").exists()

    def undone_parts(self) -> list[int]:
        """Parts that are not done yet."""
        return [part for part in range(self.plan.parts) if not self.is_done(part)]

    @contextlib.contextmanager
    def merging(self) -> Iterator[None]:
        """Be the only part that looks whether all are done.

        Raises:
            UserError: another part does.
            FileNotFoundError: another part has published the store.
        """
        merge = self.folder / "merge"
        merge.mkdir(exist_ok=True)
        with folder_lock(merge, "another part"):
            yield

    def close_gaps(self, known: Progress, check: Callable[[], None]) -> list[Shard]:
        """Take the slots without an image out of the shards, and describe the shards.

        May be interrupted and repeated: a shard's size says whether its gaps are closed.
        """
        shards = []
        for number in range(self.plan.shards):
            check()
            rows = self.plan.rows(number)
            hashes = known.hashes[rows.start : rows.stop]
            keep = np.flatnonzero(hashes.any(axis=1))
            path = self.slots / shard_name(number)
            if not len(keep):
                path.unlink(missing_ok=True)
                continue
            if len(keep) < len(rows) and path.stat().st_size == _shard_size(len(rows), self.plan.image_shape):
                _keep_images(path, len(rows), keep, self.plan.image_shape)
            shards.append(Shard(path.name, len(keep), shard_digest(hashes[keep])))
        return shards

    def publish(self, target: Path) -> None:
        """Give the finished store its name, then clear the rest away."""
        sync_folder(self.slots)
        os.rename(self.slots, target)
        sync_folder(target.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove(self) -> None:
        """Leave nothing behind after an error (of a shared folder: nothing of this part)."""
        if self.plan.parts == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for shard in self.plan.shards_of(self.part):
            (self.slots / shard_name(shard)).unlink(missing_ok=True)
        shutil.rmtree(self._home, ignore_errors=True)
        if not any(self._home_of(part).exists() for part in range(self.plan.parts)):
            shutil.rmtree(self.folder, ignore_errors=True)


def _make_slots(path: Path, count: int, image_shape: tuple[int, int, int]) -> None:
    """A shard's file with its header and room for ``count`` images; one that is there already is kept."""
    size = _shard_size(count, image_shape)
    if path.exists() and path.stat().st_size == size:
        return
    try:
        with open(path, "wb") as file:
            file.write(shard_header(count, image_shape))
            file.truncate(size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # truncating names no file


def _shard_size(count: int, image_shape: tuple[int, int, int]) -> int:
    return len(shard_header(count, image_shape)) + count * math.prod(image_shape)


def _keep_images(path: Path, count: int, keep: np.ndarray, image_shape: tuple[int, int, int]) -> None:
    """Rewrite a shard with the images ``keep`` alone."""
    images = np.memmap(
        path, np.uint8, "r", len(shard_header(count, image_shape)), shape=(count, *image_shape)
    )
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(shard_header(len(keep), image_shape))
        for start in range(0, len(keep), _COPY_IMAGES):
            file.write(images[keep[start : start + _COPY_IMAGES]].data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
