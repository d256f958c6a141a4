"""Images to predict, wherever they are: a store, one file, a folder, a zip, or a raw layout; read in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pcam_jax.data.named import SAMPLE, open_named_store
from pcam_jax.data.raw import READERS, RawReader, RawRecord, ReaderOptions, RecordFault, find_reader
from pcam_jax.data.raw.container import explain_unreadable_file, open_container
from pcam_jax.data.raw.tif import read_tif
from pcam_jax.data.store import Store
from pcam_jax.runtime.errors import UserError

_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
_LARGEST_FILE = 256 * 2**20


class ImageFiles:
    """Images decoded when they are asked for; an `ImageSource` for the loaders.

    Args:
        ids: names of the images, in order.
        image_shape: (H, W, 3) that all must have.
        read: fills ``[H, W, 3] uint8`` with image number i; raises RecordFault where it cannot.
    """

    def __init__(
        self, ids: list[str], image_shape: tuple[int, int, int], read: Callable[[int, np.ndarray], object]
    ) -> None:
        self.ids = np.asarray(ids, dtype=np.str_)
        self.image_shape = image_shape
        self.labels = np.full(len(ids), -1, np.int32)
        self._read = read

    def __len__(self) -> int:
        return len(self.ids)

    def gather(self, indices: Any, out: np.ndarray | None = None) -> np.ndarray:
        """The images at ``indices``, ``[n, H, W, 3] uint8``.

        Raises:
            UserError: an image cannot be read or has another size; it is named.
        """
        wanted = np.asarray(indices, np.int64)
        images = np.empty((len(wanted), *self.image_shape), np.uint8) if out is None else out
        for row, index in enumerate(wanted):
            try:
                self._read(int(index), images[row])
            except RecordFault as fault:
                raise UserError(f"The image {self.ids[index]} cannot be used: {fault}.") from None
        return images


def open_images(
    path: str | Path,
    image_shape: tuple[int, int, int],
    split: str,
    prepared: Mapping[str, Any] | None = None,
) -> tuple[Store | ImageFiles, np.ndarray]:
    """Find the images to predict.

    Args:
        path: a store, an image file, a folder or zip of images, a raw layout that `prepare` reads, or "sample"
            (the embedded set, unless there is a file or folder of that name).
        image_shape: (H, W, 3) that the model takes.
        split: which part of a store or raw layout; "all" takes everything.
        prepared: how the model's training images were made: where it holds a ``size``, pictures of other sizes are
            resized as they were, by its ``fit``.

    Returns:
        The source, and the positions in it of the wanted images, ``[n] int64``, in order.

    Raises:
        UserError: there is nothing at ``path``, or no image in it, or the store's images have another shape.
    """
    place = Path(path)
    is_sample = str(path) == SAMPLE and not place.exists()
    if not is_sample and not place.exists():
        raise UserError(f"There is no {place}: give a store, an image, a folder of images or a zip.")
    if is_sample or (place / "manifest.json").is_file():
        store = open_named_store(path)
        if store.image_shape != image_shape:
            raise UserError(f"{place} has images of {store.image_shape}; the model takes {image_shape}.")
        positions = np.flatnonzero((store.splits == split) | (split == "all"))
        if not len(positions):
            held = ", ".join(sorted(set(store.splits) - {""})) or "none"
            raise UserError(
                f"{place} has no split {split!r} of its own (it has: {held}): choose with --split."
            )
        return store, positions
    resizing = {name: value for name, value in (prepared or {}).items() if name in ("size", "fit")}
    files = _raw_layout(place, image_shape, split, resizing) or _plain_images(place, image_shape, resizing)
    return files, np.arange(len(files))


def decode_image(
    content: bytes | memoryview, name: str, out: np.ndarray, *, resize: bool = False, fit: Any = "stretch"
) -> None:
    """Decode a picture into ``out`` (``[H, W, 3] uint8``).

    Args:
        content: the file.
        name: its name.
        out: filled; without ``resize`` the picture must have exactly its shape.
        resize: change the picture's size.
        fit: how, see `pcam_jax.data.raw.picture.decode_picture`.

    Raises:
        RecordFault: it is damaged, of another size, or no picture.
    """
    if name.lower().endswith((".tif", ".tiff")) and not resize:
        read_tif(content, out)
        return
    from pcam_jax.data.raw.picture import decode_picture

    decode_picture(content, out, resize=resize, fit=fit)


def _raw_layout(
    place: Path, image_shape: tuple[int, int, int], split: str, resizing: dict[str, Any]
) -> ImageFiles | None:
    """The split of a layout that `prepare` knows, or None if it is none."""
    container = open_container(place)
    kind = _known_layout(place, container.members()) if container is not None else None
    if kind is None:
        return None
    understood = {name: value for name, value in resizing.items() if name in kind.understands}
    reader = find_reader(place, kind.name, ReaderOptions(**understood))
    records, _ = reader.records()
    if reader.image_shape != image_shape:
        raise UserError(f"{place} has images of {reader.image_shape}; the model takes {image_shape}.")
    wanted: list[RawRecord] = [record for record in records if split in (record.split, "all")]
    if not wanted:
        held = ", ".join(sorted({record.split for record in records} - {""})) or "none"
        raise UserError(f"{place} has no split {split!r} of its own (it has: {held}): choose with --split.")
    return ImageFiles(
        [record.id or record.source for record in wanted],
        image_shape,
        lambda index, out: reader.read(wanted[index], out),
    )


def _known_layout(place: Path, members: dict[str, Any]) -> type[RawReader] | None:
    import importlib

    for name, (module, kind, _) in READERS.items():
        reader: type[RawReader] = getattr(importlib.import_module(module), kind)
        # any folder of images is one to predict, whatever its folders' names
        if name not in ("folders", "table") and reader.recognises(place, members.keys()):
            return reader
    return None


def _plain_images(place: Path, image_shape: tuple[int, int, int], resizing: dict[str, Any]) -> ImageFiles:
    how = {"resize": "size" in resizing, "fit": resizing.get("fit", "stretch")}
    if place.is_file() and place.suffix.lower() in _SUFFIXES:
        content = place.read_bytes()
        return ImageFiles(
            [place.stem], image_shape, lambda _, out: decode_image(content, place.name, out, **how)
        )
    container = open_container(place)
    if container is None:
        explain_unreadable_file(place)
        raise UserError(f"{place} is neither an image, a folder, a zip nor a tar.")
    members = {name: at for name, at in container.members().items() if name.lower().endswith(_SUFFIXES)}
    if not members:
        raise UserError(f"{place} holds no images ({', '.join(_SUFFIXES)}).")
    names, locators = list(members), list(members.values())
    stems = [PurePosixPath(name).stem for name in names]
    ids = stems if len(set(stems)) == len(stems) else names

    def read(index: int, out: np.ndarray) -> None:
        decode_image(container.read(locators[index], _LARGEST_FILE), names[index], out, **how)

    return ImageFiles(ids, image_shape, read)
