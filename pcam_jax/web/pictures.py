"""A picture as the patches that the model takes: itself, resized as in training, or cut into tiles."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

from pcam_jax.data.images import decode_image
from pcam_jax.data.raw.picture import decode_picture, picture_size
from pcam_jax.data.raw.record import RecordFault
from pcam_jax.data.raw.tif import find_plain_strip
from pcam_jax.web.limits import Limits, in_mebibytes
from pcam_jax.web.uploads import Upload, kind_of

MOST_SCANS = 100
"""A progressive JPEG has about ten; each of thousands would cost a pass over all pixels."""
FINE_TILES = 1024
"""Tiles overlap as far as their number stays within this."""
_PREVIEW_PIXELS = 1024


class Unusable(Exception):
    """A file that cannot be predicted: a status for a request of it alone, and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


@dataclasses.dataclass(frozen=True)
class Intake:
    """What a model takes.

    Attributes:
        image_shape: (H, W, 3).
        resize: whether pictures of other sizes are resized, as its training images were, instead of cut into tiles.
        fit: how they are resized.
    """

    image_shape: tuple[int, int, int]
    resize: bool = False
    fit: Any = "stretch"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where tiles lie in a picture: their corners are at ``tops`` x ``lefts``, row by row."""

    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.tops), len(self.lefts)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        name: for people.
        height: in pixels, as sent.
        width: likewise.
        patches: ``[n, H, W, 3] uint8``: one, or its tiles.
        grid: where they lie, or None for one patch.
        preview: a PNG of it for browsers, or b"".
    """

    name: str
    height: int
    width: int
    patches: np.ndarray
    grid: Grid | None = None
    preview: bytes = b""


def read_picture(upload: Upload, intake: Intake, limits: Limits, *, preview: bool = False) -> Picture:
    """Decode one file, after its size has been looked at.

    Args:
        upload: the file.
        intake: of the model.
        limits: of the service.
        preview: also make a PNG of it.

    Raises:
        Unusable: it is not a picture of a known kind, damaged, too large or too small.
    """
    if upload.error:
        raise Unusable(422, upload.error)
    content = upload.content
    if not content:
        raise Unusable(422, "The file is empty.")
    if len(content) > limits.file_bytes:
        raise Unusable(413, f"The file is larger than {in_mebibytes(limits.file_bytes)}.")
    kind = kind_of(content)
    if kind is None:
        raise Unusable(415, "The file is not a picture in tif, png or jpeg format.")
    if kind == "jpeg" and content.count(b"\xff\xda") > MOST_SCANS:
        raise Unusable(422, f"The JPEG has more than {MOST_SCANS} scans: save it again.")
    try:
        height, width = _size(content, intake.image_shape)
        if height * width > limits.pixels:
            raise Unusable(
                413, f"The picture has {width} x {height} pixels: at most {limits.pixels:,} are taken."
            )
        wanted = intake.image_shape
        same = (height, width) == wanted[:2]
        pixels = np.empty(wanted if same or intake.resize else (height, width, 3), np.uint8)
        if intake.resize and not same:
            decode_picture(content, pixels, resize=True, fit=intake.fit)
        else:
            if height < wanted[0] or width < wanted[1]:
                raise Unusable(
                    422,
                    f"The picture has {width} x {height} pixels: the model takes {wanted[1]} x {wanted[0]}, or "
                    "larger pictures, which are cut into tiles.",
                )
            grid = tile_grid(height, width, wanted, limits.tiles)
            decode_image(content, "x.tif" if kind == "tif" and same else "x", pixels)
    except RecordFault as fault:
        raise Unusable(422, f"The picture cannot be read: {_words(fault)}.") from None
    shown = _png(pixels) if preview else b""
    if pixels.shape == wanted:
        return Picture(upload.name, height, width, pixels[None], preview=shown)
    return Picture(upload.name, height, width, cut(pixels, grid, wanted), grid, shown)


def pixels_of(upload: Upload, image_shape: tuple[int, int, int]) -> int:
    """Pixels by the header alone, 0 where it tells none; a tif of the model's own shape is told at once."""
    if upload.error or kind_of(upload.content) is None:
        return 0
    try:
        height, width = _size(upload.content, image_shape)
    except RecordFault:
        return 0
    return height * width


def _size(content: bytes, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    # ten times as fast as opening it with Pillow, for what most requests hold
    if find_plain_strip(content, image_shape) is not None:
        return image_shape[:2]
    return picture_size(content)


def tile_grid(height: int, width: int, patch: tuple[int, int, int], most: int) -> Grid:
    """Tiles that cover a picture, overlapping by two thirds or a half where that leaves few enough.

    The last ones in each direction are moved back to end with the picture.

    Raises:
        Unusable: there would be more than ``most``.
    """
    for share in (3, 2, 1):
        tops, lefts = (
            corners(size, side, side // share) for size, side in ((height, patch[0]), (width, patch[1]))
        )
        if len(tops) * len(lefts) <= FINE_TILES:
            return Grid(tops, lefts)
    if len(tops) * len(lefts) > most:
        raise Unusable(
            413,
            f"The picture of {width} x {height} pixels makes {len(tops) * len(lefts):,} tiles: at most {most:,} are "
            "taken; use `python -m pcam_jax.predict` for larger ones.",
        )
    return Grid(tops, lefts)


def corners(size: int, side: int, stride: int) -> tuple[int, ...]:
    """First pixels of tiles of ``side`` along ``size`` pixels."""
    return (*range(0, size - side, max(1, stride)), size - side)


def cut(pixels: np.ndarray, grid: Grid, patch: tuple[int, int, int]) -> np.ndarray:
    """The tiles of a picture ``[H, W, 3]``, ``[n, h, w, 3] uint8``, row by row."""
    height, width, _ = patch
    return np.stack(
        [pixels[top : top + height, left : left + width] for top in grid.tops for left in grid.lefts]
    )


def _png(pixels: np.ndarray) -> bytes:
    picture = Image.fromarray(pixels)
    picture.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS))
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def _words(fault: RecordFault) -> str:
    text = str(fault).replace("--size N resizes", "").strip().rstrip(".;")
    return "".join(character if character.isprintable() else "?" for character in text)[:200]
