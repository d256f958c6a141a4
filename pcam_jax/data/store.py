"""The store: images, labels and hashes in one folder that everything after `prepare` reads.

A store is written once and never changed::

    images-00000.npy ...  uint8 [n, H, W, 3], memory-mapped by readers
    index.csv             one row per image: id, label (-1 unknown), group, split, source
    hashes.npy            uint8 [N, 20], the SHA-1 of each image's raw bytes
    manifest.json         format version, shape, class names, counts, digests, where it came from

Each shard's digest is the SHA-256 over its images' SHA-1 digests, so that an image is hashed once however
many digests stand on it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcam_jax.data.integrity import quick_damage
from pcam_jax.data.manifest import (
    FORMAT_VERSION,
    HASHES_FILE,
    INDEX_COLUMNS,
    UNKNOWN_LABEL,
    Manifest,
    Shard,
    default_images_per_shard,
    manifest_json,
    read_manifest,
    sha1_of,
    shard_digest,
    shard_header,
    shard_name,
)
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import atomic_write, sync_folder, write_json_atomic

if TYPE_CHECKING:
    import pandas as pd


class Store:
    """A store opened for reading; get one from `open_store`.

    Attributes:
        path: its folder.
        manifest: what `manifest.json` says.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._maps: list[np.ndarray | None] = [None] * len(manifest.shards)

    def __len__(self) -> int:
        return self.manifest.count

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {len(self)} images of {self.image_shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        # another process maps the files itself instead of receiving a copy of the pixels
        return (open_store, (self.path,))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3) of every image."""
        return self.manifest.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of labels 0, 1, ..."""
        return self.manifest.class_names

    @property
    def digest(self) -> str:
        """Hex digest of the content (images, index, class names), wherever the store lies."""
        return self.manifest.digest

    @cached_property
    def index(self) -> pd.DataFrame:
        """One row per image: id, label (int32, -1 unknown), group, split, source, then the source's own."""
        return _read_index(self.path / "index.csv", self.manifest)

    @cached_property
    def labels(self) -> np.ndarray:
        """[N] int32, -1 where unknown."""
        return self.index["label"].to_numpy(np.int32)

    @cached_property
    def ids(self) -> np.ndarray:
        """[N] str."""
        return self.index["id"].to_numpy(np.str_)

    @cached_property
    def groups(self) -> np.ndarray:
        """[N] str: slide or patient, empty where the source does not say."""
        return self.index["group"].to_numpy(np.str_)

    @cached_property
    def splits(self) -> np.ndarray:
        """[N] str: the split that the source itself dictates ("train", "validation", "test"), or empty."""
        return self.index["split"].to_numpy(np.str_)

    def hashes(self) -> np.ndarray:
        """[N, 20] uint8, the SHA-1 of each image's raw row-major bytes."""
        return np.load(self.path / HASHES_FILE, allow_pickle=False)

    def gather(self, indices: np.ndarray | Iterable[int], out: np.ndarray | None = None) -> np.ndarray:
        """Copy the images at ``indices`` out of the memory-mapped shards.

        Args:
            indices: [n] integers in [0, N), in any order, repeats allowed.
            out: [n, H, W, 3] uint8 C-contiguous buffer to fill, or None for a new one.

        Returns:
            [n, H, W, 3] uint8 in the order of ``indices``.

        Raises:
            IndexError: an index is out of range.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.ndim != 1:
            raise IndexError(f"indices must be one-dimensional, got shape {wanted.shape}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"index out of range for a store of {len(self)} images")
        shape = (len(wanted), *self.image_shape)
        if out is None:
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8:
            raise ValueError(f"out must be uint8 {shape}, got {out.dtype} {out.shape}")
        shards = np.searchsorted(self.manifest.starts, wanted, side="right") - 1
        for shard in np.unique(shards):
            images = self._shard(int(shard))
            if shards[0] == shard and shards[-1] == shard and np.all(shards == shard):
                # mode="clip" skips numpy's buffering of `out`; the range was checked above
                np.take(images, wanted - self.manifest.starts[shard], axis=0, out=out, mode="clip")
                break
            for row in np.flatnonzero(shards == shard):
                out[row] = images[wanted[row] - self.manifest.starts[shard]]
        return out

    def image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8 copy of one image."""
        return self.gather(np.array([index]))[0]

    def _shard(self, number: int) -> np.ndarray:
        images = self._maps[number]
        if images is None:
            shard = self.manifest.shards[number]
            images = np.memmap(
                self.path / shard.file,
                np.uint8,
                mode="r",
                offset=len(shard_header(shard.count, self.image_shape)),
                shape=(shard.count, *self.image_shape),
            )
            # a plain view: np.memmap adds Python work to every slice
            images = self._maps[number] = np.asarray(images)
        return images


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store and check, in milliseconds, that it is the one that was written.

    Checked: the manifest, every file's size and header, the index and hash digests, and a few images of each
    shard against their SHA-1. `pcam_jax.data.integrity.verify_store` checks every image.

    Raises:
        UserError: there is no store at ``path``, or a file of it is missing, cut or altered.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for damage in quick_damage(folder, manifest):
        raise UserError(
            f"The store {folder} is damaged: {damage}; "
            f"see `python -m pcam_jax.prepare --verify {folder}`, or delete it and prepare it again."
        )
    return Store(folder, manifest)


def write_store(
    path: str | os.PathLike[str],
    images: np.ndarray | Iterable[np.ndarray],
    index: pd.DataFrame,
    class_names: tuple[str, ...] | list[str],
    source: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    images_per_shard: int | None = None,
) -> Store:
    """Write images held in memory, or made as they are asked for, as a store: completely or not at all.

    Args:
        path: the store's folder, which must not exist.
        images: [N, H, W, 3] uint8, or an iterable of [H, W, 3] images or [n, H, W, 3] batches.
        index: N rows; ``id`` is required; ``label`` (default -1), ``group``, ``split`` and ``source``
            (default empty) are filled in; other columns are kept.
        class_names: names of labels 0, 1, ...
        source: where the images came from, for the manifest.
        settings: what decided the bytes, for the manifest.
        images_per_shard: by default as many as make about 256 MiB.

    Returns:
        The opened store.

    Raises:
        UserError: ``path`` exists.
        ValueError: images of differing shapes, or not as many as index rows.
    """
    target = Path(path)
    if target.exists():
        raise UserError(f"{target} exists already: choose another folder, or delete it first.")
    partial = target.with_name(f".{target.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shape, shards, hashes = _write_shards(partial, _single_images(images), images_per_shard)
        if len(hashes) != len(index):
            raise ValueError(f"{len(hashes)} images but {len(index)} index rows")
        columns = _columns_of(index)
        write_tables(
            partial, columns, hashes, shards, shape, tuple(class_names), source or {}, settings or {}
        )
        os.rename(partial, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_store(target)


def _single_images(images: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for item in images:
        if item.ndim == 4:
            yield from item
        else:
            yield item


def _write_shards(
    folder: Path, images: Iterator[np.ndarray], images_per_shard: int | None
) -> tuple[tuple[int, int, int], list[Shard], np.ndarray]:
    """Write the images as they come; returns their shape, the shards and the hashes ([N, 20] uint8)."""
    first = next(images, None)
    if first is None:
        raise ValueError("a store needs at least one image")
    shape = (first.shape[0], first.shape[1], first.shape[2])
    per_shard = images_per_shard or default_images_per_shard(shape)
    shards: list[Shard] = []
    hashes: list[bytes] = []
    remaining = itertools.chain([first], images)
    while batch := list(itertools.islice(remaining, 1)):
        before = len(hashes)
        with open(folder / shard_name(len(shards)), "wb") as file:
            file.write(shard_header(per_shard, shape))
            for image in itertools.chain(batch, itertools.islice(remaining, per_shard - 1)):
                if image.shape != shape or image.dtype != np.uint8:
                    raise ValueError(f"image {len(hashes)} is {image.dtype} {image.shape}, not uint8 {shape}")
                file.write(np.ascontiguousarray(image).data)
                hashes.append(sha1_of(image))
            count = len(hashes) - before
            file.seek(0)
            file.write(shard_header(count, shape))  # the same length for every count
            file.flush()
            os.fsync(file.fileno())
        digest = shard_digest(np.frombuffer(b"".join(hashes[before:]), np.uint8))
        shards.append(Shard(shard_name(len(shards)), count, digest))
    return shape, shards, np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 20)


def write_tables(
    folder: Path,
    columns: Mapping[str, Sequence[Any]],
    hashes: np.ndarray,
    shards: list[Shard],
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    source: dict[str, Any],
    settings: dict[str, Any],
) -> Manifest:
    """Write `hashes.npy`, `index.csv` and, last, `manifest.json` beside finished shards.

    Args:
        folder: where the shards lie.
        columns: of the index, all of N values: those of `INDEX_COLUMNS`, then any others.
        hashes: [N, 20] uint8.
        shards: the finished shards, in order.
        image_shape: (H, W, 3).
        class_names: names of labels 0, 1, ...
        source: where the images came from.
        settings: what decided the bytes.

    Raises:
        ValueError: a label outside the classes.
    """
    labels = np.asarray(columns["label"], np.int64)
    if len(labels) and (labels.min() < UNKNOWN_LABEL or labels.max() >= len(class_names)):
        raise ValueError(f"labels must lie in [-1, {len(class_names)})")
    with atomic_write(folder / HASHES_FILE, "wb") as file:
        np.save(file, np.ascontiguousarray(hashes, np.uint8), allow_pickle=False)
    content = _index_csv(columns)
    with atomic_write(folder / "index.csv", "wb") as file:
        file.write(content)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        image_shape=image_shape,
        count=len(labels),
        class_names=class_names,
        counts=_count_by_split(columns["split"], labels, class_names),
        shards=tuple(shards),
        index_digest=hashlib.sha256(content).hexdigest(),
        source=source,
        prepare=settings,
    )
    write_json_atomic(folder / "manifest.json", manifest_json(manifest))
    return manifest


def _index_csv(columns: Mapping[str, Sequence[Any]]) -> bytes:
    # by hand, since importing pandas takes longer than preparing a small set
    names = [*INDEX_COLUMNS, *(name for name in columns if name not in INDEX_COLUMNS)]
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(names)
    table.writerows(zip(*(columns[name] for name in names), strict=True))
    return text.getvalue().encode()


def _columns_of(index: pd.DataFrame) -> dict[str, Sequence[Any]]:
    """A table's columns as lists, those that are missing filled in."""
    filled = index.astype(object).where(index.notna(), "")
    columns: dict[str, Sequence[Any]] = {str(name): filled[name].tolist() for name in filled}
    columns["label"] = (
        index["label"].astype(int).tolist() if "label" in index else [UNKNOWN_LABEL] * len(index)
    )
    return {name: [""] * len(index) for name in INDEX_COLUMNS} | columns


def _count_by_split(
    splits: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    names = ("unknown", *class_names)  # label -1 comes first
    found, numbers = np.unique(np.asarray(splits, np.str_), return_inverse=True)
    counts = np.zeros((len(found), len(names)), np.int64)
    np.add.at(counts, (numbers, labels + 1), 1)
    return {
        str(split): {name: int(n) for name, n in zip(names, row, strict=True) if n}
        for split, row in zip(found, counts, strict=True)
    }


def _read_index(path: Path, manifest: Manifest) -> pd.DataFrame:
    import pandas as pd  # half a second to import, not needed to gather images

    text = {column: str for column in INDEX_COLUMNS if column != "label"}
    try:
        index = pd.read_csv(path, dtype={**text, "label": np.int32}, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the store again.") from None
    if tuple(index.columns[: len(INDEX_COLUMNS)]) != INDEX_COLUMNS or len(index) != manifest.count:
        raise UserError(f"{path} does not belong to this store's manifest: prepare the store again.")
    return index
