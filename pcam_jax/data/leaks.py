"""Images of another set inside a store, known by their pixels.

A set is another store, raw data as `prepare` reads it (PatchCamelyon's h5 files, Kaggle's zip), or a CSV whose ids
are hashes of pixels, as Kaggle's are. What must not be learnt from is that set's validation and test images, where
it dictates splits; of a set without splits, every image. So Kaggle's training patches may be looked for in
PatchCamelyon's files: that they are its training patches is no leak, that one is of its test set is.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pcam_jax.data.duplicates import symmetric_matches
from pcam_jax.data.manifest import sha1_of
from pcam_jax.data.pixel_statistics import PixelStatistics, Stop, measure_pixels
from pcam_jax.data.raw import find_reader
from pcam_jax.data.split import SPLITS
from pcam_jax.data.store import Store, open_store
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.progress import progress

LEARNT_FROM = ("train", "validation")
"""Splits that decide a model: one is trained on, the other chooses epoch, temperature and threshold."""
HELD_OUT = ("validation", "test")
"""Splits of another set that a model judged on it must not have learnt from."""
_SHA1 = re.compile(r"[0-9a-fA-F]{40}")


class LeakedImage(NamedTuple):
    """One image that another set holds out and this store learns from: its id, its split, how the two are equal."""

    id: str
    split: str
    equal: str


@dataclass(frozen=True)
class Leak:
    """Images of another set that are in this store.

    Attributes:
        name: of the other set.
        count: how many images it holds out.
        by_split: how many images of this store's splits are among those, to the byte.
        shared_training: how many images of this store are among the other's training images only.
        turned: how many more that decide a model are, after turning or mirroring; None where the other's pixels are
            not at hand.
        images: of this store that the other holds out and that decide a model, in the store's order.
    """

    name: str
    count: int
    by_split: dict[str, int]
    shared_training: int
    turned: int | None
    images: tuple[LeakedImage, ...]

    @property
    def harmful(self) -> int:
        """How many are trained on or choose."""
        return sum(self.by_split.get(split, 0) for split in LEARNT_FROM)

    @property
    def example(self) -> str:
        """Id of the first image that decides a model, "" without any."""
        return next((image.id for image in self.images), "")


@dataclass(frozen=True)
class _OtherSet:
    """Hashes `[n, 20] uint8` of a set's images, which of them it holds out `[n] bool`, and its pixels if at hand."""

    hashes: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.bool_]
    store: Store | None = None


def find_leak(
    store: Store,
    splits: npt.NDArray[np.str_],
    pixels: PixelStatistics,
    place: str | os.PathLike[str],
    stop: Stop | None = None,
) -> Leak:
    """Look for the images of another set inside a store.

    Args:
        store: to look in.
        splits: `[N]` of its images.
        pixels: measures of its images.
        place: another store, raw data, or a CSV with a column ``id`` of pixel hashes.
        stop: asked between batches.

    Raises:
        UserError: ``place`` is none of these, or its images have another shape.
    """
    other = _read(Path(place), store.image_shape, stop)
    held_out = {row.tobytes() for row in other.hashes[other.held_out]}
    trained_on = {row.tobytes() for row in other.hashes[~other.held_out]} - held_out
    own = [row.tobytes() for row in store.hashes()]
    found = np.array([digest in held_out for digest in own], bool)
    how = np.where(found, "to the byte", "").astype("U32")
    deciding = np.isin(splits, LEARNT_FROM)
    turned = None
    if other.store is not None:
        theirs = measure_pixels(other.store, len(other.store), stop)
        pairs = symmetric_matches(store, pixels.keys, other.store, theirs.keys)
        met = np.zeros(len(store), bool)
        met[[position for position, row in pairs if other.held_out[row]]] = True
        how[met & ~found] = "turned or mirrored"
        turned = int((met & ~found & deciding).sum())
    return Leak(
        name=str(place),
        count=int(other.held_out.sum()),
        by_split={split: int((found & (splits == split)).sum()) for split in (*SPLITS, "")},
        shared_training=sum(digest in trained_on for digest in own),
        turned=turned,
        images=tuple(
            LeakedImage(str(store.ids[row]), str(splits[row]), str(how[row]))
            for row in np.flatnonzero((how != "") & deciding)
        ),
    )


def write_leaks(file: IO[Any], leaks: Sequence[Leak]) -> None:
    """Write every image found as CSV: id, split, equal, set."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*LeakedImage._fields, "set"])
    writer.writerows([*image, leak.name] for leak in leaks for image in leak.images)


def read_hashes(path: Path) -> npt.NDArray[np.uint8]:
    """The pixel hashes in a CSV's column ``id``, `[n, 20] uint8`.

    Raises:
        UserError: no such file or column, or ids that are no SHA-1.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            if "id" not in (table.fieldnames or []):
                raise UserError(
                    f"{path} has no column 'id': it should list pixel hashes, as Kaggle's tables do."
                )
            ids = [row["id"] or "" for row in table]
    except FileNotFoundError:
        raise UserError(f"There is no {path}: give a store, raw data, or a CSV of pixel hashes.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV table ({error}).") from None
    strange = next((name for name in ids if not _SHA1.fullmatch(name)), None)
    if strange is not None:
        raise UserError(
            f"{path} has the id {strange!r}, which is no SHA-1 of pixels: prepare its images as a store instead."
        )
    return np.frombuffer(bytes.fromhex("".join(ids)), np.uint8).reshape(-1, 20)


def _read(path: Path, image_shape: tuple[int, int, int], stop: Stop | None) -> _OtherSet:
    if (path / "manifest.json").is_file():
        store = open_store(path)
        _check_shape(path, store.image_shape, image_shape)
        return _OtherSet(store.hashes(), _held_out(store.splits), store)
    if path.suffix == ".csv" or not path.exists():
        hashes = read_hashes(path)
        return _OtherSet(hashes, np.ones(len(hashes), bool))
    reader = find_reader(path)
    records, _ = reader.records()
    _check_shape(path, reader.image_shape, image_shape)
    image = np.empty(image_shape, np.uint8)
    hashes = np.empty((len(records), 20), np.uint8)
    with progress(len(records), "hash", "img") as bar:
        for row, record in enumerate(records):
            if stop is not None and row % 1000 == 0:
                stop.check()
            reader.read(record, image)
            hashes[row] = np.frombuffer(sha1_of(image), np.uint8)
            bar.update(1)
    return _OtherSet(hashes, _held_out(np.array([record.split for record in records], np.str_)))


def _held_out(splits: npt.NDArray[np.str_]) -> npt.NDArray[np.bool_]:
    return np.isin(splits, HELD_OUT) if (splits != "").any() else np.ones(len(splits), bool)


def _check_shape(path: Path, theirs: tuple[int, int, int], ours: tuple[int, int, int]) -> None:
    if tuple(theirs) != tuple(ours):
        raise UserError(
            f"{path} has images of {theirs}, the audited store of {ours}: they cannot be the same."
        )
