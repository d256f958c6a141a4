"""A slide at one resolution, read by rectangles or as a small picture of the whole."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pcam_jax.data.whole_slide import Pixels, Slide
from pcam_jax.runtime.errors import UserError

OVERVIEW_SIDE = 2048
"""Longest side of an overview, in pixels."""
_BLOCK_SIDE = 2048  # of what is read at once for an overview
_SAME_SCALE = 1.05  # scanners of one nominal magnification differ by as much


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
