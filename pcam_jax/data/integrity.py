"""Is a store still what was written? Cheap checks at open, and every image on request."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pcam_jax.data.manifest import HASHES_FILE, Manifest, Shard, read_manifest, shard_digest, shard_header

_BLOCK = 256  # images hashed at a time
_MAX_CHECKED_AT_OPEN = 64


@dataclass(frozen=True)
class Damage:
    """One finding: the file, the id where one image is concerned, and what is wrong."""

    file: str
    id: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {f'image {self.id} ' if self.id else ''}{self.problem}"


def verify_store(
    path: str | os.PathLike[str],
    workers: int | None = None,
    seen: Callable[[int], None] | None = None,
) -> list[Damage]:
    """Hash every image of a store again.

    Args:
        path: the store.
        workers: hashing threads, by default one per core.
        seen: called with the number of images hashed since the last call; may raise to stop.

    Returns:
        What differs, empty for a sound store.

    Raises:
        UserError: there is no store at ``path`` or its manifest cannot be read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    damage = list(_table_damage(folder, manifest))
    unsound = {found.file for found in damage}
    ids = None if "index.csv" in unsound else _read_ids(folder)
    hashes = None if HASHES_FILE in unsound else np.load(folder / HASHES_FILE, allow_pickle=False)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for number, shard in enumerate(manifest.shards):
            problem = _shard_damage(folder, manifest, shard)
            if problem is not None:
                damage.append(problem)
                continue
            blocks = [range(n, min(n + _BLOCK, shard.count)) for n in range(0, shard.count, _BLOCK)]
            digests = []
            for block in pool.map(partial(hash_rows, folder, manifest, number), blocks):
                digests.append(block)
                if seen is not None:
                    seen(len(block))
            found = np.concatenate(digests)
            if shard_digest(found) == shard.digest:
                continue
            start = int(manifest.starts[number])
            expected = found if hashes is None else hashes[start : start + shard.count]
            differing = np.flatnonzero((found != expected).any(axis=1))
            for row in differing:
                name = ids[start + row] if ids is not None else f"number {start + row}"
                damage.append(Damage(shard.file, name, "differs from its SHA-1"))
            if not len(differing):
                damage.append(Damage(shard.file, "", "does not match its digest in manifest.json"))
    return damage


def quick_damage(folder: Path, manifest: Manifest) -> Iterator[Damage]:
    """What is wrong by the checks that cost milliseconds: sizes, headers, tables, an image or two a shard."""
    yield from _table_damage(folder, manifest)
    for shard in manifest.shards:
        problem = _shard_damage(folder, manifest, shard)
        if problem is not None:
            yield problem
    hashes = np.load(folder / HASHES_FILE, mmap_mode="r", allow_pickle=False)
    step = max(1, 2 * len(manifest.shards) // _MAX_CHECKED_AT_OPEN)
    for number in range(0, len(manifest.shards), step):
        shard, start = manifest.shards[number], int(manifest.starts[number])
        for row in sorted({0, shard.count - 1}):
            found = hash_rows(folder, manifest, number, range(row, row + 1))[0]
            if not np.array_equal(found, hashes[start + row]):
                yield Damage(shard.file, f"number {start + row}", "differs from its SHA-1")


def hash_rows(folder: Path, manifest: Manifest, number: int, rows: range) -> np.ndarray:
    """SHA-1 of some images of a shard, read with `pread` so that a bad disk is an error and not a signal.

    Args:
        folder: the store.
        manifest: its manifest.
        number: of the shard.
        rows: consecutive images of that shard.

    Returns:
        [len(rows), 20] uint8.
    """
    shard, size = manifest.shards[number], manifest.image_bytes
    offset = len(shard_header(shard.count, manifest.image_shape)) + rows.start * size
    descriptor = os.open(folder / shard.file, os.O_RDONLY)
    try:
        content = memoryview(os.pread(descriptor, len(rows) * size, offset))
    finally:
        os.close(descriptor)
    images = (content[n * size : (n + 1) * size] for n in range(len(rows)))
    digests = [hashlib.sha1(image, usedforsecurity=False).digest() for image in images]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 20)


def _table_damage(folder: Path, manifest: Manifest) -> Iterator[Damage]:
    index, hashes = folder / "index.csv", folder / HASHES_FILE
    if not index.is_file():
        yield Damage("index.csv", "", "is missing")
    elif hashlib.sha256(index.read_bytes()).hexdigest() != manifest.index_digest:
        yield Damage("index.csv", "", "was altered")
    if not hashes.is_file():
        yield Damage(HASHES_FILE, "", "is missing")
        return
    table = None
    with contextlib.suppress(ValueError, OSError, EOFError):
        table = np.load(hashes, mmap_mode="r", allow_pickle=False)
    if table is None or table.shape != (manifest.count, 20) or table.dtype != np.uint8:
        yield Damage(HASHES_FILE, "", "was cut or altered")
        return
    for number, shard in enumerate(manifest.shards):
        start = int(manifest.starts[number])
        if shard_digest(table[start : start + shard.count]) != shard.digest:
            yield Damage(HASHES_FILE, "", f"was altered in the part of {shard.file}")
            return


def _shard_damage(folder: Path, manifest: Manifest, shard: Shard) -> Damage | None:
    header = shard_header(shard.count, manifest.image_shape)
    expected = len(header) + shard.count * manifest.image_bytes
    try:
        with open(folder / shard.file, "rb") as file:
            found = file.read(len(header))
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return Damage(shard.file, "", "is missing")
    if size != expected:
        return Damage(shard.file, "", f"has {size} bytes instead of {expected}")
    return None if found == header else Damage(shard.file, "", "has an altered header")


def _read_ids(folder: Path) -> list[str]:
    with open(folder / "index.csv", encoding="utf-8", newline="") as file:
        return [row["id"] for row in csv.DictReader(file)]
