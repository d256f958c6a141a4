"""The embedded sample: synthetic lymph-node patches with tumour masks, made from a seed.

Each patch is a scene of lymphocytes, reactive cells, stroma and fat, in nearly half of which a tumour reaches
the centre. As in PatchCamelyon the label says whether the central 32x32 pixels hold tumour; many negatives
have tumour around the centre, or a nest of harmless reactive cells in it, so neither the whole patch nor its
colour gives the answer away. Patches come from slides, each with a stain, tumour grade and density of its
own.

It is made for trying the software, for tests and for measurements at any size; it says nothing about
medicine.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pcam_jax.data.scene import PATCH_STREAM, paint, slide_of
from pcam_jax.data.store import Store, open_store, write_store
from pcam_jax.data.tissue import Dice
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import sync_folder
from pcam_jax.runtime.progress import progress

GENERATOR_VERSION = 2
"""Raise it when the same seed no longer gives the same pixels."""
CLASS_NAMES = ("normal", "tumour")

_MASKS = "masks.npy"
_CHUNK = 200  # patches drawn at once


@dataclass(frozen=True)
class SamplePatches:
    """Synthetic patches.

    Attributes:
        images: uint8 [N, H, W, 3].
        labels: int32 [N], 1 where the central square holds tumour.
        masks: bool [N, H, W], where there is tumour.
        groups: int64 [N], the slide of each patch.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]
    masks: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.int64]


def sample_patches(
    count: int,
    *,
    seed: int = 0,
    image_size: int = 96,
    difficulty: float = 0.5,
    start: int = 0,
    slides: int = 100,
    first_slide: int = 0,
) -> SamplePatches:
    """Patches start, ..., start + count - 1 of an endless sequence; each depends on its own number alone.

    Args:
        count: how many.
        seed: of the whole sequence.
        image_size: height and width. The label looks at the central 32x32, or the central third of images
            below 96 pixels.
        difficulty: from 0 (large pale nuclei, one stain) to 1 (tumour nuclei hardly differ, stains vary).
        start: number of the first patch.
        slides: patch i lies on slide first_slide + i % slides.
        first_slide: number of the first slide.

    Raises:
        UserError: a count below zero, images smaller than 24 pixels or a difficulty outside [0, 1].
    """
    if count < 0 or slides < 1:
        raise UserError(f"A sample of {count} patches from {slides} slides cannot be made.")
    if image_size < 24:
        raise UserError(f"Sample patches must be at least 24 pixels wide, not {image_size}.")
    if not 0 <= difficulty <= 1:
        raise UserError(f"The difficulty of the sample must lie between 0 and 1, not {difficulty:g}.")
    images = np.empty((count, image_size, image_size, 3), np.uint8)
    masks = np.empty((count, image_size, image_size), bool)
    groups = first_slide + (start + np.arange(count)) % slides
    labels = np.empty(count, np.int32)
    for row in range(count):
        slide = slide_of(seed, int(groups[row]), difficulty)
        dice = Dice(seed, start + row, PATCH_STREAM, 1024)
        labels[row] = dice.chance(slide.prevalence)
        images[row], masks[row] = paint(dice, slide, bool(labels[row]), image_size, difficulty)
    return SamplePatches(images, labels, masks, groups)


# ---------------------------------------------------------------- stores


def write_sample_store(
    path: str | os.PathLike[str],
    *,
    count: int = 4000,
    test_count: int | None = None,
    seed: int = 0,
    image_size: int = 96,
    difficulty: float = 0.5,
    slides: int = 100,
    workers: int = 1,
    images_per_shard: int | None = None,
) -> Store:
    """Write synthetic patches as a store, completely or not at all.

    The tumour masks lie beside the images in `masks.npy`, for `sample_masks`. An id is the SHA-1 of the
    pixels, as in Kaggle's set. The test patches come from slides of their own and keep their labels.

    Args:
        path: the store's folder, which must not exist.
        count: labelled patches for training and validation.
        test_count: patches of the test split, by default an eighth of `count`.
        seed: of the generator.
        image_size: height and width.
        difficulty: from 0 to 1, see `sample_patches`.
        slides: slides that the labelled patches come from; the test patches add a quarter as many.
        workers: processes that draw; they are spawned, so a script that asks for several needs its
            `if __name__ == "__main__"`.
        images_per_shard: see `write_store`.

    Raises:
        UserError: `path` exists, or an argument is out of range.
    """
    target = Path(path)
    if target.exists():
        raise UserError(f"{target} exists already: choose another folder, or delete it first.")
    test_count = count // 8 if test_count is None else test_count
    if count < 1 or test_count < 0:
        raise UserError(f"A sample needs at least one labelled patch, not {count}.")
    slides = min(slides, count)
    common = {"seed": seed, "image_size": image_size, "difficulty": difficulty}
    tasks = []
    for first, total, number, first_slide in (
        (0, count, slides, 0),
        (count, test_count, max(1, slides // 4), slides),
    ):
        for begin in range(first, first + total, _CHUNK):
            size = min(_CHUNK, first + total - begin)
            tasks.append(
                {**common, "count": size, "start": begin, "slides": number, "first_slide": first_slide}
            )
    everything = count + test_count
    index = pd.DataFrame(
        {
            "id": pd.Series("", index=range(everything), dtype=object),
            "label": np.zeros(everything, np.int32),
            "group": pd.Series("", index=range(everything), dtype=object),
            "split": [""] * count + ["test"] * test_count,
            "source": [f"patch {number}" for number in range(everything)],
        }
    )
    settings = {"generator_version": GENERATOR_VERSION, **common, "slides": slides}
    source = {"reader": "sample", "masks": _MASKS, **settings}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        unfinished, masks = Path(scratch) / "store", Path(scratch) / _MASKS
        # The index is filled in while the images are written, and read after the last of them.
        images = _draw_into(index, masks, tasks, image_size, workers)
        write_store(unfinished, images, index, CLASS_NAMES, source, settings, images_per_shard)
        os.rename(masks, unfinished / _MASKS)
        try:
            os.rename(unfinished, target)
        except OSError as error:
            if not target.exists():
                raise
            raise UserError(f"{target} has been made by another process meanwhile.") from error
    sync_folder(target.parent)
    return open_store(target)


def _draw_into(
    index: pd.DataFrame, masks: Path, tasks: list[dict[str, Any]], image_size: int, workers: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """Batches of images; fills the index and the file of masks on the way."""
    shape = (len(index), -(-image_size * image_size // 8))
    packed = np.lib.format.open_memmap(masks, mode="w+", dtype=np.uint8, shape=shape)
    with _drawing(tasks, workers) as batches, progress(len(index), "draw sample", "img") as bar:
        done = 0
        for patches in batches:
            rows = slice(done, done + len(patches.images))
            index.loc[rows.start : rows.stop - 1, "id"] = [
                hashlib.sha1(image.data, usedforsecurity=False).hexdigest() for image in patches.images
            ]
            index.loc[rows.start : rows.stop - 1, "label"] = patches.labels
            index.loc[rows.start : rows.stop - 1, "group"] = [f"slide{slide:04d}" for slide in patches.groups]
            packed[rows] = np.packbits(patches.masks.reshape(len(patches.masks), -1), axis=1)
            done = rows.stop
            bar.update(len(patches.images))
            yield patches.images
    packed.flush()


@contextlib.contextmanager
def _drawing(tasks: list[dict[str, Any]], workers: int) -> Iterator[Iterator[SamplePatches]]:
    if workers <= 1:
        yield map(_draw, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap(_draw, tasks)


def _draw(task: dict[str, Any]) -> SamplePatches:
    return sample_patches(**task)


def sample_masks(store: Store, indices: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tumour masks of some images of a sample store, bool [n, H, W].

    Raises:
        UserError: the store has no masks.
    """
    path = store.path / _MASKS
    if store.manifest.source.get("masks") != _MASKS or not path.is_file():
        raise UserError(f"The store {store.path} has no tumour masks; only the synthetic sample has.")
    height, width, _ = store.image_shape
    packed = np.load(path, mmap_mode="r", allow_pickle=False)[np.asarray(indices, np.int64)]
    return np.unpackbits(packed, axis=1, count=height * width).reshape(-1, height, width).view(np.bool_)


def embedded_sample(
    *, count: int = 4000, test_count: int = 500, seed: int = 0, difficulty: float = 0.5
) -> Path:
    """The store behind `data.store = "sample"`, drawn on first use and kept in the user's cache folder.

    The folder is $XDG_CACHE_HOME/pcam_jax or ~/.cache/pcam_jax, or a temporary one where neither can be
    written. Several processes may ask at once: each draws for itself and the first to finish keeps its own.
    A damaged store is drawn again.
    """
    name = f"sample-v{GENERATOR_VERSION}-{count}-{test_count}-seed{seed}-difficulty{difficulty:g}"
    path = _cache_folder() / name
    for left_over in path.parent.glob(f".{name}.*"):  # by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > 3600:
                shutil.rmtree(left_over)
    for _ in range(3):
        try:
            open_store(path)
            return path
        except UserError:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path)
        with contextlib.suppress(UserError):  # another process was faster: use its store
            write_sample_store(path, count=count, test_count=test_count, seed=seed, difficulty=difficulty)
    open_store(path)
    return path


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path("~").expanduser() / ".cache"
    folder = Path(base) / "pcam_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"pcam_jax-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder
