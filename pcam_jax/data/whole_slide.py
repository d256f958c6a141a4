"""Whole-slide images and other big pictures, read by rectangles so that memory never holds more than a few.

A tiled or striped TIFF is read segment by segment through tifffile's page tables. tifffile's other way in, zarr,
needs that package and its dependencies for what a lookup of a few segments does. JPEG segments, which most scanners
write, are decoded by Pillow, where tifffile would want imagecodecs (26 MB). Other scanners' formats go through
OpenSlide.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from pcam_jax.data.raw.picture import SUFFIXES, decode_picture, picture_size
from pcam_jax.data.raw.record import RecordFault
from pcam_jax.runtime.errors import UserError, require

Pixels = npt.NDArray[np.uint8]

SLIDE_SUFFIXES = (".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide", ".czi", ".dcm")
"""Of files that only OpenSlide reads."""
OVERVIEW_SIDE = 2048
"""Longest side of an overview, in pixels."""
_CACHE_BYTES = 64 * 2**20  # decoded segments: a row of them across a wide slide
_LARGEST_SEGMENT = 256 * 2**20
_BLOCK_SIDE = 2048  # of what is read at once for an overview
_GLASS = 255
# a resolution tag in this range is a microscope's; printers' 72 or 300 dots an inch are 353 and 85
_PLAUSIBLE_MICRONS = (0.05, 20.0)
_SAME_SCALE = 1.05  # scanners of one nominal magnification differ by as much
_JPEG = (7, 33007)


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
        with _damage_explained(path), tifffile.TiffFile(path) as file:
            series = file.series[0]
            self._pages = [_single_page(path, level) for level in series.levels]
            self.microns_per_pixel = _tiff_microns(file, self._pages[0])
        for page in self._pages:
            _check_page(path, page)
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
            if page.compression in _JPEG:
                pixels = _decode_jpeg(content, page.jpegtables, int(page.photometric))
            else:
                decoded = page.decode(content, index)[0]
                pixels = np.asarray(decoded)[0]
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


# ---------------------------------------------------------------------------------------------- one resolution


class SlideView:
    """A slide at one resolution, as if it were one picture of ``height`` x ``width`` pixels.

    Args:
        slide: the slide.
        level: which of its levels.
        reduction: pixels of the level along one pixel of the view; 1 takes the level as it is.
    """

    def __init__(self, slide: Slide, level: int = 0, reduction: float = 1.0) -> None:
        self.slide, self.level, self.reduction = slide, level, reduction
        found = slide.levels[level]
        self.height = max(1, round(found.height / reduction))
        self.width = max(1, round(found.width / reduction))
        self.scale = found.downsample * reduction
        """Pixels of the slide's finest level along one pixel of the view."""

    @property
    def microns_per_pixel(self) -> float | None:
        """Of the view, where the slide says its own."""
        finest = self.slide.microns_per_pixel
        return None if finest is None else finest * self.scale

    def read(self, top: int, left: int, height: int, width: int) -> Pixels:
        """A rectangle, ``[height, width, 3] uint8``; beyond the border the picture is continued as in a mirror."""
        (first_row, rows, pad_rows), (first_column, columns, pad_columns) = (
            _mirrored(start, count, length)
            for start, count, length in ((top, height, self.height), (left, width, self.width))
        )
        pixels = self._read_inside(first_row, first_column, rows, columns)
        if any(pad_rows) or any(pad_columns):
            pixels = np.pad(pixels, (pad_rows, pad_columns, (0, 0)), mode="symmetric")
        row, column = top - first_row + pad_rows[0], left - first_column + pad_columns[0]
        return pixels[row : row + height, column : column + width]

    def overview(self, longest_side: int = OVERVIEW_SIDE) -> Pixels:
        """The whole as a small picture, from the coarsest level that suffices, ``[h, w, 3] uint8``."""
        factor = max(1.0, max(self.height, self.width) / longest_side)
        size = max(1, round(self.height / factor)), max(1, round(self.width / factor))
        wanted = self.scale * factor
        level = max(
            (number for number, found in enumerate(self.slide.levels) if found.downsample <= wanted * 1.01),
            key=lambda number: self.slide.levels[number].downsample,
        )
        found = self.slide.levels[level]
        # float boxes, so that the blocks of the overview fit together whatever the factor
        steps = found.height / size[0], found.width / size[1]
        block = max(1, int(_BLOCK_SIDE / max(steps)))
        out = np.empty((*size, 3), np.uint8)
        for row in range(0, size[0], block):
            for column in range(0, size[1], block):
                rows, columns = min(block, size[0] - row), min(block, size[1] - column)
                out[row : row + rows, column : column + columns] = _reduced(
                    self.slide, level, (row, column), (rows, columns), steps, Image.Resampling.BOX
                )
        return out

    def _read_inside(self, top: int, left: int, height: int, width: int) -> Pixels:
        if self.reduction == 1:
            return self.slide.read(self.level, top, left, height, width)
        found = self.slide.levels[self.level]
        steps = (found.height / self.height, found.width / self.width)  # the view's sides are whole pixels
        return _reduced(
            self.slide, self.level, (top, left), (height, width), steps, Image.Resampling.BILINEAR
        )


def view_slide(slide: Slide, *, level: int | None = None, microns: float | None = None) -> SlideView:
    """The slide at a level, or at a resolution in micrometres a pixel.

    A level within 5 % of the resolution is taken as it is; otherwise the next finer one is reduced.

    Args:
        slide: the slide.
        level: number of the level, 0 the finest; 0 where neither is given.
        microns: resolution wanted.

    Raises:
        UserError: both are given, there is no such level, the slide does not say its resolution, or it is not
            fine enough.
    """
    if level is not None and microns is not None:
        raise UserError("Give --level or --mpp, not both.")
    if microns is None:
        number = level or 0
        if not 0 <= number < len(slide.levels):
            raise UserError(f"{slide.name} has levels 0 to {len(slide.levels) - 1}, and no level {level}.")
        return SlideView(slide, number)
    if not microns > 0:
        raise UserError(f"--mpp is {microns:g}: it must be above 0.")
    if slide.microns_per_pixel is None:
        raise UserError(f"{slide.name} does not say how many micrometres a pixel is: choose with --level.")
    wanted = microns / slide.microns_per_pixel
    if wanted * _SAME_SCALE < 1:
        raise UserError(
            f"{slide.name} has {slide.microns_per_pixel:.3g} µm a pixel at best, too coarse for {microns:.3g}."
        )
    downsamples = [found.downsample for found in slide.levels]
    nearest = min(range(len(downsamples)), key=lambda number: abs(np.log(downsamples[number] / wanted)))
    if 1 / _SAME_SCALE <= wanted / downsamples[nearest] <= _SAME_SCALE:
        return SlideView(slide, nearest)
    finer = max(
        (number for number, found in enumerate(downsamples) if found <= wanted),
        key=lambda number: downsamples[number],
    )
    return SlideView(slide, finer, wanted / downsamples[finer])


def _mirrored(start: int, count: int, length: int) -> tuple[int, int, tuple[int, int]]:
    """What must be read of ``length`` pixels, (first, count), and how many are mirrored (before, after) it."""
    before, after = max(0, -start), max(0, start + count - length)
    first, last = max(0, min(start, length - after)), min(length, max(start + count, before))
    return first, last - first, (before, after)


def _reduced(
    slide: Slide,
    level: int,
    corner: tuple[int, int],
    size: tuple[int, int],
    steps: tuple[float, float],
    filtered: Image.Resampling,
) -> Pixels:
    """A rectangle of a level, ``steps`` pixels of it to one; the filter sees beyond the rectangle's edges."""
    found = slide.levels[level]
    bounds, box = [], []
    for first, count, step, length in zip(corner, size, steps, (found.height, found.width), strict=True):
        low, high = first * step, min((first + count) * step, length)
        start, stop = max(0, int(low - step) - 1), min(length, int(high + step) + 2)
        bounds.append((start, stop - start))
        box.append((low - start, high - start))
    (top, height), (left, width) = bounds
    source = Image.fromarray(slide.read(level, top, left, height, width))
    (low_row, high_row), (low_column, high_column) = box
    return np.asarray(
        source.resize((size[1], size[0]), filtered, box=(low_column, low_row, high_column, high_row))
    )


# ---------------------------------------------------------------------------------------------- TIFF's particulars


@contextlib.contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError
    ) as error:  # fmt: skip
        raise UserError(f"{path} cannot be read as a TIFF file ({error}).") from None


def _single_page(path: Path, level: Any) -> Any:
    if len(level.pages) != 1 or level.keyframe is None:
        raise UserError(f"{path} holds a stack of {len(level.pages)} pictures: --tiles takes one picture.")
    return level.keyframe


def _check_page(path: Path, page: Any) -> None:
    if page.bitspersample != 8 or page.sampleformat != 1:
        raise UserError(f"{path} has {page.bitspersample} bits a sample: 8 unsigned bits are needed.")
    if int(page.photometric) not in (0, 1, 2, 6) or page.samplesperpixel not in (1, 3, 4):
        raise UserError(f"{path} has colours that are neither RGB nor grey.")
    if page.samplesperpixel > 1 and int(page.planarconfig) != 1:
        raise UserError(f"{path} holds its colours plane by plane: save it with interleaved RGB.")
    if int(page.photometric) == 6 and page.compression not in _JPEG:
        raise UserError(f"{path} has YCbCr colours without JPEG: the extra pcam-jax[openslide] may read it.")
    if page.compression not in (*_JPEG, *_decodable(page.compression)):
        name = getattr(page.compression, "name", page.compression)
        raise UserError(
            f"{path} is compressed as {name}, which is not read here: pip install 'pcam-jax[openslide]' may help."
        )
    rows, columns = (
        (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    )
    if rows * columns * page.samplesperpixel > _LARGEST_SEGMENT:
        raise UserError(
            f"{path} is one piece of {columns}x{rows} pixels and cannot be read by parts: save it tiled "
            "(for example with `vips tiffsave --tile --pyramid`)."
        )


def _decodable(compression: int) -> tuple[int, ...]:
    return (int(compression),) if compression in tifffile.TIFF.DECOMPRESSORS else ()


def _decode_jpeg(content: bytes, tables: bytes | None, photometric: int) -> Pixels:
    """A JPEG segment, whose tables may stand elsewhere and whose colours the TIFF tag names."""
    if photometric in (2, 6) and b"Adobe" not in content[:64]:
        # the marker says whether the three components are RGB (0) or YCbCr (1)
        marker = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x01" if photometric == 6 else b"\x00")
        content = content[:2] + marker + content[2:]
    if tables:
        content = tables[:-2] + content[2:]
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
        return np.asarray(picture if picture.mode in ("RGB", "L") else picture.convert("RGB"))


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


def _tiff_microns(file: Any, page: Any) -> float | None:
    """From Aperio's description, OME-XML, or the resolution tags."""
    description = page.description or ""
    aperio = re.search(r"\bMPP = ([0-9.]+)", description)
    ome = re.search(r'PhysicalSizeX="([0-9.eE+-]+)"', file.ome_metadata or "")
    other_unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', file.ome_metadata or "")
    if aperio:
        return _plausible(aperio[1])
    if ome and (other_unit is None or other_unit[1] in ("µm", "&#181;m", "um")):
        return _plausible(ome[1])
    across, _ = page.get_resolution("MICROMETER") if 282 in page.tags else (0, 0)
    return _plausible(1 / across) if across > 0 else None


def _plausible(value: Any) -> float | None:
    try:
        microns = float(value)
    except (TypeError, ValueError):
        return None
    return microns if _PLAUSIBLE_MICRONS[0] <= microns <= _PLAUSIBLE_MICRONS[1] else None


def _file_identity(path: Path) -> str:
    status = os.stat(path)
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
