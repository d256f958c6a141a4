"""Slides for patches that name none: Kaggle's are PatchCamelyon's, and a patch is known by its pixels.

PatchCamelyon's ``*_meta.csv`` name the slide of each row of its h5 files. Hashing those rows gives each Kaggle
patch its slide, since equal pixels have equal SHA-1.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pcam_jax.data.manifest import HASHES_FILE, sha1_of
from pcam_jax.data.raw import find_reader
from pcam_jax.data.store import Store, open_store, write_tables
from pcam_jax.runtime.errors import UserError
from pcam_jax.runtime.files import sync_folder, sync_tree
from pcam_jax.runtime.progress import progress

_SLIDES_NOTED = "slides_from"


def slides_by_hash(place: str | os.PathLike[str]) -> dict[bytes, str]:
    """The slide of each patch that a place knows, by the SHA-1 of its pixels.

    Args:
        place: a store whose images have groups; a folder (or archive) of PatchCamelyon's h5 and meta files; or one
            of its ``*_meta.csv``, beside which the h5 file lies.

    Raises:
        UserError: no slides there, or patches that are equal but come from different slides in large number.
    """
    path = Path(place)
    if (path / "manifest.json").is_file():
        store = open_store(path)
        hashes, slides = store.hashes(), store.groups
        rows = [(hashes[row].tobytes(), str(slides[row])) for row in range(len(store))]
    else:
        rows = _from_raw(path.parent if path.is_file() and path.suffix == ".csv" else path)
    known = {digest: slide for digest, slide in rows if slide}
    if not known:
        raise UserError(f"{place} names no slide for any patch: PatchCamelyon's *_meta.csv files do.")
    return known


def slides_of(store: Store, known: dict[bytes, str]) -> npt.NDArray[np.str_]:
    """The slide of each image of a store, `[N]`, its own group or "" where it is not known."""
    hashes = store.hashes()
    own = store.groups
    return np.array([known.get(hashes[row].tobytes(), str(own[row])) for row in range(len(store))], np.str_)


def write_store_with_slides(
    store: Store, slides: npt.NDArray[np.str_], path: str | os.PathLike[str]
) -> Store:
    """Write a store of the same images whose groups are ``slides [N]``.

    The images take no further room where the file system knows hard links; a store is never changed, so sharing
    them is safe.

    Raises:
        UserError: ``path`` exists.
    """
    target = Path(path)
    if target.exists():
        raise UserError(f"{target} exists already: choose another folder, or delete it first.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = store.manifest
        for name in [shard.file for shard in manifest.shards]:
            _link_or_copy(store.path / name, partial / name)
        hashes = np.load(store.path / HASHES_FILE, allow_pickle=False)
        write_tables(
            partial,
            store.index.assign(group=slides),
            hashes,
            list(manifest.shards),
            manifest.image_shape,
            manifest.class_names,
            {**manifest.source, _SLIDES_NOTED: "pixel hashes"},
            manifest.prepare,
        )
        masks = manifest.source.get("masks")
        if masks:
            _link_or_copy(store.path / str(masks), partial / str(masks))
        sync_tree(partial)
        os.rename(partial, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_store(target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _from_raw(path: Path) -> list[tuple[bytes, str]]:
    """(SHA-1, slide) of each patch of a raw set."""
    reader = find_reader(path)
    records, _ = reader.records()
    named = [record for record in records if record.group]
    image = np.empty(reader.image_shape, np.uint8)
    rows = []
    with progress(len(named), "hash", "img") as bar:
        for record in named:
            reader.read(record, image)
            rows.append((sha1_of(image), record.group))
            bar.update(1)
    return rows
