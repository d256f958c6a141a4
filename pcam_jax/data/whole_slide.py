"""Whole-slide images and other big pictures, read by rectangles so that memory never holds more than a few.

A tiled or striped TIFF is read segment by segment through tifffile's page tables. tifffile's other way in, zarr,
needs that package and its dependencies for what a lookup of a few segments does. Other scanners' formats go through
OpenSlide.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tifffile

from pcam_jax.data.raw.picture import SUFFIXES, decode_picture, picture_size
from pcam_jax.data.raw.record import RecordFault
from pcam_jax.data.slide_tiff import check_page, damage_explained, decode_segment, named_microns, single_page
from pcam_jax.runtime.errors import UserError, require

Pixels = npt.NDArray[np.uint8]

SLIDE_SUFFIXES = (".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi", ".dcm")
"""Of files that only OpenSlide reads."""
_CACHE_BYTES = 64 * 2**20  # decoded segments: a row of them across a wide slide
_GLASS = 255
# a resolution tag in this range is a microscope's; printers' 72 or 300 dots an inch are 353 and 85
_PLAUSIBLE_MICRONS = (0.05, 20.0)


@dataclass(frozen=True)
class Level:
    """One resolution of a slide."""

    height: int
    width: int
    downsample: float
    """Pixels of the finest level along one pixel of this one."""


class Slide(Protocol):
    """A picture in one or more resolutions, the finest first."""

    name: str
    levels: tuple[Level, ...]
    microns_per_pixel: float | None
    """Of the finest level, where the file says so believably."""
    identity: str
    """Differs where the picture does."""

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Pixels:
        """A rectangle that lies within a level, ``[height, width, 3] uint8``."""

    def close(self) -> None:
        """Close the file."""


class ArraySlide:
    """A picture in memory, ``[H, W, 3] uint8``.

    Raises:
        UserError: another dtype or shape, or no pixels.
    """

    def __init__(self, picture: Pixels, name: str = "the picture", identity: str = "") -> None:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UserError(
                f"{name} is {picture.dtype} of shape {picture.shape}: a picture is uint8 [H, W, 3]."
            )
        self.name, self.identity = name, identity
        self.microns_per_pixel: float | None = None
        self._picture = picture
        self.levels: tuple[Level, ...] = (Level(picture.shape[0], picture.shape[1], 1.0),)

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Pixels:
        """See `Slide`."""
        return self._picture[top : top + height, left : left + width]

    def close(self) -> None:
        """Nothing is open."""


class TiffSlide:
    """A TIFF file, pyramidal or not.

    Missing segments of sparse files are glass (white), as scanners mean them.

    Raises:
        UserError: it is damaged, or holds pixels that are not 8-bit RGB or grey, or in a compression that is not
            known here, or segments too large to be read by parts.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.identity = str(path), _file_identity(path)
        with damage_explained(path), tifffile.TiffFile(path) as file:
            series = file.series[0]
            self._pages = [single_page(path, level) for level in series.levels]
            self.microns_per_pixel = _plausible(named_microns(file, self._pages[0]))
        for page in self._pages:
            check_page(path, page)
        finest = self._pages[0]
        self.levels = tuple(
            Level(page.imagelength, page.imagewidth, finest.imagewidth / page.imagewidth)
            for page in self._pages
        )
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._segments: OrderedDict[tuple[int, int], Pixels | None] = OrderedDict()
        self._cached = 0

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Pixels:
        """See `Slide`."""
        page = self._pages[level]
        tall, wide = (
            (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        )
        across = -(-page.imagewidth // wide)
        out = np.full((height, width, 3), _GLASS, np.uint8)
        for row in range(top // tall, (top + height - 1) // tall + 1):
            for column in range(left // wide, (left + width - 1) // wide + 1):
                segment = self._segment(level, row * across + column)
                if segment is None:
                    continue
                # where segment and rectangle meet, in pixels of the level
                first = max(top, row * tall), max(left, column * wide)
                last = (
                    min(top + height, row * tall + segment.shape[0]),
                    min(left + width, column * wide + segment.shape[1]),
                )
                out[first[0] - top : last[0] - top, first[1] - left : last[1] - left] = segment[
                    first[0] - row * tall : last[0] - row * tall,
                    first[1] - column * wide : last[1] - column * wide,
                ]
        return out

    def close(self) -> None:
        """Close the file."""
        self._close()

    def _segment(self, level: int, index: int) -> Pixels | None:
        key = (level, index)
        if key in self._segments:
            self._segments.move_to_end(key)
            return self._segments[key]
        pixels = self._decoded(self._pages[level], index)
        self._segments[key] = pixels
        self._cached += 0 if pixels is None else pixels.nbytes
        while self._cached > _CACHE_BYTES and len(self._segments) > 1:
            _, oldest = self._segments.popitem(last=False)
            self._cached -= 0 if oldest is None else oldest.nbytes
        return pixels

    def _decoded(self, page: Any, index: int) -> Pixels | None:
        offset, size = (
            (page.dataoffsets[index], page.databytecounts[index]) if index < len(page.dataoffsets) else (0, 0)
        )
        if not size or not offset:
            return None
        content = os.pread(self._descriptor, size, offset)
        size_named = f"{page.imagewidth}x{page.imagelength}"
        where = f"{self.name} is damaged or cut short: segment {index} of its {size_named} level"
        if len(content) < size:
            raise UserError(f"{where} ends too early; fetch the file again.")
        try:
            pixels = decode_segment(page, index, content)
        except Exception as error:  # decoders' errors share no base class
            raise UserError(f"{where} cannot be decoded ({error}); fetch the file again.") from None
        return _as_rgb(pixels, int(page.photometric) == 0)


class OpenSlideFile:
    """A slide in a format that the library OpenSlide reads (extra ``openslide``).

    Raises:
        UserError: the extra is not installed, or OpenSlide does not know the file.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.identity = str(path), _file_identity(path)
        openslide = require("openslide", extra="openslide")
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            raise UserError(f"{path} is not a slide that can be read ({error}).") from None
        self._error = openslide.OpenSlideError
        self.levels = tuple(
            Level(height, width, float(downsample))
            for (width, height), downsample in zip(
                self._slide.level_dimensions, self._slide.level_downsamples, strict=True
            )
        )
        self.microns_per_pixel = _plausible(self._slide.properties.get("openslide.mpp-x"))

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Pixels:
        """See `Slide`."""
        downsample = self.levels[level].downsample
        try:
            picture = self._slide.read_region(
                (round(left * downsample), round(top * downsample)), level, (width, height)
            )
        except self._error as error:
            raise UserError(f"{self.name} is damaged ({error}): fetch the file again.") from None
        return _as_rgb(np.asarray(picture))

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


def open_slide(path: str | os.PathLike[str]) -> Slide:
    """Open a big picture; the caller closes it.

    Args:
        path: a TIFF (also pyramidal: .tif, .svs, ...), a PNG, JPEG or other common picture, which is decoded
            whole, or a file for OpenSlide.

    Raises:
        UserError: there is none, it is damaged, or of a kind that is not known.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"There is no {place}: give a slide or another big picture.")
    if place.is_dir() and place.suffix.lower() not in SLIDE_SUFFIXES:
        raise UserError(f"{place} is a folder: --tiles takes one slide or picture.")
    if place.suffix.lower() in SLIDE_SUFFIXES:
        return OpenSlideFile(place)
    with open(place, "rb") as file:
        start = file.read(4)
    if start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        try:
            return TiffSlide(place)
        except UserError:
            with contextlib.suppress(UserError):
                return OpenSlideFile(place)
            raise
    if place.suffix.lower() in SUFFIXES:
        try:
            content = place.read_bytes()
            picture = np.empty((*picture_size(content), 3), np.uint8)
            decode_picture(content, picture)
        except RecordFault as fault:
            raise UserError(f"{place} cannot be used: {fault}.") from None
        return ArraySlide(picture, str(place), _file_identity(place))
    return OpenSlideFile(place)


def _as_rgb(pixels: Pixels, white_is_zero: bool = False) -> Pixels:
    """``[h, w]``, ``[h, w, 1]`` grey, RGB or RGBA (laid on glass) as ``[h, w, 3] uint8``."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if white_is_zero and pixels.shape[2] == 1:
        pixels = 255 - pixels
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[:, :, 3:].astype(np.uint16)
    return ((pixels[:, :, :3] * alpha + _GLASS * (255 - alpha) + 127) // 255).astype(np.uint8)


def _plausible(value: Any) -> float | None:
    try:
        microns = float(value)
    except (TypeError, ValueError):
        return None
    return microns if _PLAUSIBLE_MICRONS[0] <= microns <= _PLAUSIBLE_MICRONS[1] else None


def _file_identity(path: Path) -> str:
    status = os.stat(path)
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
