"""Kaggle folders and zips of random patches, with the tifs' bytes written by hand."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcam_jax.data.integrity import verify_store
from pcam_jax.data.store import Store

SHAPE = (96, 96, 3)
SHARD = 5
"""Images in a shard, so that a small set has several."""


@dataclass(frozen=True)
class KaggleSource:
    """A made-up set: where it is, and what is in it in the order a store should have."""

    path: Path
    train: dict[str, int]
    test: list[str]
    images: dict[str, np.ndarray]

    def tif(self, name: str) -> Path:
        return self.path / ("train" if name in self.train else "test") / f"{name}.tif"

    def zip(self, method: int = zipfile.ZIP_DEFLATED, prefix: str = "") -> Path:
        """The same set as a zip beside the folder."""
        target = self.path.with_suffix(".zip")
        with zipfile.ZipFile(target, "w", method, compresslevel=1) as archive:
            for file in sorted(self.path.rglob("*")):
                if file.is_file():
                    archive.write(file, prefix + file.relative_to(self.path).as_posix())
        return target


def make_kaggle_folder(path: Path, train: int, test: int, seed: int = 0) -> KaggleSource:
    """Write ``train`` labelled and ``test`` unlabelled random patches; a count of 0 leaves that split out."""
    rng = np.random.default_rng(seed)
    images = {}
    for _ in range(train + test):
        # a coarse pattern, so that the patches deflate as real ones do not quite
        image = np.repeat(np.repeat(rng.integers(0, 256, (24, 24, 3), np.uint8), 4, 0), 4, 1)
        images[hashlib.sha1(image.tobytes()).hexdigest()] = image
    names = list(images)
    labels = {name: int(rng.integers(2)) for name in names[:train]}
    path.mkdir()
    if train:
        (path / "train").mkdir()
        rows = "".join(f"{name},{label}\n" for name, label in labels.items())
        (path / "train_labels.csv").write_text("id,label\n" + rows)
    if test:
        (path / "test").mkdir()
        rows = "".join(f"{name},0\n" for name in names[train:])
        (path / "sample_submission.csv").write_text("id,label\n" + rows)
    for number, (name, image) in enumerate(images.items()):
        split = "train" if name in labels else "test"
        order, gap = (("<", 0), ("<", 63), (">", 8))[number % 3]
        (path / split / f"{name}.tif").write_bytes(tif_bytes(image, order, gap))
    return KaggleSource(path, dict(sorted(labels.items())), names[train:], images)


def assert_holds(store: Store, source: KaggleSource, left_out: tuple[str, ...] = ()) -> None:
    """A store has what the source has, but for what was left out, and is sound."""
    wanted = [name for name in [*source.train, *source.test] if name not in left_out]
    assert list(store.ids) == wanted
    assert list(store.labels) == [source.train.get(name, -1) for name in wanted]
    assert np.array_equal(store.gather(range(len(store))), [source.images[name] for name in wanted])
    assert verify_store(store.path) == []


def tif_bytes(image: np.ndarray, order: str = "<", gap: int = 0, **changed: tuple[int, int, int]) -> bytes:
    """An uncompressed one-strip RGB tif.

    Args:
        image: [H, W, 3] uint8.
        order: byte order, "<" or ">".
        gap: unused bytes before the pixels.
        changed: "t<tag>" -> (type, count, value) replaces or adds a tag.
    """
    height, width, samples = image.shape
    tags: dict[int, tuple[int, int, int]] = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 3, 0),
        259: (3, 1, 1),
        262: (3, 1, 2),
        273: (4, 1, 0),
        277: (3, 1, samples),
        278: (4, 1, height),
        279: (4, 1, image.nbytes),
        339: (3, 1, 1),
    }
    tags |= {int(name[1:]): value for name, value in changed.items()}
    bits_at = 8 + 2 + 12 * len(tags) + 4
    pixels_at = bits_at + 6 + gap
    fixed = {258: (3, 3, bits_at), 273: (4, 1, pixels_at)}
    tags |= {tag: value for tag, value in fixed.items() if f"t{tag}" not in changed}
    directory = struct.pack(order + "H", len(tags))
    for tag, (kind, count, value) in sorted(tags.items()):
        short = kind == 3 and count == 1
        directory += struct.pack(
            order + ("HHIHH" if short else "HHII"), tag, kind, count, value, *[0] * short
        )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    bits = struct.pack(order + "3H", 8, 8, 8)
    return start + directory + bytes(4) + bits + bytes(gap) + image.tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
