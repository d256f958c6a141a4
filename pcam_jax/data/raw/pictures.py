"""What the readers of picture files share: a container, a listing of pictures, decoding, resizing, counting."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pcam_jax.data.raw.container import Container, explain_unreadable_file
from pcam_jax.data.raw.options import ReaderOptions
from pcam_jax.data.raw.picture import SUFFIXES, decode_picture, picture_size
from pcam_jax.data.raw.record import Fault, RawRecord, RecordFault
from pcam_jax.runtime.errors import UserError

FILE_LIMIT = 512 * 2**20
TABLE_LIMIT = 1024 * 2**20
_SIZES_LOOKED_AT = 64
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of folders and table cells that dictate a split, and that split."""


class PictureReader:
    """Base of the readers of picture files; see `RawReader`."""

    name = "pictures"
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] = (0, 0, 3)
    extra_columns: tuple[str, ...] = ()
    understands: tuple[str, ...] = ("size", "fit")
    in_process_below = 2_000

    def __init__(
        self, source: Path, container: Container | None, options: ReaderOptions | None = None
    ) -> None:
        if container is None:
            explain_unreadable_file(source)
            raise UserError(f"{source} is neither a folder, a zip nor a tar: give one of these.")
        self.container = container
        self.options = options or ReaderOptions()
        self._notes: list[str] = []
        if self.options.size is not None:
            self.image_shape = (self.options.size, self.options.size, 3)

    def read(self, record: RawRecord, out: np.ndarray) -> str | None:
        """Decode one picture into ``out``, resized where ``--size`` was given."""
        content = self.container.read(record.locator, FILE_LIMIT)
        return decode_picture(content, out, resize=self.options.size is not None, fit=self.options.fit)

    def describe(self) -> dict[str, Any]:
        """Reader, path and kind of the source, and the options given."""
        given = {name: list(value) if isinstance(value, tuple) else value
                 for name, value in self.options.given().items()}  # fmt: skip
        return {"reader": self.name, **self.container.describe(), **given}

    def notes(self) -> list[str]:
        """What the listing found."""
        return self._notes

    def list_pictures(self, faults: list[Fault]) -> tuple[dict[str, Hashable], dict[str, Hashable]]:
        """(pictures, other files), each path -> locator in sorted order; paths that are no text are faults."""
        members = self.container.members()
        self.container.forget()
        faults += self.container.faults()
        pictures: dict[str, Hashable] = {}
        others: dict[str, Hashable] = {}
        for path in sorted(members):
            if not path.isprintable() or not _is_text(path):
                shown = path.encode("utf-8", "backslashreplace").decode()
                faults.append(Fault("bad name", "", "", shown, "the file name is not printable UTF-8 text"))
            elif path.lower().endswith(SUFFIXES):
                pictures[path] = members[path]
            else:
                others[path] = members[path]
        if not pictures:
            raise UserError(f"{self.container.path} holds no pictures ({', '.join(SUFFIXES)}).")
        return pictures, others

    def settle_size(self, pictures: Iterable[Hashable]) -> None:
        """Set `image_shape` by the headers of some pictures, unless ``--size`` was given.

        Raises:
            UserError: they differ, or none can be read.
        """
        if self.options.size is not None:
            return
        places = list(pictures)
        step = max(1, len(places) // _SIZES_LOOKED_AT)
        sizes: Counter[tuple[int, int]] = Counter()
        for place in places[::step]:
            try:
                sizes[picture_size(self.container.read(place, FILE_LIMIT))] += 1
            except RecordFault:
                continue  # `read` will say so with its name
        if not sizes:
            raise UserError(f"None of {self.container.path}'s pictures can be read: check one of them.")
        (size, count), *rest = sizes.most_common()
        if len(rest) and count < 0.9 * sizes.total():
            shown = ", ".join(f"{width}x{height}" for (height, width), _ in sizes.most_common(3))
            raise UserError(
                f"{self.container.path} has pictures of different sizes ({shown}): give --size N to resize them."
            )
        self.image_shape = (*size, 3)

    def text(self, path: str, place: Hashable) -> bytes:
        """A table's bytes; raises UserError."""
        try:
            return bytes(self.container.read(place, TABLE_LIMIT))
        except RecordFault as fault:
            raise UserError(f"{self.container.path}: {path} cannot be read: {fault.detail}.") from None

    def group_of(self, path: str) -> str:
        """The group that ``--group-pattern`` finds in a path, or empty."""
        pattern = self.options.group_pattern
        if not pattern:
            return ""
        try:
            found = re.search(pattern, path)
        except re.error as error:
            raise UserError(f"--group-pattern {pattern!r} is no regular expression: {error}.") from None
        if found is not None and found.re.groups < 1:
            raise UserError(f"--group-pattern {pattern!r} needs a parenthesis around what is the group.")
        return (found[1] or "") if found else ""


def stem_of(path: str) -> str:
    """The file's name without folders and suffix."""
    return PurePosixPath(path).stem


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown:,} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
